"""The table of one shard: from its tar headers, and from the sidecar beside it.

A sidecar is NVIDIA DALI's ``wds2idx`` text form, version 1.2 (``train-000000.idx``): existing ones serve here
and ours serve DALI. A sample is a run of members with the same key (the path up to the first dot of its base
name), as WebDataset groups them; dot files, directories and members without an extension are skipped. A
sidecar that is older than its shard or points outside it is not trusted. Cost: a pass over the headers, or one
over the sidecar's text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from disttrain.data.tar import ByteSource, Member, scan_members, scan_source
from disttrain.errors import ShardError
from disttrain.files import write_atomically

SIDECAR_VERSION: Final = "v1.2"
_META: Final = re.compile(r"__[^/]*__(/|$)")  # WebDataset's names for what is no sample


@dataclass(frozen=True, eq=False)
class ShardTable:
    """Where the samples of one shard lie.

    Attributes:
        keys: the samples' keys.
        fields: the extensions that occur, lower case.
        offsets: byte offset of each field's content, -1 where a sample lacks it. shape (samples, fields)
        sizes: its size in bytes, -1 where absent. shape (samples, fields)
    """

    keys: list[str]
    fields: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    def spans(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Offset and size of each field that a sample has, by key and field."""
        out = {}
        for key, offsets, sizes in zip(self.keys, self.offsets.tolist(), self.sizes.tolist(), strict=True):
            found = zip(self.fields, offsets, sizes, strict=True)
            out[key] = {field: (offset, size) for field, offset, size in found if offset >= 0}
        return out


def sidecar_path(shard: str) -> Path:
    """Where a shard's sidecar lies: ``train-000000.tar`` -> ``train-000000.idx``, as DALI names it."""
    return Path(shard).with_suffix(".idx")


def load_table(path: str) -> ShardTable:
    """A shard's table from its sidecar where that is fresh and fits, else from its headers."""
    table = read_sidecar(path) if sidecar_is_fresh(path) else None
    return table if table is not None else build_table(path)


def build_table(shard: str | ByteSource) -> ShardTable:
    """A shard's table from its headers: those of a local path, or of anything that can be read by ranges.

    Raises:
        ShardError: the tar is damaged, holds no samples, or holds a sample or a field twice.
    """
    path = shard if isinstance(shard, str) else shard.name
    samples = _group(scan_members(shard) if isinstance(shard, str) else scan_source(shard), path)
    if not samples:
        raise ShardError(f"shard {path} holds no samples", mend="remove it from the pattern, or pack it again")
    return _table(samples)


def _group(members: Iterable[Member], path: str) -> dict[str, dict[str, tuple[int, int]]]:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    last = None
    for member in members:
        parts = split_name(member.name)
        if parts is None:
            continue
        key, extension = parts
        if key != last and key in samples:
            raise ShardError(
                f"shard {path} at byte {member.offset}: sample key {key!r} occurs twice, apart",
                mend="a sample's files must follow each other and keys be unique in a shard: pack it again",
            )
        fields = samples.setdefault(key, {})
        if extension in fields:
            raise ShardError(
                f"shard {path} at byte {member.offset}: sample {key!r} has field {extension!r} twice",
                mend="pack the shard again with one file a field",
            )
        fields[extension] = (member.offset, member.size)
        last = key
    return samples


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member by WebDataset's rule, or None for one that belongs to no sample."""
    name = name.removeprefix("./")
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or not extension or _META.match(name):
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _table(samples: dict[str, dict[str, tuple[int, int]]]) -> ShardTable:
    fields = tuple(dict.fromkeys(field for sample in samples.values() for field in sample))
    absent = (-1, -1)
    rows = [[sample.get(field, absent) for field in fields] for sample in samples.values()]
    spans = np.array(rows, dtype=np.int64).reshape(len(samples), len(fields), 2)
    return ShardTable(list(samples), fields, np.ascontiguousarray(spans[:, :, 0]), np.ascontiguousarray(spans[:, :, 1]))


