"""A cache of whole remote shards on a node's disk, shared by its ranks and bounded in bytes.

A shard is downloaded under a temporary name that its downloader locks, so that the other ranks wait for it instead of
fetching it too; its length and its checksum are compared before it gets its name, so whatever is in the cache is
whole. The checksum is the manifest's, else the one that the server gives (see :mod:`disttrain.data.transport`). A
copy that was written to since is fetched again: its modification time is set to a value of its own, which no later
write leaves, and is looked at with its size each time it is opened; its bytes are not hashed again. The cache is a
folder of its own that only this user can write, and removes only what it made. Space is reserved before a download.
Eviction follows the plans of the processes (see :mod:`disttrain.data.plan`): what nobody needs goes first, then what
is needed last; a shard that somebody is reading holds a shared lock and stays. What a killed process left is removed
by the next one that needs room. Cost: a handful of system calls to open a shard; a listing of the folder to evict.
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

from disttrain.data.index import Shard
from disttrain.data.plan import Plans, is_at, remove_if_dead
from disttrain.data.remote import RemoteFile, RetryConfig, shown
from disttrain.data.remote_index import cache_home, cache_name, private_folder
from disttrain.errors import ConfigError, DataError, ShardError

_CHUNK_BYTES: Final = 8 * 2**20
_POLL_SECONDS: Final = 0.02
_GIB: Final = 2**30
_TAG: Final = "CACHEDIR.TAG"
# https://bford.info/cachedir/: backups pass over such a folder.
_TAG_TEXT: Final = "Signature: 8a477f597d28d172789f06886806bc55\n# Remote shards, kept by disttrain. May be deleted.\n"
_LOCK: Final = "space.lock"
_OWN: Final = re.compile(r"[0-9a-f]{32}\.(tar|part)|\d+-[0-9a-f]{8}\.(plan|new)|\.nfs.*")
# NFS keeps a file that was removed while it was open under a name that begins with .nfs.


@dataclass(frozen=True)
class CacheConfig:
    """Where remote shards are kept. None of it changes what is read.

    Attributes:
        directory: a folder on the node's own disk; by default ``$DISTTRAIN_CACHE`` (``~/.cache/disttrain``). Shards
            are kept in a sub-folder ``disttrain-shards-UID`` of it, which belongs to the cache alone.
        max_gib: bound on its size, in GiB. What the windows of a node's lanes span should fit: less is
            correct, but fetches shards again and again.
        prefetch_threads: downloads ahead of the reading, for each rank; 0 fetches a shard when it is read.
        retry: how long a server is tried, for shards and for their index.
    """

    directory: str = ""
    max_gib: float = 64.0
    prefetch_threads: int = 2
    retry: RetryConfig = field(default_factory=RetryConfig)

    def __post_init__(self) -> None:
        if not self.max_gib > 0:
            raise ConfigError(f"cache.max_gib is {self.max_gib}", mend="use more than 0 (GiB)")
        if self.prefetch_threads < 0:
            raise ConfigError(f"cache.prefetch_threads is {self.prefetch_threads}", mend="use 0 or more")

    @property
    def max_bytes(self) -> int:
        """Bound on the cache's size."""
        return round(self.max_gib * _GIB)

    @property
    def path(self) -> Path:
        """The folder in force, where nothing else lies."""
        return (
            Path(self.directory).expanduser() if self.directory else cache_home()
        ) / f"disttrain-shards-{os.geteuid()}"


