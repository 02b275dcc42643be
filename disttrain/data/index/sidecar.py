"""The table of one shard, from its tar headers or from the sidecar next to it.

A sidecar has the text format of NVIDIA DALI's ``wds2idx``, version 1.2 (``train-000000.idx``): DALI's work here and
ours work in DALI. A sample is a run of members with the same key (the path up to the first dot of the base name), as
WebDataset groups them. Dot files, directories and members without an extension are skipped.

A sidecar is trusted only if it is no older than its shard, its members form a valid tar layout, and the first, middle
and last members match the shard, as does the one with the largest gap before it, where unlisted members might be.
Nothing may follow the last member. This also detects a shard that was rewritten with its old date. A shard has no
sidecar if it holds hard links, or unread links and devices that look like fields of a sample: the format cannot
represent either. Cost: a pass over the headers, or one over the sidecar's text and three or four reads of the shard.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from disttrain.data.index.tar import ByteSource, LocalFile, Member, TarError, Unread, scan_source
from disttrain.data.index.tar_header import BLOCK
from disttrain.errors import ShardError
from disttrain.system.files import write_atomically
from disttrain.system.reading import ReadError, open_regular

SIDECAR_VERSION: Final = "v1.2"
_HEAD_BYTES: Final = 100
_LEAST_BYTES: Final = 2**20
_PROBE_BYTES: Final = 64 * 1024
_RECORD_BYTES: Final = 20 * BLOCK  # tar pads archives to this: one read covers the end block and the padding
_OLDER_NS: Final = 3600 * 10**9
_META: Final = re.compile(r"__[^/]*__(/|$)")  # WebDataset's names for metadata


class UnreadFields(NamedTuple):
    """Members that look like fields of samples but are not read: their number, and the first in words."""

    number: int = 0
    first: str = ""


ALL_READ: Final = UnreadFields()


@dataclass(frozen=True, eq=False)
class ShardTable:
    """Where the samples of one shard are.

    Attributes:
        keys: the samples' keys.
        fields: the extensions that occur, lower case.
        offsets: byte offset of each field's content, -1 if a sample lacks it. shape (samples, fields)
        sizes: its size in bytes, -1 if absent. shape (samples, fields)
        unread: members of the shard that are not in the table.
    """

    keys: list[str]
    fields: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    unread: UnreadFields = ALL_READ

    def __len__(self) -> int:
        return len(self.keys)

    def spans(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Return offset and size of each field that a sample has, by key and field."""
        out = {}
        for key, offsets, sizes in zip(self.keys, self.offsets.tolist(), self.sizes.tolist(), strict=True):
            found = zip(self.fields, offsets, sizes, strict=True)
            out[key] = {field: (offset, size) for field, offset, size in found if offset >= 0}
        return out


def sidecar_path(shard: str) -> Path:
    """Return the path of a shard's sidecar: ``train-000000.tar`` -> ``train-000000.idx``, as DALI names it."""
    return Path(shard).with_suffix(".idx")


def load_table(path: str) -> ShardTable:
    """Return a shard's table from its sidecar if that is fresh and matches, else from its headers."""
    table, _ = fitting_sidecar(path)
    return table if table is not None else build_table(path)


def fitting_sidecar(path: str) -> tuple[ShardTable | None, str]:
    """Return the table in a shard's sidecar if it can be trusted; else None and what is wrong with the sidecar.

    A missing or outdated sidecar is normal: the reason is empty then, and the sidecar gets rebuilt.

    Raises:
        ShardError: the shard cannot be opened or read.
    """
    if not sidecar_is_fresh(path):
        return None, ""
    try:
        table = read_sidecar(path)
    except OSError as error:
        return None, f"it cannot be read: {error.strerror}"
    if table is None:
        return None, "it is damaged or points outside its shard"
    with LocalFile(path) as file:
        wrong = misfit(table, file)
    return (None, wrong) if wrong else (table, "")


