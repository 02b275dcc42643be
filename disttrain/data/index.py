"""Where every sample of a set of WebDataset tars lies: shard, byte offset and size of each field.

The tables of the shards come from their sidecars or headers (see :mod:`disttrain.data.sidecar`; those of
remote shards by ranged reads, see :mod:`disttrain.data.remote_index`) and are loaded when they are first
needed. A data set can also be named by a JSON manifest in WebDataset's ``wids-shard-index-v1`` form. In memory:
a few numbers a shard, plus the tables of the shards in use. Cost: a manifest is one read; a pattern needs the
count of every shard, from the first line of its sidecar or from its headers.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Final
from urllib.parse import urlsplit

import braceexpand
import numpy as np

from disttrain.data.remote import RemoteError, RemoteFile, is_remote, shown, sibling
from disttrain.data.remote_index import describe_remote, load_remote_table, read_remote_text, together
from disttrain.data.sidecar import ShardTable, build_table, load_table, sidecar_count, write_sidecar_file
from disttrain.errors import DataError, ShardError, nearest
from disttrain.files import write_atomically

MANIFEST_KIND: Final = "wids-shard-index-v1"
_TABLES_IN_MEMORY: Final = 4096


@dataclass(frozen=True)
class Shard:
    """One tar of a data set.

    Attributes:
        path: where it is: a path, or a URL.
        num_samples: samples in it.
        size_bytes: size of the tar.
        md5: hexadecimal MD5 of the tar, or empty where none was recorded.
        version: of a remote tar, what its server says identifies the contents; empty where that is not known.
    """

    path: str
    num_samples: int
    size_bytes: int
    md5: str = ""
    version: str = ""

    @property
    def is_remote(self) -> bool:
        """Whether it is fetched before it is read."""
        return is_remote(self.path)


class ShardIndex:
    """The samples of a data set, numbered 0..N-1 through its shards in the order given.

    Build one with :meth:`open`. Safe to use from several threads.

    Args:
        shards: the shards, in order.
        name: what error messages call this data set.
    """

    def __init__(self, shards: Sequence[Shard], *, name: str = "data") -> None:
        self.shards = tuple(shards)
        self.name = name
        self.sizes = np.array([shard.num_samples for shard in self.shards], dtype=np.int64)
        self.starts = np.concatenate(([0], np.cumsum(self.sizes)))
        self._tables: OrderedDict[int, ShardTable] = OrderedDict()
        self._lock = Lock()

    @classmethod
    def open(cls, spec: str | Sequence[str], *, name: str = "data", write_sidecars: bool = True) -> ShardIndex:
        """The index of the shards that a specification names.

        Args:
            spec: a brace pattern (``train-{000000..000007}.tar``), a glob (``train-*.tar``), a manifest
                (``train.json``), or a list of these. Patterns and manifests may be URLs; a glob may not.
            name: what error messages call this data set.
            write_sidecars: keep a sidecar beside each shard that has none (skipped where the folder is
                read-only); those of remote shards are kept in a local folder in any case.

        Raises:
            DataError: the specification names nothing, or names a file that is missing.
            ShardError: a shard cannot be read.
        """
        shards: list[Shard] = []
        for part in [spec] if isinstance(spec, str) else spec:
            if _is_manifest(part):
                shards.extend(read_manifest(part, name=name))
            elif is_remote(part):
                shards.extend(_describe_all(expand(part, name=name), name=name))
            else:
                shards.extend(describe_shard(path, write_sidecar=write_sidecars) for path in expand(part, name=name))
        if not shards:
            raise DataError(f"{name} names no shards", mend=f"set {name} to a pattern such as 'train-{{000..007}}.tar'")
        return cls(shards, name=name)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def table(self, shard: int) -> ShardTable:
        """The table of one shard, from its sidecar or its headers; the last few hundred stay in memory."""
        with self._lock:
            found = self._tables.get(shard)
            if found is not None:
                self._tables.move_to_end(shard)
                return found
        entry = self.shards[shard]
        if entry.is_remote:
            table = load_remote_table(entry.path, entry.size_bytes, version=entry.version, md5=entry.md5)
        else:
            table = load_table(entry.path)
        if len(table) != entry.num_samples:
            raise ShardError(
                f"shard {shown(entry.path)} holds {len(table)} samples, but the index of {self.name} says"
                f" {entry.num_samples}",
                mend="run `disttrain shards index` on the data again",
            )
        with self._lock:
            self._tables[shard] = table
            while len(self._tables) > _TABLES_IN_MEMORY:
                self._tables.popitem(last=False)
        return table

    def key(self, sample_id: int) -> str:
        """The key of one sample."""
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return self.table(shard).keys[sample_id - int(self.starts[shard])]

    def names_hash(self) -> str:
        """A hash of the shards' base names in order: data that was moved is the same, renamed data is not."""
        names = "\n".join(os.path.basename(_path_of(shard.path)) for shard in self.shards)
        return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def fields(self) -> tuple[str, ...]:
        """The extensions in the first shard that holds samples."""
        first = int(np.flatnonzero(self.sizes)[0]) if len(self) else 0
        return self.table(first).fields


