"""Index WebDataset tars: the shard, and the byte offset and size of each field, of every sample.

Shard tables are read from sidecars or tar headers (see :mod:`disttrain.data.index.sidecar`; for remote shards with
range requests, see :mod:`disttrain.data.index.remote_index`) on first use. A data set can also be given as a JSON
manifest in WebDataset's ``wids-shard-index-v1`` format. Memory: a few numbers per shard, plus the tables of the shards
in use. Cost: a manifest takes one read and one ``stat`` per local shard; a pattern needs the sample count of every
shard, from the first line of its sidecar or from its headers, several shards in parallel.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from disttrain.data.index.parallel_map import together
from disttrain.data.index.patterns import is_manifest, path_of, places, why_missing
from disttrain.data.index.remote_index import REQUESTS_AT_ONCE, describe_remote, load_remote_table, read_remote_text
from disttrain.data.index.sidecar import (
    ALL_READ,
    ShardTable,
    UnreadFields,
    build_sidecar,
    build_table,
    fitting_sidecar,
    sidecar_count,
    sidecar_path,
    write_sidecar_file,
)
from disttrain.data.remote.ranges import DEFAULT_RETRY, RemoteError, RemoteFile, RetryConfig, is_remote, shown, sibling
from disttrain.distributed.world import detect_world
from disttrain.errors import DataError, ShardError
from disttrain.system.files import write_atomically
from disttrain.system.reading import parse_json, read_text

NOT_READ: Final = "links and devices are not read; pack the files themselves (tar --dereference)"
"""Hint for messages about members that are not read."""
MANIFEST_KIND: Final = "wids-shard-index-v1"
_TABLES_IN_MEMORY: Final = 4096
_MOST_BYTES: Final = 2**53
_MANY_SHARDS: Final = 1000
"""From this many shards on, opening them takes long enough to show progress."""


class FileState(NamedTuple):
    """A shard's ``stat``: modification time, and device and inode, which identify the file under any name."""

    mtime_ns: int
    device: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """Build the state from a ``stat`` result."""
        return cls(status.st_mtime_ns, status.st_dev, status.st_ino)


@dataclass(frozen=True)
class Shard:
    """One tar of a data set.

    Attributes:
        path: path or URL.
        num_samples: number of samples.
        size_bytes: size of the tar.
        md5: hexadecimal MD5 of the tar; empty if none was recorded.
        version: for a remote tar, the server's identifier of the contents; empty if unknown.
        state: for a local tar, its file state; None if it was not read.
        unread: links and devices in it that look like fields of samples; empty if its headers were not read.
    """

    path: str
    num_samples: int
    size_bytes: int
    md5: str = ""
    version: str = ""
    state: FileState | None = field(default=None, compare=False)
    unread: UnreadFields = field(default=ALL_READ, compare=False)

    @property
    def is_remote(self) -> bool:
        """Whether it must be downloaded before it is read."""
        return is_remote(self.path)


