"""Which shards the processes of a node will need, and when: what the cache evicts and prefetches by.

Each reading process keeps a plan in the cache's folder: for every shard that it will read the first and the
last step that needs it, and the step where it stands. Any process can then tell how far off the next use of
a shard is for all of them. A plan is locked by its owner for as long as it lives; one that can be locked
belonged to a process that is gone, and is removed. The plans of all readers of a process stand side by side;
what a reader will need again, nobody knows when, it needs :data:`FAR` steps from now: later than anything that is
planned, but sooner than what nobody needs. Cost: 56 bytes a shard and process; standing somewhere
else is one write of 8 bytes; plans of others are read once and then only their first 8 bytes.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from disttrain.data.order import Needs

FAR: Final = 2**62
"""Steps until what will be needed again, but in no step that is known."""

_RECORD: Final = np.dtype([("name", "S32"), ("first", "<i8"), ("last", "<i8"), ("bytes", "<i8")])
_HEAD_BYTES: Final = 8


class Plan:
    """This process's plan, alive until it is closed.

    Args:
        directory: the cache's folder.
        names: the file names of the shards, by number.
        needs: which of them are needed when.
        step: where the process stands.
        sizes: bytes of the shards, by number; left out, they count as nothing.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """

    def __init__(
        self, directory: Path, names: Sequence[str], needs: Needs, step: int, sizes: Sequence[int] = ()
    ) -> None:
        self.needs = needs
        self.step = step
        records = np.empty(len(needs.shards), dtype=_RECORD)
        records["name"] = np.array([names[shard] for shard in needs.shards.tolist()], dtype="S32")
        records["first"], records["last"] = needs.first, needs.last
        records["bytes"] = np.array(sizes, dtype=np.int64)[needs.shards] if len(sizes) else 0
        records.sort(order="name")
        self.path = directory / f"{os.getpid()}-{secrets.token_hex(4)}.plan"
        temporary = self.path.with_suffix(".new")
        self._fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            with open(self._fd, "wb", closefd=False) as file:
                file.write(step.to_bytes(_HEAD_BYTES, "little") + records.tobytes())
            os.replace(temporary, self.path)  # nobody sees it unlocked or in part
        except OSError:
            temporary.unlink(missing_ok=True)
            os.close(self._fd)
            raise

    def stand_at(self, step: int) -> None:
        """Tell the other processes where this one stands."""
        if self._fd >= 0 and step != self.step:
            self.step = step
            os.pwrite(self._fd, step.to_bytes(_HEAD_BYTES, "little"), 0)

    def close(self) -> None:
        """Need nothing any more."""
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


class Plans:
    """The plans of all living processes that share a cache."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._bodies: dict[str, NDArray[np.void]] = {}

    def steps_until(self, names: Sequence[str]) -> NDArray[np.float64]:
        """In how many steps the first process needs each shard: 0 now, infinity where none will."""
        wanted = np.array(names, dtype="S32")
        until = np.full(len(names), np.inf)
        for now, body in self._read():
            ahead = np.where(body["last"] >= now, np.maximum(body["first"] - now, 0), np.inf)
            low, high = (np.searchsorted(body["name"], wanted, side=side) for side in ("left", "right"))
            # The least of each run of records of one name; one more, as a run may begin at the end.
            least = np.minimum.reduceat(np.append(ahead, np.inf), np.stack((low, high), axis=1).ravel())[::2]
            until = np.where(high > low, np.minimum(until, least), until)
        return until

    def need_more(self, num_bytes: int, steps: float) -> bool:
        """Whether the shards that some process needs in fewer steps than that have more bytes."""
        ahead = [np.empty(0, dtype=_RECORD)]
        for now, body in self._read():
            needed = body[(body["last"] >= now) & (body["first"] - now < steps)]
            is_new = np.ones(len(needed), dtype=bool)
            is_new[1:] = needed["name"][1:] != needed["name"][:-1]  # they are sorted by name
            ahead.append(needed[is_new])
            if ahead[-1]["bytes"].sum() > num_bytes:
                return True
        records = np.concatenate(ahead)
        _, which = np.unique(records["name"], return_index=True)  # ranks need the same ones
        return bool(records["bytes"][which].sum() > num_bytes)

    def _read(self) -> list[tuple[int, NDArray[np.void]]]:
        """Where each process stands, and its plan's records."""
        found: list[tuple[int, NDArray[np.void]]] = []
        bodies: dict[str, NDArray[np.void]] = {}
        for path in self._directory.glob("*.plan"):
            if remove_if_dead(path):
                continue
            try:
                with open(path, "rb") as file:
                    now = int.from_bytes(file.read(_HEAD_BYTES), "little")
                    body = self._bodies.get(path.name)
                    bodies[path.name] = np.frombuffer(file.read(), dtype=_RECORD) if body is None else body
            except (FileNotFoundError, PermissionError):
                continue  # closed just now, or another user's
            found.append((now, bodies[path.name]))
        self._bodies = bodies
        return found


def remove_if_dead(path: Path) -> bool:
    """Remove a file that nobody holds a lock of: its owner is gone, or nobody reads it.

    Returns:
        Whether it is gone. Another user's that may not be opened or removed is theirs to remove.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(fd, path):  # else the name is another file's by now
            path.unlink(missing_ok=True)
            return True
        return False
    except (BlockingIOError, PermissionError):
        return False
    finally:
        os.close(fd)


def is_at(fd: int, path: Path) -> bool:
    """Whether a descriptor's file still has that name."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