class ShardCache:
    """Local copies of remote shards. Safe to use from several threads and processes.

    Args:
        config: where they lie and how many bytes they may take.
        sleep: waits for room.

    Raises:
        DataError: the folder cannot be made or written, is open to other users, or holds files of others.
    """

    def __init__(self, config: CacheConfig, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.config, self._sleep = config, sleep
        self.directory = config.path
        try:
            private_folder(self.directory)
            os.close(self._create(_LOCK))  # it can be written
            (self.directory / _TAG).write_text(_TAG_TEXT)
        except OSError as error:
            raise DataError(
                f"the cache folder {error.filename or self.directory} cannot be made or written: {error.strerror}",
                mend="set data.cache.directory to a folder that can be written",
            ) from None
        foreign = [
            name for name in os.listdir(self.directory) if name not in (_LOCK, _TAG) and not _OWN.fullmatch(name)
        ]
        if foreign:
            raise DataError(
                f"the cache folder {self.directory} holds {min(foreign)!r}, which the cache did not make",
                mend="move it elsewhere, or set data.cache.directory to another folder",
            )
        self._plans, self._lock = Plans(self.directory), Lock()

    def holds(self, shard: Shard) -> bool:
        """Whether a shard is here now."""
        return self._place(shard).exists()

    def open(self, shard: Shard) -> int:
        """A descriptor of a shard's local copy, fetched if need be; it cannot be evicted until that is closed.

        Raises:
            RemoteError: the shard cannot be fetched.
            ShardError: it is not what the index says.
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
        """Fetch a shard that is needed in so many steps, if that evicts none that is needed as soon.

        It is also left for later where all that is needed before it would fill the cache: it would be evicted again.

        Returns:
            Whether it is here, or was when another fetched it; False where there is no room yet.
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
            os.utime(fd, ns=(time.time_ns(), status.st_mtime_ns))  # what is evicted goes by the time of its last use
            return fd
        if status.st_nlink:  # changed by something else than a cache
            place.unlink(missing_ok=True)
        os.close(fd)
        return None

    def _fetch(self, shard: Shard, steps: float | None) -> int | None:
        """Download a shard, or wait for whoever does; None where that failed, or (with ``steps``) lacks room yet."""
        part = self.directory / f"{name_of(shard)}.part"
        fd = self._create(part.name)
        is_mine = False
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # Shared with whoever fetches it and then reads it: no reader holds up another.
                fcntl.flock(fd, fcntl.LOCK_SH)
                kept, fd = (fd, -1) if is_at(fd, self._place(shard)) else (None, fd)
                return kept
            is_mine = is_at(fd, part)
            if not is_mine or self.holds(shard) or not self._reserve(fd, shard, steps):
                return None
            self._download(fd, shard)
            os.utime(fd, ns=(time.time_ns(), _stamp_ns(part)))
            with self._alone():  # or whoever counts bytes might see it under neither name
                os.replace(part, self._place(shard))
            is_mine = False
            # The same descriptor becomes the reader's: nobody evicts the shard before it was of use.
            fcntl.flock(fd, fcntl.LOCK_SH)
            kept, fd = fd, -1
            return kept
        finally:
            if is_mine:
                part.unlink(missing_ok=True)
            if fd >= 0:
                os.close(fd)

    def _reserve(self, fd: int, shard: Shard, steps: float | None) -> bool:
        """Make room and take it; without ``steps``, wait for it."""
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
                    mend=f"raise data.cache.max_gib above {self.config.max_gib:g}",
                )
            self._sleep(_POLL_SECONDS)  # others read for milliseconds at a time

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process and thread of the node at a time: whoever counts bytes."""
        with self._lock, open(self._create(_LOCK), "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _create(self, name: str) -> int:
        """A descriptor of a file of the cache, made if need be; never what a link names."""
        return os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def _make_room(self, needed_bytes: int, steps: float | None) -> bool:
        """Evict until so many bytes are free; with ``steps``, only shards that are needed later than that."""
        used, held = 0, []
        for entry in os.scandir(self.directory):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue  # a download that failed
            if entry.name.endswith(".part") and not remove_if_dead(Path(entry.path)):
                used += status.st_size
            elif entry.name.endswith(".tar"):
                used += status.st_size
                held.append((Path(entry.path), status.st_size, status.st_atime_ns))
        excess = used + needed_bytes - self.config.max_bytes
        if excess <= 0:
            return True
        until = self._plans.steps_until([path.stem for path, _, _ in held])
        # Last needed first. What nobody needs goes by age. Of what is needed in the same step the last used goes:
        # windows are read round and round, and keeping the newest would miss each time.
        ages = np.array(
            [-when if np.isfinite(steps_) else when for (_, _, when), steps_ in zip(held, until, strict=True)]
        )
        for victim in np.lexsort((ages, -until)).tolist():
            if steps is not None and until[victim] <= steps:
                return False
            path, size, _ = held[victim]
            if remove_if_dead(path):  # nobody reads it
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
                + (" and another version" if replaced else ""),
                mend="it was replaced: start again to index it anew, and write its manifest anew if it has one",
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
                mend="upload the shard again, or write its manifest anew with `disttrain shards index --md5`; a proxy"
                " may also serve an old copy",
            )
        # A node that loses power must not find a shard of the right length full of zeros.
        os.fdatasync(fd)

    @contextmanager
    def _disk(self, shard: Shard) -> Iterator[None]:
        """What the operating system says of the folder, in words."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "is on a full disk" if full else f"cannot be read or written: {error.strerror}"
            raise DataError(
                f"the cache folder {self.directory} {what}; shard {shown(shard.path)} of {shard.size_bytes} bytes"
                " was not fetched",
                mend="free space, lower data.cache.max_gib, or set data.cache.directory to another disk",
            ) from None


def _stamp_ns(place: Path) -> int:
    """The modification time of an untouched copy, by its name: even seconds of the years 2001 to 2018.

    Even, since FAT keeps no odd ones.
    """
    return (10**9 + 2 * int(place.name[:7], 16)) * 10**9


def name_of(shard: Shard) -> str:
    """What the cache calls a shard in the state that the index knows."""
    return cache_name(shard.path, shard.size_bytes, shard.version or shard.md5)