class ShardIndex:
    """The samples of a data set, numbered 0..N-1 across its shards in the given order.

    Build one with :meth:`open`. Thread-safe.

    Args:
        shards: the shards, in order.
        name: name of the data set in error messages.
        write_sidecars: replace a sidecar that turns out not to match its shard.
        retry: how long to retry a server for the table of a shard.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        name: str = "data",
        write_sidecars: bool = False,
        retry: RetryConfig = DEFAULT_RETRY,
    ) -> None:
        self.shards = tuple(shards)
        self.name = name
        self.sizes = np.array([shard.num_samples for shard in self.shards], dtype=np.int64)
        self.starts = np.concatenate(([0], np.cumsum(self.sizes)))
        self._tables: OrderedDict[int, ShardTable] = OrderedDict()
        self._loading: dict[int, Lock] = {}  # held by the thread that loads the table of a shard
        self._lock = Lock()
        self._write_sidecars, self._retry = write_sidecars, retry
        self._has_warned = False

    @classmethod
    def open(
        cls,
        spec: str | Sequence[str],
        *,
        name: str = "data",
        write_sidecars: bool = True,
        retry: RetryConfig = DEFAULT_RETRY,
    ) -> ShardIndex:
        """Index the shards that a specification names.

        Args:
            spec: a brace pattern (``train-{000000..000007}.tar``), a glob (``train-*.tar``), a manifest
                (``train.json``), a text file with one of these per line (``train.txt``), or a list of these. All may
                be URLs; a URL glob must be of an object store.
            name: name of the data set in error messages.
            write_sidecars: write a sidecar next to each shard whose sidecar is missing or wrong (skipped if the
                folder is read-only). Tables of remote shards are always kept in a local folder.
            retry: how long to retry a server.

        Raises:
            DataError: the specification matches nothing, or names a missing file.
            ShardError: a shard cannot be read.
        """
        found: list[Shard | str] = []
        for part in [spec] if isinstance(spec, str) else spec:
            for place in places(part, name=name, retry=retry):
                found += read_manifest(place, name=name, retry=retry) if is_manifest(place) else [place]
        paths = [place for place in found if isinstance(place, str)]
        described = iter(_describe_all(paths, name=name, write_sidecars=write_sidecars, retry=retry))
        shards = [next(described) if isinstance(place, str) else place for place in found]
        if not shards:
            raise DataError(f"{name} names no shards", hint=f"set {name} to a pattern such as 'train-{{000..007}}.tar'")
        return cls(shards, name=name, write_sidecars=write_sidecars, retry=retry)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def table(self, shard: int) -> ShardTable:
        """Return the table of one shard, from its sidecar or headers; the last few thousand stay in memory."""
        with self._lock:
            found = self._tables.get(shard)
            if found is not None:
                self._tables.move_to_end(shard)
                return found
            loading = self._loading.setdefault(shard, Lock())
        with loading:
            with self._lock:
                found = self._tables.get(shard)
            if found is not None:  # another thread loaded it meanwhile
                return found
            table = self._load(self.shards[shard])
            with self._lock:
                self._tables[shard] = table
                self._loading.pop(shard, None)
                while len(self._tables) > _TABLES_IN_MEMORY:
                    self._tables.popitem(last=False)
        return table

    def _load(self, entry: Shard) -> ShardTable:
        if entry.is_remote:
            table = load_remote_table(
                entry.path, entry.size_bytes, version=entry.version, md5=entry.md5, retry=self._retry
            )
        else:
            found, wrong = fitting_sidecar(entry.path)
            table = found if found is not None else build_table(entry.path)
            if wrong:
                is_written = self._write_sidecars and write_sidecar_file(entry.path, table)
                done = (
                    "it was rewritten"
                    if is_written
                    else "the shard's headers were read instead; run `disttrain shards index`"
                )
                place = sidecar_path(entry.path)
                self._warn_once(f"sidecar {place} does not match its shard ({wrong}): {done}")
        if table.unread.number and not entry.unread.number:  # its count did not come from its headers
            self._warn_once(f"shard {shown(entry.path)} holds {table.unread.first}: {NOT_READ}")
        if len(table) != entry.num_samples:
            raise ShardError(
                f"shard {shown(entry.path)} holds {len(table)} samples, but the index of {self.name} says"
                f" {entry.num_samples}",
                hint="run `disttrain shards index` on the data again",
            )
        return table

    def _warn_once(self, what: str) -> None:
        """Warn about the first shard with a problem, and not again."""
        with self._lock:
            has_warned, self._has_warned = self._has_warned, True
        if not has_warned:
            warnings.warn(f"{what}. Further ones in {self.name} will not be reported", stacklevel=4)

    def key(self, sample_id: int) -> str:
        """Return the key of one sample."""
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return self.table(shard).keys[sample_id - int(self.starts[shard])]

    def names_hash(self) -> str:
        """Hash the shards' base names in order: moving the data keeps the hash, renaming it does not."""
        names = "\n".join(os.path.basename(path_of(shard.path)) for shard in self.shards)
        return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def fields(self) -> tuple[str, ...]:
        """Return the extensions in the first non-empty shard."""
        first = int(np.flatnonzero(self.sizes)[0]) if len(self) else 0
        return self.table(first).fields