def expand(pattern: str, *, name: str = "data") -> list[str]:
    """The files that a brace or glob pattern names, in order; the URLs that a brace pattern names, unasked for.

    Raises:
        DataError: it names nothing, or a named file does not exist.
    """
    try:
        parts = list(braceexpand.braceexpand(pattern))
    except ValueError:
        raise DataError(f"{name}: {pattern!r} has a brace without its partner", mend="close or remove it") from None
    if is_remote(pattern):
        if "*" in pattern:
            raise DataError(
                f"{name}: {shown(pattern)} is a glob, which servers do not answer",
                mend="use braces, such as train-{000000..000007}.tar, or a manifest",
            )
        return parts
    paths: list[str] = []
    for part in parts:
        if any(sign in part for sign in "*?[") and not Path(part).is_file():
            found = sorted(glob.glob(part, recursive=True))
            if not found:
                raise DataError(f"{name}: no file matches {part!r}", mend="check the pattern and the folder")
            paths.extend(found)
        else:
            paths.append(part)
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        folder = Path(missing[0]).parent
        there = [path.name for path in folder.glob("*.tar")] if folder.is_dir() else []
        where = nearest(Path(missing[0]).name, there) if there else f"folder {folder} holds no .tar files"
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{name}: shard {missing[0]} does not exist{more}", mend=f"correct the pattern; {where}")
    return paths


def _path_of(place: str) -> str:
    """A path, or that of a URL without its query."""
    return urlsplit(place).path if is_remote(place) else place


def _is_manifest(spec: str) -> bool:
    return _path_of(spec).endswith(".json")


def _describe_all(urls: Sequence[str], *, name: str) -> list[Shard]:
    try:
        return together(describe_shard, urls)
    except RemoteError as error:
        missing = "does not exist" if error.status == 404 else "cannot be read"
        raise DataError(f"{name}: a shard {missing}: {error.what}", mend=error.mend) from None


def describe_shard(path: str, *, write_sidecar: bool = True) -> Shard:
    """Count a shard's samples, from the first line of a fresh sidecar or from its headers."""
    if is_remote(path):
        samples, size, version = describe_remote(path)
        return Shard(path=path, num_samples=samples, size_bytes=size, version=version)
    size = os.stat(path).st_size
    count = sidecar_count(path)
    if count is None:
        table = build_table(path)
        count = len(table)
        if write_sidecar:
            write_sidecar_file(path, table)
    return Shard(path=path, num_samples=count, size_bytes=size)


def parse_manifest(path: str | Path, *, name: str = "data") -> list[Shard]:
    """The shards that a ``wids-shard-index-v1`` manifest lists; their paths are relative to its folder.

    Both the manifest and what it lists may be URLs.

    Raises:
        DataError: the manifest is missing, or is none.
    """
    place = str(path)
    try:
        content: Any = json.loads(read_remote_text(place) if is_remote(place) else Path(place).read_text())
        return [
            Shard(
                path=_beside(place, entry["url"]),
                num_samples=int(entry["nsamples"]),
                size_bytes=int(entry.get("filesize", -1)),
                md5=str(entry.get("md5sum", "")),
            )
            for entry in content["shardlist"]
        ]
    except FileNotFoundError:
        raise DataError(f"{name}: manifest {path} does not exist", mend="run `disttrain shards index`") from None
    except RemoteError as error:
        missing = "does not exist" if error.status == 404 else "cannot be read"
        raise DataError(f"{name}: the manifest {missing}: {error.what}", mend=error.mend) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{name}: {shown(place)} is not a shard manifest ({type(error).__name__}: {error})",
            mend="write one with `disttrain shards index`",
        ) from None


def _beside(manifest: str, url: str) -> str:
    """Where a shard is that a manifest lists: its URL, or a place relative to the manifest's folder."""
    if is_remote(url):
        return url
    return sibling(manifest, url) if is_remote(manifest) else str(Path(manifest).parent / url)


def read_manifest(path: str | Path, *, name: str = "data") -> list[Shard]:
    """The shards of a manifest as :func:`parse_manifest`, or a DataError where one is missing or of another size.

    Remote shards are taken at their word, so that a hundred thousand of them cost no requests: one that is
    missing or of another size is an error when it is fetched. Only a size that is not listed is asked for.
    """
    shards = parse_manifest(path, name=name)
    unknown = [number for number, shard in enumerate(shards) if shard.is_remote and shard.size_bytes < 0]
    sizes = together(lambda number: RemoteFile(shards[number].path).size, unknown) if unknown else []
    for number, size in zip(unknown, sizes, strict=True):
        shards[number] = replace(shards[number], size_bytes=size)
    for shard in shards:
        if shard.is_remote:
            continue
        if not Path(shard.path).is_file():
            raise DataError(
                f"{name}: shard {shard.path}, listed in {shown(str(path))}, does not exist", mend="restore it"
            )
        size = os.stat(shard.path).st_size
        if shard.size_bytes not in (-1, size):
            raise DataError(
                f"{name}: shard {shard.path} has {size} bytes, but {shown(str(path))} says {shard.size_bytes}",
                mend="restore the shard, or run `disttrain shards index` again",
            )
    return shards


def write_manifest(
    path: Path, shards: Sequence[Shard], *, name: str, extra: Mapping[str, object] | None = None
) -> None:
    """Write a ``wids-shard-index-v1`` manifest, atomically, with paths relative to its folder and extra entries."""
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
    write_atomically(path, json.dumps(content, indent=2) + "\n")
