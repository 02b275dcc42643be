"""Which shards the processes of a node will need, and when; the cache evicts and prefetches by this.

Each reading process keeps a plan in the cache folder: its current step and, for every shard it will read, the first
and last step that needs it. Any process can thus compute how far off the next use of a shard is across all of them.
A process locks its plan for as long as it lives. A plan that can be locked is stale and is removed. A process keeps
one plan per reader. Shards that a reader will need again at an unknown time are planned :data:`FAR` steps ahead:
later than anything scheduled, but sooner than shards that are not needed at all. Cost: 56 bytes per shard and
process. Advancing is one 8-byte write; other processes' plans are read once, then only their first 8 bytes.
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

from disttrain.data.order.sample_order import Needs

FAR: Final = 2**62
"""Steps until the next use of a shard that will be needed again at an unknown step."""

_RECORD: Final = np.dtype([("name", "S32"), ("first", "<i8"), ("last", "<i8"), ("bytes", "<i8")])
_HEAD_BYTES: Final = 8


class Plan:
    """A plan of this process, active until closed.

    Args:
        directory: the cache folder.
        names: file names of the shards, by number.
        needs: which shards are needed, and when.
        step: current step of the process.
        sizes: bytes of the shards, by number; if empty, they count as 0.

    Raises:
        OSError: the plan cannot be written; no partial file remains.
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
            os.replace(temporary, self.path)  # other processes never see it unlocked or incomplete
        except OSError:
            temporary.unlink(missing_ok=True)
            os.close(self._fd)
            raise

    def stand_at(self, step: int) -> None:
        """Publish this process's current step."""
        if self._fd >= 0 and step != self.step:
            self.step = step
            os.pwrite(self._fd, step.to_bytes(_HEAD_BYTES, "little"), 0)

    def close(self) -> None:
        """Withdraw the plan."""
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
        """Return the steps until any process needs each shard: 0 if needed now, infinity if never."""
        wanted = np.array(names, dtype="S32")
        until = np.full(len(names), np.inf)
        for now, body in self._read():
            ahead = np.where(body["last"] >= now, np.maximum(body["first"] - now, 0), np.inf)
            low, high = (np.searchsorted(body["name"], wanted, side=side) for side in ("left", "right"))
            # Minimum over each run of records with the same name. The extra inf lets a run start at the end.
            least = np.minimum.reduceat(np.append(ahead, np.inf), np.stack((low, high), axis=1).ravel())[::2]
            until = np.where(high > low, np.minimum(until, least), until)
        return until

    def need_more(self, num_bytes: int, steps: float) -> bool:
        """Return whether the shards that any process needs within ``steps`` steps exceed ``num_bytes`` in total."""
        ahead = [np.empty(0, dtype=_RECORD)]
        for now, body in self._read():
            needed = body[(body["last"] >= now) & (body["first"] - now < steps)]
            is_new = np.ones(len(needed), dtype=bool)
            is_new[1:] = needed["name"][1:] != needed["name"][:-1]  # records are sorted by name
            ahead.append(needed[is_new])
            if ahead[-1]["bytes"].sum() > num_bytes:
                return True
        records = np.concatenate(ahead)
        _, which = np.unique(records["name"], return_index=True)  # ranks may need the same shards
        return bool(records["bytes"][which].sum() > num_bytes)

    def _read(self) -> list[tuple[int, NDArray[np.void]]]:
        """Return the current step and the plan records of each plan."""
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
                continue  # just closed, or owned by another user
            found.append((now, bodies[path.name]))
        self._bodies = bodies
        return found


def remove_if_dead(path: Path) -> bool:
    """Remove a file if no process holds a lock on it, which means that its owner has died or its readers are done.

    Returns:
        Whether it is gone. A file of another user that cannot be opened or removed is kept.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(fd, path):  # otherwise the path already belongs to a newer file
            path.unlink(missing_ok=True)
            return True
        return False
    except (BlockingIOError, PermissionError):
        return False
    finally:
        os.close(fd)


def is_at(fd: int, path: Path) -> bool:
    """Return whether a path still refers to a descriptor's file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