def sidecar_is_fresh(path: str) -> bool:
    """Whether a shard has a sidecar that is no older than itself."""
    try:
        return os.stat(sidecar_path(path)).st_mtime_ns >= os.stat(path).st_mtime_ns
    except OSError:
        return False


def sidecar_count(path: str) -> int | None:
    """Samples that a fresh sidecar claims, or None."""
    if not sidecar_is_fresh(path):
        return None
    with open(sidecar_path(path), encoding="utf-8", errors="surrogateescape") as file:
        version, _, count = file.readline().strip().partition(" ")
    return int(count) if version == SIDECAR_VERSION and count.isdigit() and int(count) > 0 else None


def read_sidecar(path: str) -> ShardTable | None:
    """The table in a shard's sidecar, fresh or not; None where it does not parse or points outside the shard."""
    with open(sidecar_path(path), encoding="utf-8", errors="surrogateescape") as file:
        return parse_sidecar(file, size_bytes=os.stat(path).st_size)


def parse_sidecar(lines: Iterable[str], *, size_bytes: int) -> ShardTable | None:
    """The table that a sidecar's lines hold; None where they do not parse or point outside a shard of that size."""
    rows = list(lines)
    try:
        version, count_text = rows[0].split()
        count = int(count_text) if version == SIDECAR_VERSION else -1
    except (ValueError, IndexError):
        return None
    return _parse_regular(rows[1:], count, size_bytes) or _parse_rows(rows[1:], count, size_bytes)


def _parse_regular(rows: list[str], count: int, size_bytes: int) -> ShardTable | None:
    """The table of rows that all have the same fields, column by column; None for any others.

    Several times as fast as row by row, which is what a run's first batch waits for.
    """
    words = " ".join(rows).split()
    if len(rows) != count or not words or len(words) % (4 * count):
        return None
    width = len(words) // count
    extensions = words[0:width:4]
    fields = tuple(extension.lower() for extension in extensions)
    if len(set(fields)) < len(fields) or words[0::4] != extensions * count:
        return None
    try:
        offsets = np.array(list(map(int, words[1::4])), dtype=np.int64).reshape(count, len(fields))
        sizes = np.array(list(map(int, words[2::4])), dtype=np.int64).reshape(count, len(fields))
    except (ValueError, OverflowError):
        return None
    parts = [split_name(name) for name in words[3::width]]
    keys = [part[0] for part in parts if part is not None]
    if len(set(keys)) < count or min(offsets.min(), sizes.min()) < 0 or (offsets + sizes).max() > size_bytes:
        return None
    return ShardTable(keys, fields, offsets, sizes)


def _parse_rows(rows: list[str], count: int, size_bytes: int) -> ShardTable | None:
    """The table of any rows, one by one."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        for line in rows:
            words = line.split()
            parts = split_name(words[3])
            if len(words) % 4 or parts is None:
                return None
            spans = [(int(offset), int(size)) for offset, size in zip(words[1::4], words[2::4], strict=True)]
            samples[parts[0]] = dict(zip((word.lower() for word in words[0::4]), spans, strict=True))
            end = max(end, *(offset + size for offset, size in spans))
            if min(min(span) for span in spans) < 0:
                return None
    except (ValueError, IndexError):
        return None
    if len(samples) != count or end > size_bytes:
        return None
    return _table(samples)


def sidecar_text(table: ShardTable) -> str | None:
    """A table in the sidecar's form; None where a name holds white space, which that form cannot carry."""
    lines = [f"{SIDECAR_VERSION} {len(table)}"]
    for key, spans in table.spans().items():
        words = [f"{field} {offset} {size} {key}.{field}" for field, (offset, size) in spans.items()]
        lines.append(" ".join(words))
        if len(lines[-1].split()) != 4 * len(words):
            return None
    return "\n".join(lines) + "\n"


def write_sidecar_file(path: str, table: ShardTable) -> bool:
    """Write a shard's sidecar, atomically.

    Returns:
        Whether it was written: not where the folder is read-only, nor where a name holds white space, which
        the text form cannot carry (the headers are then read at each start).
    """
    text = sidecar_text(table)
    try:
        if text is not None:
            write_atomically(sidecar_path(path), text)
    except OSError:
        return False
    return text is not None
