"""Tables of remote shards, from a sidecar beside the shard or from ranged reads of its headers.

A table that was read is kept in a local folder (``disttrain-index-UID`` in ``$DISTTRAIN_CACHE``, by default
``~/.cache/disttrain``) under a name made of URL, size and version, so a shard that changes is read again and an
unchanged one never is. A remote sidecar has no date to trust it by: its members must be able to lie in a tar,
and the first, the middle and the last of them must be what the shard has there. So must those of a kept table
whose shard has no known version. Cost: one request for what is known, five for a sidecar, else one a MiB of
shard.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from disttrain.data.remote import DEFAULT_RETRY, RemoteError, RemoteFile, RetryConfig, sibling
from disttrain.data.sidecar import (
    ALL_READ,
    ShardTable,
    UnreadFields,
    build_table,
    misfit,
    parse_sidecar,
    sidecar_text,
)
from disttrain.data.stream import Stream
from disttrain.files import write_atomically

_MOST_TEXT_BYTES: Final = 2**30
REQUESTS_AT_ONCE: Final = 16
"""Threads that wait for a server."""


def cache_home() -> Path:
    """Where what was fetched is kept: ``$DISTTRAIN_CACHE``, or ``~/.cache/disttrain``."""
    return Path(os.environ.get("DISTTRAIN_CACHE") or "~/.cache/disttrain").expanduser()


def index_folder() -> Path:
    """Where tables and MD5s of remote shards are kept: a folder of this user alone, in a home that others may share."""
    return cache_home() / f"disttrain-index-{os.geteuid()}"


def private_folder(path: Path) -> Path:
    """Make a folder that only this user can write, or check one that is there.

    What lies in it can then be trusted: nobody else can plant a file or a link there. A link to the folder may
    stand in its place, if it is this user's own.

    Raises:
        OSError: it cannot be made, belongs to another user, or others may write to it.
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
        raise PermissionError(1, "other users may write to it", str(path))
    return path


def cache_name(url: str, size: int, version: str) -> str:
    """A file name for one state of a remote file."""
    return hashlib.sha256(f"{url}\n{size}\n{version}".encode("utf-8", "surrogateescape")).hexdigest()[:32]


class RemoteShard(NamedTuple):
    """A remote shard: its samples, bytes and version, and what became of its table.

    ``state`` is ``unchanged`` where the table was known, ``written`` where it was read and is now kept, ``not
    writable`` where it could not be.
    """

    num_samples: int
    size_bytes: int
    version: str
    state: str
    unread: UnreadFields = ALL_READ


def describe_remote(url: str, *, anew: bool = False, retry: RetryConfig = DEFAULT_RETRY) -> RemoteShard:
    """Samples, bytes and version of a remote shard.

    Args:
        url: where it is.
        anew: read its headers even where a table is known.
        retry: how long to try.

    Raises:
        RemoteError: it cannot be read; with status 404 where it is missing.
        ShardError: its tar is damaged or holds no samples.
    """
    file = RemoteFile(url, retry)
    table, state = _table_of(file, file.version, anew=anew)
    return RemoteShard(len(table), file.size, file.version, state, table.unread)


def load_remote_table(
    url: str, size: int, *, version: str = "", md5: str = "", retry: RetryConfig = DEFAULT_RETRY
) -> ShardTable:
    """The table of a remote shard in the state that size and version (or MD5) name; errors as the above."""
    return _table_of(RemoteFile(url, retry, size=size, version=version), version or md5)[0]


def read_remote_text(url: str, retry: RetryConfig = DEFAULT_RETRY) -> str:
    """The text of a remote file."""
    file = RemoteFile(url, retry)
    if file.size > _MOST_TEXT_BYTES:
        raise RemoteError(
            f"{file.name} has {file.size} bytes, too many for a list", mend="name a manifest or a sidecar"
        )
    return file.read(0, file.size).decode("utf-8", "surrogateescape")


def sidecar_url(url: str) -> str:
    """Where a remote shard's sidecar lies."""
    return sibling(url, f"{PurePosixPath(urlsplit(url).path).stem}.idx")


def remote_sidecar(file: RemoteFile) -> tuple[bool, ShardTable | None]:
    """Whether there is a sidecar beside a shard, and its table as it stands there: None where it is damaged."""
    try:
        text = read_remote_text(sidecar_url(file.url), file.retry)
    except RemoteError as error:
        if error.status is not None and 400 <= error.status < 500:
            return False, None  # servers without a right to list say 403
        raise
    return True, parse_sidecar(text.splitlines(), size_bytes=file.size)


def kept_md5(url: str, size: int, version: str) -> str:
    """The MD5 that :func:`remote_md5` found for a version of a remote file; empty where it has not been asked."""
    return (_kept_text(_md5_place(url, size, version)) or "").strip() if version else ""


def remote_md5(file: RemoteFile) -> str:
    """The MD5 of a remote file, hexadecimal; it reads all bytes, and keeps what it found for a known version."""
    digest = Stream(file, is_hashed=True).md5()
    if file.version:
        _keep(_md5_place(file.url, file.size, file.version), digest + "\n")
    return digest


def _md5_place(url: str, size: int, version: str) -> Path:
    return index_folder() / f"{cache_name(url, size, version)}.md5"


def _place(file: RemoteFile, state: str) -> Path:
    return index_folder() / f"{cache_name(file.url, file.size, state)}.idx"


def _keep(place: Path, text: str) -> bool:
    # A folder that cannot be written costs reading again at the next start, nothing else.
    with suppress(OSError):
        private_folder(place.parent)
        write_atomically(place, text)
        return True
    return False


def _table_of(file: RemoteFile, version: str, *, anew: bool = False) -> tuple[ShardTable, str]:
    """A table that is kept at its place, or else read and kept there; and which of it (see :class:`RemoteShard`)."""
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
    # What another user could have written is not read: a table says which bytes of a shard are a sample's.
    with suppress(OSError):
        return (private_folder(place.parent) / place.name).read_text(encoding="utf-8", errors="surrogateescape")
    return None