def _describe_all(paths: Sequence[str], *, name: str, write_sidecars: bool, retry: RetryConfig) -> list[Shard]:
    are_remote = any(map(is_remote, paths))
    describe = partial(describe_shard, write_sidecar=write_sidecars, retry=retry)
    threads = REQUESTS_AT_ONCE if are_remote else 8
    try:
        return list(together(describe, paths, threads=threads, quick=not are_remote, label=_label(name, len(paths))))
    except RemoteError as error:
        missing = "does not exist" if error.status == 404 else "cannot be read"
        raise DataError(f"{name}: a shard {missing}: {error.what}", hint=error.hint) from None


def _label(name: str, num_shards: int) -> str:
    """Return the progress label for opening shards; empty if there are few shards, or on ranks other than 0."""
    return f"reading the index of {name}" if num_shards >= _MANY_SHARDS and detect_world().rank == 0 else ""


def describe_shard(path: str, *, write_sidecar: bool = True, retry: RetryConfig = DEFAULT_RETRY) -> Shard:
    """Count a shard's samples, from the first line of an up-to-date sidecar or from its headers."""
    if is_remote(path):
        there = describe_remote(path, retry=retry)
        return Shard(path, there.num_samples, there.size_bytes, version=there.version, unread=there.unread)
    status = os.stat(path)
    count, unread = sidecar_count(path), ALL_READ
    if count is None:
        table = build_sidecar(path)[0] if write_sidecar else build_table(path)
        count, unread = len(table), table.unread
    return Shard(path, count, status.st_size, state=FileState.of(status), unread=unread)


def parse_manifest(path: str | Path, *, name: str = "data", retry: RetryConfig = DEFAULT_RETRY) -> list[Shard]:
    """Parse a ``wids-shard-index-v1`` manifest; its paths are relative to its ``base``, or to its folder.

    The manifest and the shards it lists may be URLs.

    Raises:
        DataError: the manifest is missing or invalid.
    """
    place = str(path)
    try:
        content: Any = parse_json(read_remote_text(place, retry) if is_remote(place) else read_text(place))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} instead of an object")
        if content.get("datasets"):
            raise DataError(
                f"{name}: {shown(place)} lists other data sets under 'datasets', which are not read",
                hint="list those manifests instead",
            )
        folder = _beside(place, f"{content['base']}/") if content.get("base") else place
        return [
            Shard(
                path=_beside(folder, entry["url"]),
                num_samples=_whole(entry, "nsamples"),
                size_bytes=max(-1, _whole(entry, "filesize", least=-_MOST_BYTES)) if "filesize" in entry else -1,
                md5=str(entry.get("md5sum") or ""),
            )
            for entry in content["shardlist"]
        ]
    except FileNotFoundError:
        raise DataError(f"{name}: manifest {path} does not exist", hint="run `disttrain shards index`") from None
    except RemoteError as error:
        missing = "does not exist" if error.status == 404 else "cannot be read"
        raise DataError(f"{name}: the manifest {missing}: {error.what}", hint=error.hint) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{name}: {shown(place)} is not a shard manifest ({type(error).__name__}: {str(error)[:200]})",
            hint="write one with `disttrain shards index`",
        ) from None


