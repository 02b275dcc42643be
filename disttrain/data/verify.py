"""Every fault of a shard, where reading would stop at the first.

Checked are the tar itself, its samples' keys and fields, its sidecar, and what a manifest records of it. Each
fault is one sentence with shard, byte offset and sample key as far as they apply. A tar that is damaged is
checked up to the damage. Cost: its headers, and all its bytes where an MD5 is recorded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from disttrain.data.index import Shard
from disttrain.data.sidecar import read_sidecar, sidecar_is_fresh, sidecar_path, split_name
from disttrain.data.tar import scan_members
from disttrain.data.write import md5_of
from disttrain.errors import ShardError, nearest

Spans = dict[str, dict[str, tuple[int, int]]]


def shard_faults(shard: Shard, *, fields: Sequence[str]) -> tuple[list[str], int]:
    """The faults of one shard and the number of its samples.

    Args:
        shard: a shard with what a manifest records of it: -1 or empty where nothing is.
        fields: what every sample must have; alternatives as ``jpg;png``.
    """
    path = shard.path
    if not Path(path).is_file():
        return [f"shard {path} does not exist"], 0
    faults: list[str] = []
    samples, is_whole = _read(path, faults)
    faults.extend(_missing_fields(path, samples if is_whole else _without_last(samples), fields))
    if sidecar_path(path).exists():
        # With a damaged tar there is nothing to compare its sidecar with.
        faults.extend(_sidecar_faults(path, samples if is_whole else None))
    size = os.stat(path).st_size
    if shard.size_bytes not in (-1, size):
        faults.append(f"shard {path} has {size} bytes, but its manifest says {shard.size_bytes}")
    elif shard.md5 and (found := md5_of(path)) != shard.md5:
        faults.append(f"shard {path} has MD5 {found}, but its manifest says {shard.md5}")
    if is_whole and shard.num_samples not in (-1, len(samples)):
        faults.append(f"shard {path} holds {len(samples)} samples, but its manifest says {shard.num_samples}")
    return faults, len(samples)


def first_fields(paths: Iterable[str]) -> tuple[str, ...]:
    """The fields of the first sample that can be read: what the others are expected to have."""
    for path in paths:
        samples: Spans = {}
        try:
            for member in scan_members(path):
                parts = split_name(member.name)
                if parts is None:
                    continue
                if samples and parts[0] not in samples:
                    break
                samples.setdefault(parts[0], {})[parts[1]] = (member.offset, member.size)
        except ShardError:
            continue  # named when its turn comes
        for fields in samples.values():
            return tuple(fields)
    return ()


def _read(path: str, faults: list[str]) -> tuple[Spans, bool]:
    """The samples up to the first damage, and whether there is none."""
    samples: Spans = {}
    last, is_repeat = None, False
    try:
        for member in scan_members(path):
            parts = split_name(member.name)
            if parts is None:
                continue
            key, field = parts
            place = f"shard {path} at byte {member.offset}: sample {key!r}"
            if key != last:
                is_repeat = key in samples
                if is_repeat:
                    faults.append(f"{place} occurs twice, apart")
            elif not is_repeat and field in samples[key]:
                faults.append(f"{place} has field {field!r} twice")
            if not is_repeat:
                samples.setdefault(key, {}).setdefault(field, (member.offset, member.size))
            last = key
    except ShardError as error:
        faults.append(error.what)
        return samples, False
    if not samples:
        faults.append(f"shard {path} holds no samples")
    return samples, True


def _without_last(samples: Spans) -> Spans:
    return dict(list(samples.items())[:-1])  # the sample that the damage cut off may lack fields for that reason


def _missing_fields(path: str, samples: Spans, fields: Sequence[str]) -> Iterator[str]:
    present = {field for sample in samples.values() for field in sample}
    for wanted in fields:
        alternatives = {field.strip().lower() for field in wanted.split(";")}
        if samples and not alternatives & present:
            yield f"shard {path}: no sample has field {wanted!r}; {nearest(wanted, present)}"
            continue
        for key, sample in samples.items():
            if not alternatives & set(sample):
                offset = next(iter(sample.values()))[0]
                yield f"shard {path} at byte {offset}: sample {key!r} lacks field {wanted!r}, has {', '.join(sample)}"


def _sidecar_faults(path: str, samples: Spans | None) -> Iterator[str]:
    sidecar = sidecar_path(path)
    if not sidecar_is_fresh(path):
        yield f"sidecar {sidecar} is older than its shard and not used: run `disttrain shards index`"
        return
    table = read_sidecar(path)
    if table is None:
        yield f"sidecar {sidecar} is damaged or points outside its shard: run `disttrain shards index`"
        return
    if samples is None:
        return
    claimed = table.spans()
    differing = [key for key in {**samples, **claimed} if samples.get(key) != claimed.get(key)]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more samples)" if len(differing) > 1 else ""
        yield (
            f"sidecar {sidecar} does not fit its shard: sample {key!r} is {_words(samples.get(key))} in the shard,"
            f" {_words(claimed.get(key))} in the sidecar{more}: run `disttrain shards index`"
        )


def _words(fields: dict[str, tuple[int, int]] | None) -> str:
    if fields is None:
        return "absent"
    return ", ".join(f"{field} at byte {offset} of size {size}" for field, (offset, size) in fields.items())
