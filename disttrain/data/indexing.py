"""Indexing shards: a sidecar for each, their numbers for a manifest, and nothing read that is known.

A local shard whose sidecar is no older than it and fits it (:func:`~disttrain.data.sidecar.fitting_sidecar`) is
not read again; nor is a remote one whose table is kept for the version that its server tells. An MD5 that a
manifest records is taken over where neither content nor entry of the shard's file has changed since before the
manifest was written, which a copied or restored date cannot hide. Cost of an unchanged shard: its sidecar and
three reads, or one request.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from disttrain.beats import beat
from disttrain.data.index import FileState, Shard, parse_manifest
from disttrain.data.remote import RemoteFile, is_remote
from disttrain.data.remote_index import REQUESTS_AT_ONCE, describe_remote, kept_md5, remote_md5
from disttrain.data.sidecar import ShardTable, build_sidecar, build_table, fitting_sidecar, state_of
from disttrain.data.together import together
from disttrain.data.write import md5_of
from disttrain.errors import DataError, ShardError

STATES: Final = ("written", "right", "unchanged", "not writable")


@dataclass(frozen=True)
class Indexed:
    """What indexing found and did.

    Attributes:
        shards: the shards, in order.
        sidecars: how many sidecars of local shards are ``unchanged``, their shard not read again; ``right``, as
            reading the shard again proved; ``written``; or ``not writable``, because the folder is read-only or
            a key holds white space.
        kept: likewise the tables that are kept of remote shards.
        num_hashed: shards that were read for their MD5.
    """

    shards: tuple[Shard, ...]
    sidecars: Counter[str]
    kept: Counter[str]
    num_hashed: int


def index_shards(
    paths: Sequence[str], *, manifest: Path | None = None, md5: bool = False, anew: bool = False, progress: bool = False
) -> Indexed:
    """Index shards by path or URL, several at a time.

    Args:
        paths: the shards.
        manifest: where a manifest may be whose MD5s serve again.
        md5: hash the shards that no MD5 is known of (reads all their bytes).
        anew: read and hash everything, whatever is known.
        progress: show it on standard error.

    Raises:
        ShardError: a shard cannot be read, said of the first once the others are indexed; or was written to
            meanwhile.
        DataError: there is a file where the manifest may be, but it is none.
    """
    local = [path for path in paths if not is_remote(path)]
    before = list(together(_state, local, quick=True))
    known = _known_md5s(manifest) if manifest is not None and not anew else {}

    def one(path: str) -> tuple[Shard, str] | ShardError:
        try:
            return _remote(path, anew=anew) if is_remote(path) else _local(path, anew=anew)
        except ShardError as error:
            return error
        finally:
            beat()

    are_local = len(local) == len(paths)
    threads = 8 if are_local else REQUESTS_AT_ONCE
    done = list(together(one, paths, threads=threads, quick=are_local, told="indexing" if progress else ""))
    failed = [result for result in done if isinstance(result, ShardError)]
    if failed:
        others = f" (and {len(failed) - 1} more; `disttrain shards verify` names all faults)" if failed[1:] else ""
        raise ShardError(f"{failed[0].what}{others}", mend=failed[0].mend)
    found = [result for result in done if not isinstance(result, ShardError)]
    told = "hashing" if progress else ""
    shards, num_hashed = _with_md5s([shard for shard, _ in found], known, hash_others=md5, anew=anew, told=told)
    for path, was, is_now in zip(local, before, together(_state, local, quick=True), strict=True):
        if is_now != was:
            raise ShardError(f"shard {path} was written to while it was read", mend="index when its writer is done")
    sidecars = Counter(state for shard, state in found if not shard.is_remote)
    kept = Counter(state for shard, state in found if shard.is_remote)
    return Indexed(tuple(shards), sidecars, kept, num_hashed)


def _remote(url: str, *, anew: bool) -> tuple[Shard, str]:
    found = describe_remote(url, anew=anew)
    return Shard(url, found.num_samples, found.size_bytes, version=found.version, unread=found.unread), found.state


def _local(path: str, *, anew: bool) -> tuple[Shard, str]:
    table, _ = fitting_sidecar(path)
    if table is not None and not anew:
        state = "unchanged"
    elif table is not None and _same(table, build_table(path)):
        state = "right"
    else:
        table, is_written = build_sidecar(path)
        state = "written" if is_written else "not writable"
    status = os.stat(path)
    return Shard(path, len(table), status.st_size, state=FileState.of(status), unread=table.unread), state


def _same(one: ShardTable, other: ShardTable) -> bool:
    return list(one.spans().items()) == list(other.spans().items())


def _with_md5s(
    shards: Sequence[Shard], known: Mapping[str, str], *, hash_others: bool, anew: bool, told: str
) -> tuple[list[Shard], int]:
    """The shards with the MD5s that are known and, if asked for, those of the others; and how many were hashed."""
    digests = []
    for shard in shards:
        recorded = known.get(_place(shard.path), "")
        if shard.is_remote:
            # What a manifest says of a remote file is taken over if it is known to be that of its present version.
            kept = "" if anew else kept_md5(shard.path, shard.size_bytes, shard.version)
            recorded = kept if hash_others or kept == recorded else ""
        digests.append(recorded)
    unknown = [number for number, digest in enumerate(digests) if not digest] if hash_others else []
    hashes = together(_md5, [shards[number] for number in unknown], told=told if unknown else "")
    for number, digest in zip(unknown, hashes, strict=True):
        digests[number] = digest
    return [replace(shard, md5=digest) for shard, digest in zip(shards, digests, strict=True)], len(unknown)


def _md5(shard: Shard) -> str:
    if shard.is_remote:
        return remote_md5(RemoteFile(shard.path, size=shard.size_bytes, version=shard.version))
    return md5_of(shard.path, shard.size_bytes)


def _known_md5s(manifest: Path) -> dict[str, str]:
    """The MD5s, by place, that a manifest records of remote shards, and of local ones that have not changed since."""
    if not manifest.exists():
        return {}
    try:
        listed = parse_manifest(manifest)
    except DataError as error:
        raise DataError(error.what, mend="remove it, or choose another name for the manifest") from None
    written = os.stat(manifest).st_mtime_ns
    recorded = [shard for shard in listed if shard.md5]
    states = together(_state, [shard.path for shard in recorded], quick=True)
    return {
        _place(shard.path): shard.md5
        for shard, (size, *times) in zip(recorded, states, strict=True)
        if shard.is_remote or (size == shard.size_bytes and max(times) < written)
    }


def _place(path: str) -> str:
    """One name for a shard, however its path is written."""
    return path if is_remote(path) else os.path.abspath(path)


def _state(path: str) -> tuple[int, int, int]:
    """As :func:`~disttrain.data.sidecar.state_of`, also of what cannot be read: that is told when it is."""
    try:
        return state_of(path)
    except OSError:
        return -1, 0, 0
