"""Tables of remote shards, from a sidecar next to the shard or from ranged reads of its headers.

Tables are cached in a local folder (``disttrain-index-UID`` in ``$DISTTRAIN_CACHE``, by default
``~/.cache/disttrain``) under a name derived from URL, size and version, so a changed shard is read again and an
unchanged one is not. A remote sidecar has no date to trust it by. Its members must form a valid tar layout, and the
first, middle and last of them must match the shard. The same check applies to a cached table if its shard has no
known version. Cost: one request for a cached table, five for a sidecar, else one per MiB of shard.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from disttrain.data.index.sidecar import (
    ALL_READ,
    ShardTable,
    UnreadFields,
    build_table,
    misfit,
    parse_sidecar,
    sidecar_text,
)
from disttrain.data.index.stream import Stream
from disttrain.data.remote.ranges import DEFAULT_RETRY, RemoteError, RemoteFile, RetryConfig, sibling
from disttrain.system.files import write_atomically

_MOST_TEXT_BYTES: Final = 2**30
REQUESTS_AT_ONCE: Final = 16
"""Threads for concurrent requests to a server."""


def cache_home() -> Path:
    """Return the cache folder: ``$DISTTRAIN_CACHE``, or ``~/.cache/disttrain``."""
    return Path(os.environ.get("DISTTRAIN_CACHE") or "~/.cache/disttrain").expanduser()


def index_folder() -> Path:
    """Return the folder for tables and MD5s of remote shards: private to this user, even in a shared cache folder."""
    return cache_home() / f"disttrain-index-{os.geteuid()}"


def private_folder(path: Path) -> Path:
    """Create a folder that only this user can write to, or check an existing one.

    Its contents can then be trusted, since no other user can plant a file or a link there. The path may be a symbolic
    link if this user owns it.

    Raises:
        OSError: it cannot be created, belongs to another user, or is writable by others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(20, "it is not a folder", str(path))
    if {status.st_uid, path.lstat().st_uid} != {os.geteuid()}:
        raise PermissionError(1, "it belongs to another user", str(path))
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(1, "other users can write to it", str(path))
    return path


def cache_name(url: str, size: int, version: str) -> str:
    """Return a file name for one version of a remote file."""
    return hashlib.sha256(f"{url}\n{size}\n{version}".encode("utf-8", "surrogateescape")).hexdigest()[:32]


class RemoteShard(NamedTuple):
    """A remote shard: its samples, bytes and version, and the state of its cached table.

    ``state`` is ``unchanged`` if the table was cached, ``written`` if it was read and is cached now, and ``not
    writable`` if it was read but could not be cached.
    """

    num_samples: int
    size_bytes: int
    version: str
    state: str
    unread: UnreadFields = ALL_READ


def describe_remote(url: str, *, anew: bool = False, retry: RetryConfig = DEFAULT_RETRY) -> RemoteShard:
    """Return samples, bytes and version of a remote shard.

    Args:
        url: its URL.
        anew: read its headers even if its table is cached.
        retry: retry policy.

    Raises:
        RemoteError: it cannot be read; status 404 if it is missing.
        ShardError: its tar is damaged or holds no samples.
    """
    file = RemoteFile(url, retry)
    table, state = _table_of(file, file.version, anew=anew)
    return RemoteShard(len(table), file.size, file.version, state, table.unread)


def load_remote_table(
    url: str, size: int, *, version: str = "", md5: str = "", retry: RetryConfig = DEFAULT_RETRY
) -> ShardTable:
    """Return a remote shard's table in the version that size and version (or MD5) identify; raises like the above."""
    return _table_of(RemoteFile(url, retry, size=size, version=version), version or md5)[0]


def read_remote_text(url: str, retry: RetryConfig = DEFAULT_RETRY) -> str:
    """Return the text of a remote file."""
    file = RemoteFile(url, retry)
    if file.size > _MOST_TEXT_BYTES:
        raise RemoteError(
            f"{file.name} has {file.size} bytes, too many for a list", hint="name a manifest or a sidecar"
        )
    return file.read(0, file.size).decode("utf-8", "surrogateescape")


def sidecar_url(url: str) -> str:
    """Return the URL of a remote shard's sidecar."""
    return sibling(url, f"{PurePosixPath(urlsplit(url).path).stem}.idx")


def remote_sidecar(file: RemoteFile) -> tuple[bool, ShardTable | None]:
    """Return whether a shard has a sidecar, and the table in it, unverified; None if the sidecar is damaged."""
    try:
        text = read_remote_text(sidecar_url(file.url), file.retry)
    except RemoteError as error:
        if error.status is not None and 400 <= error.status < 500:
            return False, None  # without list permission, S3 answers 403 for a missing object
        raise
    return True, parse_sidecar(text.splitlines(), size_bytes=file.size)


def kept_md5(url: str, size: int, version: str) -> str:
    """Return the cached result of :func:`remote_md5` for one version of a file; empty if there is none."""
    return (_kept_text(_md5_place(url, size, version)) or "").strip() if version else ""


def remote_md5(file: RemoteFile) -> str:
    """Return the MD5 of a remote file, hexadecimal; reads all bytes, and caches the result if the version is known."""
    digest = Stream(file, is_hashed=True).md5()
    if file.version:
        _keep(_md5_place(file.url, file.size, file.version), digest + "\n")
    return digest


def _md5_place(url: str, size: int, version: str) -> Path:
    return index_folder() / f"{cache_name(url, size, version)}.md5"


def _place(file: RemoteFile, state: str) -> Path:
    return index_folder() / f"{cache_name(file.url, file.size, state)}.idx"


def _keep(place: Path, text: str) -> bool:
    # Failing to write only means reading again at the next start.
    with suppress(OSError):
        private_folder(place.parent)
        write_atomically(place, text)
        return True
    return False


def _table_of(file: RemoteFile, version: str, *, anew: bool = False) -> tuple[ShardTable, str]:
    """Return a cached table, or read and cache it; and its state (see :class:`RemoteShard`)."""
    place = _place(file, version)
    table = None if anew else _kept(file, place)
    if table is not None and (version or not misfit(table, file)):
        return table, "unchanged"
    beside = None if anew else remote_sidecar(file)[1]
    table = beside if beside is not None and not misfit(beside, file) else build_table(file)
    text = sidecar_text(table)
    return table, "written" if text is not None and _keep(place, text) else "not writable"


def _kept(file: RemoteFile, place: Path) -> ShardTable | None:
    text = _kept_text(place)
    return None if text is None else parse_sidecar(text.splitlines(), size_bytes=file.size)


def _kept_text(place: Path) -> str | None:
    # Never read a table that another user could have written: it decides which bytes of a shard form a sample.
    with suppress(OSError):
        return (private_folder(place.parent) / place.name).read_text(encoding="utf-8", errors="surrogateescape")
    return None
