"""The shards that this process has open, mapped or as files: a bounded number of descriptors, for all its readers.

A mapping holds a descriptor as long as it lives (Python keeps one to ask for the length), so an evicted shard that is
still being read counts too. The bound is half the soft limit of open files, at most 4,096, which also stays far below
the kernel's limit of mappings; the soft limit is raised towards the hard one when an index has many shards. Shards
beyond it cost an ``open`` when they are needed again. Safe to use from several threads.
"""

from __future__ import annotations

import errno
import itertools
import resource
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from threading import RLock
from typing import Any, Final, TypeVar

T = TypeVar("T")

_MOST: Final = (
    4096  # a window may span more than a thousand shards, and opening one takes long on a network file system
)
_FILES_PER_SHARD: Final = 4
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE)


class OpenShards:
    """Open shards by owner and number, the least recently used of which are closed when there are too many.

    Attributes:
        most: how many may be open.
    """

    def __init__(self) -> None:
        self.most = _MOST
        self._entries: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._holders: weakref.WeakSet[Any] = weakref.WeakSet()
        self._owners = itertools.count()
        self._lock = RLock()  # an owner may go, and forget its shards, while this thread holds it

    def owner(self, user: object, num_shards: int) -> int:
        """A number for a user of shards, whose shards are forgotten with it; makes room for as many as it has."""
        with self._lock:
            number = next(self._owners)
            self.most = min(_MOST, _limit(num_shards) // 2)
        weakref.finalize(user, self._forget, number)
        return number

    def get(self, owner: int, shard: int) -> Any:
        """An open shard; None if it is not open."""
        with self._lock:
            found = self._entries.get((owner, shard))
            if found is not None:
                self._entries.move_to_end((owner, shard))
            return found

    def has_room(self) -> bool:
        """Whether another may be opened, after closing what nobody is reading."""
        with self._lock:
            while len(self._holders) >= self.most and self._entries:
                self._entries.popitem(last=False)  # closed with its last user
            return len(self._holders) < self.most

    def keep(self, owner: int, shard: int, entry: T, holder: object) -> T:
        """Keep a shard open.

        Args:
            owner: whose it is.
            shard: its number.
            entry: what :meth:`get` gives.
            holder: what holds the descriptor.
        """
        with self._lock:
            self._holders.add(holder)
            self._entries[owner, shard] = entry
        return entry

    def drop(self, owner: int, shard: int) -> None:
        """Forget a shard that is of no use any more."""
        with self._lock:
            self._entries.pop((owner, shard), None)

    def trying(self, open_it: Callable[[], T]) -> T:
        """Open something; if the process or the machine has no descriptor left, close all that is kept and try again.

        Raises:
            OSError: it cannot be opened.
        """
        try:
            return open_it()
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
        with self._lock:
            self._entries.clear()
        return open_it()

    def _forget(self, owner: int) -> None:
        with self._lock:
            for key in [key for key in self._entries if key[0] == owner]:
                del self._entries[key]


def _limit(num_shards: int) -> int:
    """The soft limit of open files, raised where that helps so many shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _FILES_PER_SHARD * min(_MOST, num_shards)
    if soft != unlimited and soft < wanted:
        raised = wanted if hard == unlimited else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    return 2 * _MOST if soft == unlimited else min(2 * _MOST, soft)


OPEN_SHARDS: Final = OpenShards()
"""Those of this process."""
