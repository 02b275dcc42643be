"""Read local shards without system calls: map the files into memory and gather bytes by address.

For small samples, one system call per sample would be most of the cost of reading. Shards on local file systems are
therefore mapped, and NumPy gathers a batch's bytes from all shards at once, with the GIL released. While the data is
not in the page cache (detected by the time it takes to touch it), a read first asks the kernel for all its pages, so
that the disk serves many requests in parallel, and waits for them without the GIL.

If a mapped file is truncated or its disk fails, access ends the process with SIGBUS where a read would return an error.
The size is therefore checked before each use, so that only a file that is cut off during a read does so; faulthandler
then prints "Bus error" and this module's place in the stack, and ``disttrain launch`` explains it. Files on network
file systems, where this can happen at any time, are not mapped. Cost: one descriptor per shard; from the page cache,
half of a ``pread``.
"""

from __future__ import annotations

import errno
import faulthandler
import mmap
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from disttrain.data.index.shard_index import Shard
from disttrain.data.index.tar import open_hint
from disttrain.data.reader.open_shards import OPEN_SHARDS
from disttrain.errors import ShardError

_LOCAL_FILE_SYSTEMS: Final = frozenset(
    {
        "ext2",
        "ext3",
        "ext4",
        "xfs",
        "btrfs",
        "zfs",
        "f2fs",
        "bcachefs",
        "tmpfs",
        "ramfs",
        "overlay",
        "squashfs",
        "erofs",
    }
)
_COLD_SECONDS: Final = 5e-6  # per span; touching one takes 0.1 microseconds in memory, 50 from disk
_PAGE: Final = mmap.PAGESIZE

Spans = tuple[NDArray[np.uint8], NDArray[np.int64]]


class _Space:
    """A range of this process's memory as an array; keeps its mappings alive."""

    def __init__(self, low: int, size: int, maps: Sequence[mmap.mmap]) -> None:
        self.__array_interface__ = {"data": (low, True), "shape": (size,), "typestr": "|u1", "version": 3}
        self._maps = maps


@dataclass(frozen=True, eq=False, slots=True)
class _Mapped:
    """A shard in memory: the mapping, and where it begins."""

    file: mmap.mmap
    address: int