def misfit(table: ShardTable, source: ByteSource) -> str:
    """Return why a table does not match a tar; empty if every check passes.

    Checks the headers of the first, middle and last members and of the one with the largest gap before it, each from
    the end of the previous member, and what follows the last.
    """
    present = np.flatnonzero(table.offsets >= 0)
    present = present[np.argsort(table.offsets.ravel()[present])]
    offsets, sizes = table.offsets.ravel()[present], table.sizes.ravel()[present]
    starts = np.concatenate(([0], offsets[:-1] + -(-sizes[:-1] // BLOCK) * BLOCK))
    # In byte order, the fields of a sample are adjacent and the samples are in order.
    is_sorted = not (np.diff(present // max(1, len(table.fields))) < 0).any()
    if not len(present) or not is_sorted or (offsets % BLOCK).any() or (offsets - starts < BLOCK).any():
        return "no tar can have this layout"
    last = len(present) - 1
    room = offsets - starts
    widest = int(room.argmax()) if room.max() > room.min() else 0
    for place in sorted({0, last // 2, widest, last}):
        sample, column = divmod(int(present[place]), len(table.fields))
        expected = Member(f"{table.keys[sample]}.{table.fields[column]}", int(offsets[place]), int(sizes[place]))
        wrong = _differs(expected, source, int(starts[place]), to_end=place == last)
        if wrong:
            return wrong
    return ""


def _differs(expected: Member, source: ByteSource, start: int, *, to_end: bool) -> str:
    """Return how a tar differs from an expected member at ``start``; with ``to_end``, that must be the last one."""
    needed = BLOCK + -(-expected.size // BLOCK) * BLOCK + _RECORD_BYTES if to_end else BLOCK
    window = needed if needed <= _PROBE_BYTES else BLOCK
    found: list[Member] = []
    unread = _Unread()
    try:
        for member in scan_source(source, start=start, window_bytes=window, unread=unread):
            if split_name(member.name) is not None:
                found.append(member)
                if not to_end or len(found) > 1:
                    break
    except TarError as error:
        return error.what
    if unread.fields.number:
        return f"it does not mention {unread.fields.first}"
    if not found or split_name(found[0].name) != split_name(expected.name) or found[0][1:] != expected[1:]:
        there = f"{found[0].name!r} at byte {found[0].offset} of size {found[0].size}" if found else "nothing there"
        return f"it says {expected.name!r} at byte {expected.offset} of size {expected.size}, the shard has {there}"
    return f"it does not list {found[1].name!r} at byte {found[1].offset}" if len(found) > 1 else ""


def build_table(shard: str | ByteSource) -> ShardTable:
    """Read a shard's table from the headers of a local path, or of any source that can be read by ranges.

    Raises:
        ShardError: the tar is damaged, holds no samples, or holds a sample or a field twice.
    """
    if not isinstance(shard, str):
        return _built(shard)
    with LocalFile(shard) as file:
        return _built(file)


def _built(shard: ByteSource) -> ShardTable:
    unread = _Unread()
    samples = _group(scan_source(shard, unread=unread), shard.name)
    if not samples:
        also = f", but {unread.fields.first}" if unread.fields.number else ""
        raise ShardError(
            f"shard {shard.name} holds no samples{also}", hint="remove it from the pattern, or pack it again"
        )
    return replace(_table(samples), unread=unread.fields)


class _Unread:
    """Collects the members that a scan does not read and that look like fields of samples."""

    def __init__(self) -> None:
        self.fields = ALL_READ

    def __call__(self, member: Unread) -> None:
        if split_name(member.name) is not None:
            self.fields = UnreadFields(self.fields.number + 1, self.fields.first or in_words(member))


def in_words(member: Unread) -> str:
    """Describe an unread member for a message."""
    return f"{member.name!r} at byte {member.offset}, {member.kind}"


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
                f"shard {path} at byte {member.offset}: sample key {key!r} occurs twice, with other samples in between",
                hint="a sample's files must be adjacent and its key unique within the shard: pack the shard again",
            )
        fields = samples.setdefault(key, {})
        if extension in fields:
            raise ShardError(
                f"shard {path} at byte {member.offset}: sample {key!r} has field {extension!r} twice",
                hint="pack the shard again with one file per field",
            )
        fields[extension] = (member.offset, member.size)
        last = key
    return samples


def split_name(name: str) -> tuple[str, str] | None:
    """Return a member's key and extension by WebDataset's rule, or None if it belongs to no sample."""
    name = name.removeprefix("./")
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or not extension or _META.match(name):
        return None
    return f"{folder}{slash}{stem}", extension.lower()


def _table(samples: dict[str, dict[str, tuple[int, int]]]) -> ShardTable:
    fields = tuple(dict.fromkeys(field for sample in samples.values() for field in sample))
    absent = (-1, -1)
    rows = [[sample.get(field, absent) for field in fields] for sample in samples.values()]
    spans = np.array(rows, dtype=np.int64).reshape(len(samples), len(fields), 2)
    return ShardTable(list(samples), fields, np.ascontiguousarray(spans[:, :, 0]), np.ascontiguousarray(spans[:, :, 1]))


def sidecar_is_fresh(path: str) -> bool:
    """Return whether a shard has a sidecar that is no older than itself."""
    try:
        return os.stat(sidecar_path(path)).st_mtime_ns >= os.stat(path).st_mtime_ns
    except OSError:
        return False


def sidecar_count(path: str) -> int | None:
    """Return the number of samples that a fresh sidecar claims, or None."""
    if not sidecar_is_fresh(path):
        return None
    try:
        with open_regular(sidecar_path(path)) as file:
            version, _, count = file.readline(_HEAD_BYTES).decode("ascii", "replace").strip().partition(" ")
    except (OSError, ReadError):
        return None
    return int(count) if version == SIDECAR_VERSION and re.fullmatch("[1-9][0-9]{0,17}", count) else None


def read_sidecar(path: str) -> ShardTable | None:
    """Return the table in a shard's sidecar, fresh or not; None if it does not parse or points outside the shard."""
    size_bytes = os.stat(path).st_size
    try:
        # A line names members, each of which takes at least one block of the shard.
        with open_regular(sidecar_path(path), limit=max(_LEAST_BYTES, 2 * size_bytes)) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape")
            return parse_sidecar(text, size_bytes=size_bytes)
    except ReadError:
        return None


def parse_sidecar(lines: Iterable[str], *, size_bytes: int) -> ShardTable | None:
    """Return the table in a sidecar's lines; None if they do not parse or point outside a shard of that size."""
    rows = list(lines)
    try:
        version, count_text = rows[0].split()
        count = int(count_text) if version == SIDECAR_VERSION else -1
    except (ValueError, IndexError):
        return None
    return _parse_regular(rows[1:], count, size_bytes) or _parse_rows(rows[1:], count, size_bytes)


def _parse_regular(rows: list[str], count: int, size_bytes: int) -> ShardTable | None:
    """Parse rows that all have the same fields, column by column; return None for any others.

    Several times as fast as row by row, and on the critical path of a run's first batch.
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
    """Parse arbitrary rows, one by one."""
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
    """Return a table in sidecar format; None if that cannot represent it: white space in a name, or links."""
    offsets = table.offsets[table.offsets >= 0]
    if table.unread.number or len(np.unique(offsets)) < len(offsets):  # a hard link has the offset of another member
        return None
    lines = [f"{SIDECAR_VERSION} {len(table)}"]
    for key, spans in table.spans().items():
        words = [f"{field} {offset} {size} {key}.{field}" for field, (offset, size) in spans.items()]
        lines.append(" ".join(words))
        if len(lines[-1].split()) != 4 * len(words):
            return None
    return "\n".join(lines) + "\n"


def write_sidecar_file(path: str, table: ShardTable) -> bool:
    """Write a shard's sidecar atomically.

    Returns:
        Whether it was written. It is not if the folder is read-only, or if a name holds white space or the shard holds
        links, which the format cannot represent (the headers are then read at each start).
    """
    text, place = sidecar_text(table), sidecar_path(path)
    try:
        if text is not None:
            write_atomically(place, text)
        elif fitting_sidecar(path)[1]:
            # Another tool's sidecar does not match. Keep it, but make it older than its shard, so that it is ignored.
            os.utime(place, ns=(os.stat(path).st_mtime_ns - _OLDER_NS,) * 2)
    except OSError:
        return False
    return text is not None


def state_of(path: str) -> tuple[int, int, int]:
    """Return a file's size, mtime and ctime; no program can set the ctime, so any change shows."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def build_sidecar(path: str) -> tuple[ShardTable, bool]:
    """Build a shard's table from its headers and write it as sidecar; also return whether that was possible.

    Raises:
        ShardError: as :func:`build_table`, or the shard was modified during the read.
    """
    before = state_of(path)
    table = build_table(path)
    if state_of(path) != before:
        raise ShardError(f"shard {path} was written to while it was read", hint="run this once its writer is done")
    return table, write_sidecar_file(path, table)
