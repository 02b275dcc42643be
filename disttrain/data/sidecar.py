"""The table of one shard: from its tar headers, and from the sidecar beside it.

A sidecar is NVIDIA DALI's ``wds2idx`` text form, version 1.2 (``train-000000.idx``): existing ones serve here
and ours serve DALI. A sample is a run of members with the same key (the path up to the first dot of its base
name), as WebDataset groups them; dot files, directories and members without an extension are skipped.

A sidecar is trusted only where it is no older than its shard, its members can lie in a tar one after the other,
and the shard's first, middle and last members are what it says, the last with nothing behind it, and so is the one
with most room before it, where other members might lie. So a shard that was rewritten under its old date is found
out too. A shard with hard links, or with links and devices that look like fields of a sample and are not read, has no
sidecar: the form has no place for either. Cost: a pass over the headers, or one over the sidecar's text and three or
four reads of the shard.
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

from disttrain.data.tar import ByteSource, LocalFile, Member, TarError, Unread, scan_source
from disttrain.data.tar_header import BLOCK
from disttrain.errors import ShardError
from disttrain.files import write_atomically
from disttrain.reading import ReadError, open_regular

SIDECAR_VERSION: Final = "v1.2"
_HEAD_BYTES: Final = 100
_LEAST_BYTES: Final = 2**20
_PROBE_BYTES: Final = 64 * 1024
_RECORD_BYTES: Final = 20 * BLOCK  # what tar pads an archive to: one read has the end block and all that follows
_OLDER_NS: Final = 3600 * 10**9
_META: Final = re.compile(r"__[^/]*__(/|$)")  # WebDataset's names for what is no sample


class UnreadFields(NamedTuple):
    """Members of a shard that look like fields of samples and are not read: how many, and the first, in words."""

    number: int = 0
    first: str = ""


ALL_READ: Final = UnreadFields()


@dataclass(frozen=True, eq=False)
class ShardTable:
    """Where the samples of one shard lie.

    Attributes:
        keys: the samples' keys.
        fields: the extensions that occur, lower case.
        offsets: byte offset of each field's content, -1 where a sample lacks it. shape (samples, fields)
        sizes: its size in bytes, -1 where absent. shape (samples, fields)
        unread: what is in the shard, but not here.
    """

    keys: list[str]
    fields: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    unread: UnreadFields = ALL_READ

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
    table, _ = fitting_sidecar(path)
    return table if table is not None else build_table(path)


def fitting_sidecar(path: str) -> tuple[ShardTable | None, str]:
    """The table in a shard's sidecar where that may be trusted; else None and what is wrong with the sidecar.

    Nothing is wrong with one that is not there, or older than its shard: those are expected and made anew.

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
    """Why a table cannot be that of a tar; empty where all that is looked at is as the table says.

    Looked at are the headers of its first, middle and last members, from where the members before them end, that of
    the member with most room before it, and what follows the last.
    """
    present = np.flatnonzero(table.offsets >= 0)
    present = present[np.argsort(table.offsets.ravel()[present])]
    offsets, sizes = table.offsets.ravel()[present], table.sizes.ravel()[present]
    starts = np.concatenate(([0], offsets[:-1] + -(-sizes[:-1] // BLOCK) * BLOCK))
    # In the order of the bytes, all fields of a sample follow each other, and the samples are in order.
    is_sorted = not (np.diff(present // max(1, len(table.fields))) < 0).any()
    if not len(present) or not is_sorted or (offsets % BLOCK).any() or (offsets - starts < BLOCK).any():
        return "no tar has its members so"
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
    """How what a tar holds from some place on differs from one member, and from nothing more ``to_end``."""
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
        return f"it does not tell of {unread.fields.first}"
    if not found or split_name(found[0].name) != split_name(expected.name) or found[0][1:] != expected[1:]:
        there = f"{found[0].name!r} at byte {found[0].offset} of size {found[0].size}" if found else "nothing there"
        return f"it says {expected.name!r} at byte {expected.offset} of size {expected.size}, the shard has {there}"
    return f"it does not list {found[1].name!r} at byte {found[1].offset}" if len(found) > 1 else ""


def build_table(shard: str | ByteSource) -> ShardTable:
    """A shard's table from its headers: those of a local path, or of anything that can be read by ranges.

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
            f"shard {shard.name} holds no samples{also}", mend="remove it from the pattern, or pack it again"
        )
    return replace(_table(samples), unread=unread.fields)


class _Unread:
    """Takes up what a scan does not read: of that, what looks like fields of samples."""

    def __init__(self) -> None:
        self.fields = ALL_READ

    def __call__(self, member: Unread) -> None:
        if split_name(member.name) is not None:
            self.fields = UnreadFields(self.fields.number + 1, self.fields.first or in_words(member))


def in_words(member: Unread) -> str:
    """A member that is not read, for a message."""
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
    """Whether a shard has a sidecar that is no older than itself."""
    try:
        return os.stat(sidecar_path(path)).st_mtime_ns >= os.stat(path).st_mtime_ns
    except OSError:
        return False


def sidecar_count(path: str) -> int | None:
    """Samples that a fresh sidecar claims, or None."""
    if not sidecar_is_fresh(path):
        return None
    try:
        with open_regular(sidecar_path(path)) as file:
            version, _, count = file.readline(_HEAD_BYTES).decode("ascii", "replace").strip().partition(" ")
    except (OSError, ReadError):
        return None
    return int(count) if version == SIDECAR_VERSION and re.fullmatch("[1-9][0-9]{0,17}", count) else None


def read_sidecar(path: str) -> ShardTable | None:
    """The table in a shard's sidecar, fresh or not; None where it does not parse or points outside the shard."""
    size_bytes = os.stat(path).st_size
    try:
        # A line names members, each of which takes a block of the shard at least.
        with open_regular(sidecar_path(path), limit=max(_LEAST_BYTES, 2 * size_bytes)) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape")
            return parse_sidecar(text, size_bytes=size_bytes)
    except ReadError:
        return None


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
    """A table in the sidecar's form; None where that cannot carry it: white space in a name, links."""
    offsets = table.offsets[table.offsets >= 0]
    if table.unread.number or len(np.unique(offsets)) < len(offsets):  # a hard link lies where another member does
        return None
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
        Whether it was written: not where the folder is read-only, nor where a name holds white space or the shard
        links, which the text form cannot carry (the headers are then read at each start).
    """
    text, place = sidecar_text(table), sidecar_path(path)
    try:
        if text is not None:
            write_atomically(place, text)
        elif fitting_sidecar(path)[1]:
            # One of another tool is in the way. It is made older than its shard, so that it is ignored, and kept.
            os.utime(place, ns=(os.stat(path).st_mtime_ns - _OLDER_NS,) * 2)
    except OSError:
        return False
    return text is not None


def state_of(path: str) -> tuple[int, int, int]:
    """What changes with a file: size, time of its content and time of its entry, which no program can set."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def build_sidecar(path: str) -> tuple[ShardTable, bool]:
    """A shard's table from its headers, written as its sidecar; and whether that could be written.

    Raises:
        ShardError: as :func:`build_table`, or the shard was written to meanwhile.
    """
    before = state_of(path)
    table = build_table(path)
    if state_of(path) != before:
        raise ShardError(f"shard {path} was written to while it was read", mend="run this when its writer is done")
    return table, write_sidecar_file(path, table)
