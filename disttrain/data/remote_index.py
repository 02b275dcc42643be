"""Tables of remote shards, from a sidecar beside the shard or from ranged reads of its headers.

A table that was read is kept in a local folder (``$DISTTRAIN_CACHE/index``, by default under
``~/.cache/disttrain``) under a name made of URL, size and version, so a shard that changes is read again and an
unchanged one never is. A remote sidecar has no date to trust it by: it must end inside the shard, and the
headers before its first and last field must name and size them as it does. Cost: one request for what is
known, four for a sidecar, else one a MiB of shard.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final, TypeVar
from urllib.parse import urlsplit

import numpy as np

from disttrain.data.remote import RemoteError, RemoteFile, sibling
from disttrain.data.sidecar import ShardTable, build_table, parse_sidecar, sidecar_text, split_name
from disttrain.data.tar import header_of
from disttrain.files import write_atomically

T = TypeVar("T")
U = TypeVar("U")

_REQUESTS_AT_ONCE: Final = 16


def cache_home() -> Path:
    """Where what was fetched is kept: ``$DISTTRAIN_CACHE``, or ``~/.cache/disttrain``."""
    return Path(os.environ.get("DISTTRAIN_CACHE") or "~/.cache/disttrain").expanduser()


def cache_name(url: str, size: int, version: str) -> str:
    """A file name for one state of a remote file."""
    return hashlib.sha256(f"{url}\n{size}\n{version}".encode("utf-8", "surrogateescape")).hexdigest()[:32]


def together(function: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """Results of a function that waits for a server, in order, several at a time."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="disttrain-remote") as pool:
        return list(pool.map(function, items))


def describe_remote(url: str) -> tuple[int, int, str]:
    """Samples, bytes and version of a remote shard.

    Raises:
        RemoteError: it cannot be read; with status 404 where it is missing.
        ShardError: its tar is damaged or holds no samples.
    """
    file = RemoteFile(url)
    table = _table_of(file, _place(file, file.version))
    return len(table), file.size, file.version


def load_remote_table(url: str, size: int, *, version: str = "", md5: str = "") -> ShardTable:
    """The table of a remote shard in the state that size and version (or MD5) name; errors as the above."""
    file = RemoteFile(url, size=size, version=version)
    return _table_of(file, _place(file, version or md5))


def read_remote_text(url: str) -> str:
    """The text of a remote file."""
    file = RemoteFile(url)
    return file.read(0, file.size).decode("utf-8", "surrogateescape")


def _place(file: RemoteFile, state: str) -> Path:
    return cache_home() / "index" / f"{cache_name(file.url, file.size, state)}.idx"


def _table_of(file: RemoteFile, place: Path) -> ShardTable:
    """A table that is kept at a place, or else read and kept there."""
    try:
        text: str | None = place.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        text = None
    table = parse_sidecar(text.splitlines(), size_bytes=file.size) if text is not None else None
    if table is not None:
        return table
    table = _remote_sidecar(file) or build_table(file)
    text = sidecar_text(table)
    if text is not None:
        # A folder that cannot be written costs the headers again at the next start, nothing else.
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, text)
    return table


def _remote_sidecar(file: RemoteFile) -> ShardTable | None:
    """The table of the sidecar beside a shard, if there is one and it fits."""
    stem = PurePosixPath(urlsplit(file.url).path).stem
    try:
        text = read_remote_text(sibling(file.url, f"{stem}.idx"))
    except RemoteError as error:
        if error.status is not None and 400 <= error.status < 500:
            return None  # not there; servers without a right to list say 403
        raise
    table = parse_sidecar(text.splitlines(), size_bytes=file.size)
    if table is None or not len(table):
        return None
    flat = np.where(table.offsets >= 0, table.offsets, np.iinfo(np.int64).max)
    ends = (int(flat.argmin()), int(table.offsets.argmax()))
    return table if all(_fits(table, place, file) for place in ends) else None


def _fits(table: ShardTable, place: int, file: RemoteFile) -> bool:
    sample, field = divmod(place, len(table.fields))
    found = header_of(file, int(table.offsets[sample, field]))
    expected = (table.keys[sample], table.fields[field])
    return found is not None and split_name(found[0]) == expected and found[1] == int(table.sizes[sample, field])
