"""Process-wide cache of open shards, mapped or as files, with a bounded number of descriptors.

A mapping holds a descriptor for as long as it lives (Python keeps one to query the length), so an evicted shard that
is still being read counts too. The bound is half the soft limit of open files and at most 4,096, which also stays
far below the kernel's limit on mappings. For an index with many shards, the soft limit is raised towards the hard
one. A shard beyond the bound costs an ``open`` each time it is needed. Thread-safe.
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

_MOST: Final = 4096  # a window may span more than a thousand shards, and opening one is slow on a network file system
_FILES_PER_SHARD: Final = 4
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE)


class OpenShards:
    """LRU cache of open shards, keyed by owner and shard number.

    Attributes:
        most: how many may be open.
    """

    def __init__(self) -> None:
        self.most = _MOST
        self._entries: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._holders: weakref.WeakSet[Any] = weakref.WeakSet()
        self._owners = itertools.count()
        self._lock = RLock()  # reentrant: garbage collection may run an owner's finalizer while this thread holds it

    def owner(self, user: object, num_shards: int) -> int:
        """Register a user of shards and size the cache for them; return its number.

        The user's shards are dropped when it is garbage-collected.
        """
        with self._lock:
            number = next(self._owners)
            self.most = min(_MOST, _limit(num_shards) // 2)
        weakref.finalize(user, self._forget, number)
        return number

    def get(self, owner: int, shard: int) -> Any:
        """Return an open shard; None if it is not open."""
        with self._lock:
            found = self._entries.get((owner, shard))
            if found is not None:
                self._entries.move_to_end((owner, shard))
            return found

    def has_room(self) -> bool:
        """Return whether another shard may be opened, after closing shards that are not being read."""
        with self._lock:
            while len(self._holders) >= self.most and self._entries:
                self._entries.popitem(last=False)  # closed with its last user
            return len(self._holders) < self.most

    def keep(self, owner: int, shard: int, entry: T, holder: object) -> T:
        """Keep a shard open.

        Args:
            owner: its owner's number.
            shard: its number.
            entry: what :meth:`get` returns for it.
            holder: the object that holds the descriptor.
        """
        with self._lock:
            self._holders.add(holder)
            self._entries[owner, shard] = entry
        return entry

    def trying(self, open_it: Callable[[], T]) -> T:
        """Open something; if no descriptor is left in the process or machine, close all cached shards and retry.

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
    """Return the soft limit of open files, first raising it if the number of shards calls for it."""
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
"""The cache of this process."""
