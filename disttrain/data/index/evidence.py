"""Detect shards that were replaced since a run began, from evidence stored in its checkpoints.

The order of samples does not depend on the contents of shards: a different shard with the same name and number of
samples, or the same shard listed twice, gives a valid order. A checkpoint therefore also stores a stamp of every shard
(size and modification time; for a remote shard the server's version, or else its MD5) and checksums of contents (four
4 KiB pieces, headers included; for a remote shard the MD5 in its manifest). A resume accepts shards with equal stamps.
For other shards it compares the checksums: copied or touched data passes, and replaced data is an error if those pieces
differ.

Cost: stamps are free once an index is open. Contents of at most 1,024 shards, evenly spread, are read at the start (by
rank 0) and when a resume finds other stamps: 4,096 reads, in threads. A checkpoint grows by 8 bytes of text per shard,
up to 128 KiB; beyond 16,384 shards, neighboring shards share a stamp.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from disttrain.data.index.parallel_map import together
from disttrain.data.index.shard_index import NOT_READ, FileState, Shard, ShardIndex
from disttrain.data.remote.ranges import shown
from disttrain.errors import CheckpointError

_MOST_STAMPS: Final = 16_384
_MOST_READ: Final = 1024
_PIECES: Final = 4
_PIECE_BYTES: Final = 4096
_TAIL_BYTES: Final = 10_240  # tar pads an archive with zeros to a multiple of this
_DIGITS: Final = 8
_UNKNOWN: Final = "-" * _DIGITS


def notices(index: ShardIndex) -> Iterator[str]:
    """Return warnings about the shards of an index, for the start of a run."""
    unread = [shard for shard in index.shards if shard.unread.number]
    if unread:
        total = sum(shard.unread.number for shard in unread)
        others = f", one of {total} in {len(unread)} shards" if total > 1 else ""
        yield f"{index.name}: shard {shown(unread[0].path)} holds {unread[0].unread.first}{others}: {NOT_READ}"
    first: dict[FileState | str, Shard] = {}
    twice: list[tuple[Shard, Shard]] = []
    for shard in index.shards:
        # Identify a local file by its inode, which is the same for every spelling of its path and every link.
        identity = shard.state if shard.state is not None and shard.state.inode else shard.path
        if identity in first:
            twice.append((first[identity], shard))
        else:
            first[identity] = shard
    if twice:
        (one, again), more = twice[0], f" (and {len(twice) - 1} more)" if twice[1:] else ""
        as_what = f", also as {shown(again.path)}" if again.path != one.path else ""
        yield (
            f"{index.name} lists shard {shown(one.path)} twice{as_what}{more}: its samples occur twice per epoch;"
            " correct the patterns if this is not intended"
        )


def evidence(index: ShardIndex, *, reads_contents: bool) -> dict[str, Any]:
    """Return what a checkpoint stores about the shards of an index, for :func:`check_evidence`.

    Args:
        index: the shards.
        reads_contents: whether to compute the checksums of contents, which reads pieces of local shards.
    """
    shards = index.shards
    contents = _contents(shards, _read_of(len(shards))) if reads_contents else []
    return {"count": len(shards), "stamps": "".join(_stamps(shards)), "contents": "".join(contents)}


def check_evidence(saved: Mapping[str, Any], index: ShardIndex) -> str:
    """Compare the shards of an index with a checkpoint's evidence; their names and sizes must already match.

    Returns:
        A warning; empty if all stamps are the same.

    Raises:
        CheckpointError: a shard's contents differ.
    """
    shards = index.shards
    before, now = _cut(saved.get("stamps")), _stamps(shards)
    if saved.get("count") != len(shards) or len(before) != len(now):
        return ""
    group = _group(len(shards))
    changed = [number for number in range(len(shards)) if before[number // group] != now[number // group]]
    if not changed:
        return ""
    places = _read_of(len(shards))
    known = dict(zip(places, _cut(saved.get("contents")), strict=False))
    wanted = [number for number in changed if known.get(number, _UNKNOWN) != _UNKNOWN]
    found = dict(zip(wanted, _contents(shards, wanted), strict=True))
    compared = [number for number in wanted if found[number][0] == known[number][0]]  # both pieces, or both MD5s
    other = [number for number in compared if known[number] != found[number]]
    if other:
        more = f" (and {len(other) - 1} more)" if other[1:] else ""
        raise CheckpointError(
            f"{index.name}: shard {shown(shards[other[0]].path)}{more} was replaced since the checkpoint was written:"
            " it has the same name and number of samples, but different contents",
            hint="restore the shards that the run started with; to train on the new ones, start a new run from this"
            " run's weights with --initialize_from",
        )
    outcome = (
        f"parts of {len(compared)} of them were compared and match"
        if compared
        else "none could be compared, so their contents may differ"
    )
    return (
        f"{index.name}: {len(changed)} of {len(shards)} shards, such as {shown(shards[changed[0]].path)}, were written"
        f" or copied after the checkpoint; {outcome}"
    )


def check_appended(saved: Mapping[str, Any], names_hash: str, index: ShardIndex) -> None:
    """Reject an index that appends shards to those of a checkpoint.

    The order of samples is a function of all shards: with more of them, every step would draw different samples and an
    epoch would have a different length.

    Args:
        saved: the checkpoint's :func:`evidence`.
        names_hash: the checkpoint's hash of its shards' names.
        index: the shards of this run.

    Raises:
        CheckpointError: shards were appended.
    """
    count = saved.get("count")
    if not isinstance(count, int) or not 0 < count < len(index.shards):
        return
    if ShardIndex(index.shards[:count], name=index.name).names_hash() == names_hash:
        more = len(index.shards) - count
        raise CheckpointError(
            f"{index.name}: the run started with {count} of these shards, and {more} {'was' if more == 1 else 'were'}"
            f" appended since, from {shown(index.shards[count].path)} on, which changes the order of samples",
            hint=f"finish the run on its first {count} shards, start over with --resume never, or start a new run"
            " from this run's weights with --initialize_from",
        )


def _group(count: int) -> int:
    """Return how many neighboring shards share a stamp."""
    return max(1, -(-count // _MOST_STAMPS))


def _stamps(shards: Sequence[Shard]) -> list[str]:
    group = _group(len(shards))
    texts = [
        f"{shard.size_bytes}:{shard.version or shard.md5 if shard.state is None else shard.state.mtime_ns}"
        for shard in shards
    ]
    return [_digest("\n".join(texts[start : start + group]).encode()) for start in range(0, len(texts), group)]


def _read_of(count: int) -> list[int]:
    """Return the numbers of the shards whose contents are checked."""
    found: list[int] = np.unique(np.linspace(0, count - 1, min(count, _MOST_READ)).astype(np.int64)).tolist()
    return found


def _contents(shards: Sequence[Shard], places: Sequence[int]) -> list[str]:
    return list(together(lambda number: _content(shards[number]), places, quick=True))


def _content(shard: Shard) -> str:
    """Return a checksum of a shard's contents; unknown if it is remote without an MD5, or cannot be read."""
    if shard.is_remote:
        return f"m{_digest(shard.md5.encode())[1:]}" if shard.md5 else _UNKNOWN
    try:
        descriptor = os.open(shard.path, os.O_RDONLY)
        try:
            last = max(0, shard.size_bytes - _PIECE_BYTES - _TAIL_BYTES)
            starts = sorted({last * piece // (_PIECES - 1) for piece in range(_PIECES)})
            return "p" + _digest(b"".join(os.pread(descriptor, _PIECE_BYTES, start) for start in starts))[1:]
        finally:
            os.close(descriptor)
    except OSError:  # reported when training reads the shard
        return _UNKNOWN


def _digest(data: bytes) -> str:
    return f"{zlib.crc32(data):0{_DIGITS}x}"


def _cut(text: object) -> list[str]:
    found = text if isinstance(text, str) else ""
    return [found[start : start + _DIGITS] for start in range(0, len(found), _DIGITS)]