def _whole(entry: Mapping[str, Any], key: str, *, least: int = 0) -> int:
    """Return an integer from a manifest entry; writers in other languages may store it as a float."""
    value = entry[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= _MOST_BYTES or value != int(value):
        raise ValueError(f"{key} is {value!r}, not a whole number")
    return int(value)


def _beside(manifest: str, url: str) -> str:
    """Resolve a shard listed in a manifest: a URL, or a path relative to the manifest's folder."""
    if url.startswith("file:"):
        return url2pathname(urlsplit(url).path)
    if is_remote(url):
        return url
    return sibling(manifest, url) if is_remote(manifest) else os.path.join(os.path.dirname(manifest), url)


def read_manifest(path: str | Path, *, name: str = "data", retry: RetryConfig = DEFAULT_RETRY) -> list[Shard]:
    """Read a manifest as :func:`parse_manifest` does, and check that each local shard exists with the listed size.

    Remote shards are not checked, so a hundred thousand of them need no requests; a missing one or one of another size
    raises when it is downloaded. Only sizes missing from the manifest are requested.

    Raises:
        DataError: a local shard is missing or has another size.
    """
    shards = parse_manifest(path, name=name, retry=retry)
    unknown = [number for number, shard in enumerate(shards) if shard.is_remote and shard.size_bytes < 0]
    there = together(lambda number: RemoteFile(shards[number].path, retry).size, unknown, threads=REQUESTS_AT_ONCE)
    for number, size in zip(unknown, there, strict=True):
        shards[number] = replace(shards[number], size_bytes=size)
    local = [number for number, shard in enumerate(shards) if not shard.is_remote]
    label = _label(name, len(local))
    looks = together(_look, [shards[number].path for number in local], quick=True, label=label)
    for number, status in zip(local, looks, strict=True):
        shard = shards[number]
        if status is None:
            what, _ = why_missing(shard.path, f", listed in {shown(str(path))},")
            raise DataError(f"{name}: {what}", hint="restore it")
        if shard.size_bytes not in (-1, status.st_size):
            raise DataError(
                f"{name}: shard {shard.path} has {status.st_size} bytes, but {shown(str(path))} says"
                f" {shard.size_bytes}",
                hint="restore the shard, or run `disttrain shards index` again",
            )
        shards[number] = replace(shard, size_bytes=status.st_size, state=FileState.of(status))
    if local and not is_remote(str(path)):
        _warn_of_newer([shards[number] for number in local], Path(path), name=name)
    return shards


def _warn_of_newer(shards: Sequence[Shard], manifest: Path, *, name: str) -> None:
    """Warn about shards newer than the manifest with their MD5: equal sizes do not prove equal contents."""
    written = manifest.stat().st_mtime_ns
    newer = [shard for shard in shards if shard.md5 and shard.state is not None and shard.state.mtime_ns > written]
    if newer and detect_world().rank == 0:
        more = f" (and {len(newer) - 1} more)" if newer[1:] else ""
        warnings.warn(
            f"{name}: shard {newer[0].path}{more} is newer than {manifest}, which has its MD5: if its contents were"
            " replaced, run `disttrain shards index` again; `disttrain shards verify` compares them",
            stacklevel=3,
        )


def _look(path: str) -> os.stat_result | None:
    """Return the ``stat`` of a regular file; None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def write_manifest(
    path: Path, shards: Sequence[Shard], *, name: str, extra: Mapping[str, object] | None = None
) -> None:
    """Atomically write a ``wids-shard-index-v1`` manifest, with paths relative to its folder, and extra entries.

    If a URL in it contains a user or a query, only this user may read the file.
    """
    entries = [
        {
            "url": shard.path if shard.is_remote else os.path.relpath(shard.path, path.parent),
            "nsamples": shard.num_samples,
            "filesize": shard.size_bytes,
            **({"md5sum": shard.md5} if shard.md5 else {}),
        }
        for shard in shards
    ]
    content = {"__kind__": MANIFEST_KIND, "wids_version": 1, "name": name, **(extra or {}), "shardlist": entries}
    has_secrets = any(shown(shard.path) != shard.path for shard in shards)
    write_atomically(path, json.dumps(content, indent=2) + "\n", mode=0o600 if has_secrets else 0o644)