class MappedShards:
    """The local shards of an index, mapped on demand. Thread-safe.

    Args:
        shards: the shards of the index.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._owner = OPEN_SHARDS.owner(self, len(shards))
        self._lock = Lock()  # held while mapping, so that each shard is mapped only once
        self._is_cold = False

    def spans(
        self,
        shards: Sequence[tuple[int, slice]],
        offsets: NDArray[np.int64],
        sizes: NDArray[np.int64],
    ) -> Spans | None:
        """Locate spans of bytes in memory; arguments and errors as in
        :meth:`disttrain.data.reader.pread.ShardFiles.read`.

        Args:
            shards: each shard and its range of rows.
            offsets: offsets of the spans in their shards. shape (rows, columns)
            sizes: sizes of the spans in bytes. shape (rows, columns)

        Returns:
            One array over the memory that holds all spans, most of which must not be touched, and where in it each
            span begins; None if a shard cannot be mapped, or too many would be open at once.
        """
        if 2 * len(shards) > OPEN_SHARDS.most:  # leave descriptors for other threads
            return None
        ends = offsets + sizes
        at, maps = np.empty_like(offsets), []
        low, high = np.iinfo(np.int64).max, 0
        for shard, here in shards:
            entry = self._map(shard)
            if entry is None:
                return None
            found, address = entry.file, entry.address
            self._check(shard, found, int(ends[here].max()))
            at[here] = offsets[here] + address
            maps.append(found)
            low, high = min(low, address), max(high, address + len(found))
        space = np.asarray(_Space(low, high - low, maps))
        at -= low
        self._fetch(shards, maps, space, at, offsets, sizes)
        return space, at

    def _fetch(
        self,
        shards: Sequence[tuple[int, slice]],
        maps: Sequence[mmap.mmap],
        space: NDArray[np.uint8],
        at: NDArray[np.int64],
        offsets: NDArray[np.int64],
        sizes: NDArray[np.int64],
    ) -> None:
        """Load the spans into the page cache; the time this takes predicts whether the next read is cold."""
        started = time.perf_counter()
        held = sizes > 0
        if self._is_cold:
            for (_, here), found in zip(shards, maps, strict=True):
                for offset, size in zip(offsets[here].ravel().tolist(), sizes[here].ravel().tolist(), strict=True):
                    if size:
                        begin = offset // _PAGE * _PAGE
                        found.madvise(mmap.MADV_WILLNEED, begin, offset + size - begin)
            for page in range(0, int(sizes.max(initial=0)), _PAGE):
                space[at[sizes > page] + page]
        space[at[held]]
        self._is_cold = time.perf_counter() - started > _COLD_SECONDS * at.size

    def _may_be_mapped(self, shard: int) -> bool:
        entry = self._shards[shard]
        return not entry.is_remote and is_on_local_disk(os.path.dirname(entry.path))

    def _map(self, shard: int) -> _Mapped | None:
        """Return a mapping; None if the shard may not be mapped."""
        found: _Mapped | None = OPEN_SHARDS.get(self._owner, shard)
        if found is not None:
            return found
        with self._lock:
            found = OPEN_SHARDS.get(self._owner, shard)
            if found is not None:
                return found
            if not self._may_be_mapped(shard) or not OPEN_SHARDS.has_room():
                return None
            mapped = self._opened(self._shards[shard].path)
            if mapped is None:
                return None
            if not faulthandler.is_enabled():
                with suppress(OSError, ValueError, RuntimeError, AttributeError):  # no standard error, or not a file
                    faulthandler.enable()
            mapped.madvise(mmap.MADV_RANDOM)  # a page fault loads one page, without readahead
            view: NDArray[Any] = np.frombuffer(mapped, np.uint8)
            entry = _Mapped(mapped, int(view.__array_interface__["data"][0]))
            return OPEN_SHARDS.keep(self._owner, shard, entry, holder=mapped)

    @staticmethod
    def _opened(path: str) -> mmap.mmap | None:
        """Map a file; None if the process has reached the kernel's limit of mappings."""

        def map_it() -> mmap.mmap:
            with open(path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

        try:
            return OPEN_SHARDS.trying(map_it)
        except ValueError:
            raise ends_early(path, 0) from None
        except OSError as error:
            if error.errno == errno.ENOMEM:  # vm.max_map_count
                return None
            raise cannot_open(path, error) from None

    def _check(self, shard: int, found: mmap.mmap, end: int) -> None:
        size = min(found.size(), len(found))
        if size < end:
            raise ends_early(self._shards[shard].path, size)


def ends_early(path: str, offset: int) -> ShardError:
    """Return the error for a shard that was truncated after it was indexed."""
    return ShardError(
        f"shard {path} ends at byte {offset}, before a sample that its index lists",
        hint="restore the shard and run `disttrain shards index` again",
    )


def cannot_open(path: str, error: OSError) -> ShardError:
    """Return the error for a shard that has disappeared or is not readable."""
    return ShardError(
        f"cannot open shard {path}: {error.strerror}",
        hint=open_hint(error, "restore it; it existed when the run started"),
    )


@cache
def is_on_local_disk(folder: str) -> bool:
    """Return whether a folder is on a local file system, according to Linux's mount table."""
    real = os.path.realpath(folder)
    found = ("", "")
    for mount_point, kind in _mounts():
        inside = real == mount_point or real.startswith(mount_point.rstrip("/") + "/")
        if inside and len(mount_point) >= len(found[0]):
            found = mount_point, kind
    return found[1] in _LOCAL_FILE_SYSTEMS


@cache
def _mounts() -> tuple[tuple[str, str], ...]:
    """Return mount points with their file system types; empty if the system does not list them."""
    try:
        with open("/proc/self/mountinfo") as file:
            lines = [line.split() for line in file]
    except OSError:
        return ()
    # man 5 proc: the mount point is the fifth field, with spaces as octal escapes; the type follows a dash.
    return tuple((fields[4].replace("\\040", " "), fields[fields.index("-") + 1]) for fields in lines)
