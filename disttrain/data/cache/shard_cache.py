"""A cache of whole remote shards on a node's disk, shared by its ranks and bounded in bytes.

A rank downloads a shard under a temporary name and locks that file, so other ranks wait instead of downloading it too.
Size and checksum are verified before the shard gets its final name, so every shard in the cache is complete. The
checksum comes from the manifest, or else from the server (see :mod:`disttrain.data.remote.requests`). To detect later
writes, the modification time of each copy is set to a fixed value derived from its name; every open checks it and the
size, without hashing again, and a modified copy is downloaded again. The cache has a private folder, writable only by
this user, and removes only files that it made. Space is reserved before a download. Eviction follows the plans of the
node's processes (see :mod:`disttrain.data.cache.eviction`): shards that no process needs go first, then those needed
latest. A shard being read holds a shared lock and is never evicted. Leftovers of killed processes are removed by the
next process that needs room. Cost: a handful of system calls to open a shard; one folder listing to evict.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Final

import numpy as np

from disttrain.data.cache.eviction import Plans, is_at, remove_if_dead
from disttrain.data.index.remote_index import cache_home, cache_name, private_folder
from disttrain.data.index.shard_index import Shard
from disttrain.data.remote.ranges import RemoteFile, RetryConfig, shown
from disttrain.errors import ConfigError, DataError, ShardError

_CHUNK_BYTES: Final = 8 * 2**20
_POLL_SECONDS: Final = 0.02
_GIB: Final = 2**30
_TAG: Final = "CACHEDIR.TAG"
# https://bford.info/cachedir/: backup tools skip a folder with this tag.
_TAG_TEXT: Final = "Signature: 8a477f597d28d172789f06886806bc55\n# Remote shards, kept by disttrain. May be deleted.\n"
_LOCK: Final = "space.lock"
_OWN: Final = re.compile(r"[0-9a-f]{32}\.(tar|part)|\d+-[0-9a-f]{8}\.(plan|new)|\.nfs.*")
# NFS renames a file that is removed while open to .nfs*.


@dataclass(frozen=True)
class CacheConfig:
    """Cache of remote shards. No setting changes which samples are read.

    Attributes:
        directory: a folder on the node's local disk; by default ``$DISTTRAIN_CACHE`` (``~/.cache/disttrain``). Shards
            go to its subfolder ``disttrain-shards-UID``, which only the cache may use.
        max_gib: size limit in GiB. The shards that the windows of a node's lanes span should fit; a smaller cache is
            correct but downloads shards repeatedly.
        prefetch_threads: parallel prefetch downloads per rank; 0 downloads each shard when it is read.
        retry: how long to retry a server, for shards and for their index.
    """

    directory: str = ""
    max_gib: float = 64.0
    prefetch_threads: int = 2
    retry: RetryConfig = field(default_factory=RetryConfig)

    def __post_init__(self) -> None:
        if not self.max_gib > 0:
            raise ConfigError(f"cache.max_gib is {self.max_gib}", hint="use more than 0 (GiB)")
        if self.prefetch_threads < 0:
            raise ConfigError(f"cache.prefetch_threads is {self.prefetch_threads}", hint="use 0 or more")

    @property
    def max_bytes(self) -> int:
        """Size limit of the cache."""
        return round(self.max_gib * _GIB)

    @property
    def path(self) -> Path:
        """The private folder that holds the shards."""
        return (
            Path(self.directory).expanduser() if self.directory else cache_home()
        ) / f"disttrain-shards-{os.geteuid()}"


class ShardCache:
    """Local copies of remote shards. Safe to use from several threads and processes.

    Args:
        config: location and size limit.
        sleep: called to wait for room.

    Raises:
        DataError: the folder cannot be created or written, is accessible to other users, or holds foreign files.
    """

    def __init__(self, config: CacheConfig, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.config, self._sleep = config, sleep
        self.directory = config.path
        try:
            private_folder(self.directory)
            os.close(self._create(_LOCK))  # proves that the folder is writable
            (self.directory / _TAG).write_text(_TAG_TEXT)
        except OSError as error:
            raise DataError(
                f"the cache folder {error.filename or self.directory} cannot be created or written: {error.strerror}",
                hint="set data.cache.directory to a writable folder",
            ) from None
        foreign = [
            name for name in os.listdir(self.directory) if name not in (_LOCK, _TAG) and not _OWN.fullmatch(name)
        ]
        if foreign:
            raise DataError(
                f"the cache folder {self.directory} holds {min(foreign)!r}, which the cache did not create",
                hint="move it elsewhere, or set data.cache.directory to another folder",
            )
        self._plans, self._lock = Plans(self.directory), Lock()

    def holds(self, shard: Shard) -> bool:
        """Return whether a shard is in the cache now."""
        return self._place(shard).exists()

    def open(self, shard: Shard) -> int:
        """Open a shard's local copy, downloading it if needed.

        Returns:
            A file descriptor; the shard cannot be evicted until it is closed.

        Raises:
            RemoteError: the shard cannot be downloaded.
            ShardError: it does not match the index.
            DataError: there is no room for it.
        """
        with self._disk(shard):
            while True:
                fd = self._opened(shard)
                if fd is None:
                    fd = self._fetch(shard, None)
                if fd is not None:
                    return fd

    def prefetch(self, shard: Shard, steps: float) -> bool:
        """Download a shard needed in ``steps`` steps, unless that would evict one needed as soon.

        Also skipped while the shards needed before it would fill the cache, since it would be evicted again.

        Returns:
            Whether the shard is in the cache, or was when another process downloaded it; False if there is no room yet.
        """
        if self.holds(shard):
            return True
        if self._plans.need_more(self.config.max_bytes - shard.size_bytes, steps):
            return False
        fd = self._fetch(shard, steps)
        if fd is not None:
            os.close(fd)
        return fd is not None or self.holds(shard)

    def _place(self, shard: Shard) -> Path:
        return self.directory / f"{name_of(shard)}.tar"

    def _opened(self, shard: Shard) -> int | None:
        place = self._place(shard)
        try:
            fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        status = os.fstat(fd)
        if status.st_nlink and status.st_size == shard.size_bytes and status.st_mtime_ns == _stamp_ns(place):
            os.utime(fd, ns=(time.time_ns(), status.st_mtime_ns))  # eviction sorts by access time
            return fd
        if status.st_nlink:  # modified by something other than a cache
            place.unlink(missing_ok=True)
        os.close(fd)
        return None

    def _fetch(self, shard: Shard, steps: float | None) -> int | None:
        """Download a shard, or wait for the process that does; None if that failed or ``steps`` leaves no room yet."""
        part = self.directory / f"{name_of(shard)}.part"
        fd = self._create(part.name)
        is_mine = False
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # A shared lock: wait for the download to end without blocking other readers.
                fcntl.flock(fd, fcntl.LOCK_SH)
                kept, fd = (fd, -1) if is_at(fd, self._place(shard)) else (None, fd)
                return kept
            is_mine = is_at(fd, part)
            if not is_mine or self.holds(shard) or not self._reserve(fd, shard, steps):
                return None
            self._download(fd, shard)
            os.utime(fd, ns=(time.time_ns(), _stamp_ns(part)))
            with self._alone():  # otherwise a process counting bytes might see it under neither name
                os.replace(part, self._place(shard))
            is_mine = False
            # The reader gets the same descriptor, still locked, so the shard cannot be evicted before it is used.
            fcntl.flock(fd, fcntl.LOCK_SH)
            kept, fd = fd, -1
            return kept
        finally:
            if is_mine:
                part.unlink(missing_ok=True)
            if fd >= 0:
                os.close(fd)

    def _reserve(self, fd: int, shard: Shard, steps: float | None) -> bool:
        """Make room and reserve it; if ``steps`` is None, wait for room."""
        deadline = time.monotonic() + self.config.retry.budget_seconds
        while True:
            with self._alone():
                if self._make_room(shard.size_bytes, steps):
                    os.posix_fallocate(fd, 0, shard.size_bytes)
                    return True
            if steps is not None:
                return False
            if time.monotonic() > deadline:
                raise DataError(
                    f"the cache {self.directory} has had no room for {shown(shard.path)} for"
                    f" {self.config.retry.budget_seconds:.0f} s: everything in it is being read or fetched",
                    hint=f"raise data.cache.max_gib above {self.config.max_gib:g}",
                )
            self._sleep(_POLL_SECONDS)  # readers hold their locks for milliseconds

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one thread of one process on the node count bytes at a time."""
        with self._lock, open(self._create(_LOCK), "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _create(self, name: str) -> int:
        """Open a file of the cache, creating it if needed; never follow a symlink."""
        return os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def _make_room(self, needed_bytes: int, steps: float | None) -> bool:
        """Evict until ``needed_bytes`` are free; with ``steps``, only shards that are needed later than that."""
        used, held = 0, []
        for entry in os.scandir(self.directory):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue  # a failed download, removed by its process
            if entry.name.endswith(".part") and not remove_if_dead(Path(entry.path)):
                used += status.st_size
            elif entry.name.endswith(".tar"):
                used += status.st_size
                held.append((Path(entry.path), status.st_size, status.st_atime_ns))
        excess = used + needed_bytes - self.config.max_bytes
        if excess <= 0:
            return True
        until = self._plans.steps_until([path.stem for path, _, _ in held])
        # Evict the shard needed latest. Among shards that no process needs, evict the least recently used. Among those
        # needed in the same step, evict the most recently used: windows are read cyclically, so LRU would always miss.
        ages = np.array(
            [-when if np.isfinite(steps_) else when for (_, _, when), steps_ in zip(held, until, strict=True)]
        )
        for victim in np.lexsort((ages, -until)).tolist():
            if steps is not None and until[victim] <= steps:
                return False
            path, size, _ = held[victim]
            if remove_if_dead(path):  # no process is reading it
                excess -= size
                if excess <= 0:
                    return True
        return False

    def _download(self, fd: int, shard: Shard) -> None:
        remote = RemoteFile(shard.path, self.config.retry)
        replaced = shard.version and remote.version and shard.version != remote.version
        if remote.size != shard.size_bytes or replaced:
            raise ShardError(
                f"shard {remote.name} has {remote.size} bytes, but the index says {shard.size_bytes}"
                + (" and the version differs" if replaced else ""),
                hint="it was replaced: rerun to index it again, and rewrite its manifest if it has one",
            )
        whose = "its manifest" if shard.md5 else "the server"
        algorithm, expected = ("md5", shard.md5) if shard.md5 else remote.checksum
        digest = hashlib.new(algorithm or "md5", usedforsecurity=False)
        for offset in range(0, remote.size, _CHUNK_BYTES):
            chunk = memoryview(remote.read(offset, _CHUNK_BYTES))
            if expected:
                digest.update(chunk)
            while chunk:
                written = os.pwrite(fd, chunk, offset)
                chunk, offset = chunk[written:], offset + written  # noqa: PLW2901
        if not shard.md5:
            remote.confirm()
        if expected and digest.hexdigest() != expected:
            raise ShardError(
                f"shard {remote.name} has {algorithm.upper()} {digest.hexdigest()}, but {whose} says {expected}",
                hint="upload the shard again, or rewrite its manifest with `disttrain shards index --md5`; a proxy"
                " may also be serving an old copy",
            )
        # After a power loss the node must not find a shard with the right size but full of zeros.
        os.fdatasync(fd)

    @contextmanager
    def _disk(self, shard: Shard) -> Iterator[None]:
        """Turn an OSError about the folder into a DataError."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "is on a full disk" if full else f"cannot be read or written: {error.strerror}"
            raise DataError(
                f"the cache folder {self.directory} {what}; shard {shown(shard.path)} of {shard.size_bytes} bytes"
                " was not fetched",
                hint="free space, lower data.cache.max_gib, or set data.cache.directory to another disk",
            ) from None


def _stamp_ns(place: Path) -> int:
    """Derive the modification time of an unmodified copy from its name: an even second in the years 2001 to 2018.

    Even, because FAT stores times in steps of two seconds.
    """
    return (10**9 + 2 * int(place.name[:7], 16)) * 10**9


def name_of(shard: Shard) -> str:
    """Return the cache's name for a shard in the version that the index records."""
    return cache_name(shard.path, shard.size_bytes, shard.version or shard.md5)
