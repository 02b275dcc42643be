"""Index shards: write sidecars and collect the entries of a manifest, without rereading unchanged shards.

A local shard is not reread if its sidecar is at least as new and matches it
(:func:`~disttrain.data.index.sidecar.fitting_sidecar`); a remote shard is not reread if its table is cached for the
server's current version. An MD5 in a manifest is reused if the shard's mtime and ctime are both older than the
manifest; setting an old mtime cannot defeat this, because that updates the ctime. Cost of an unchanged shard: reading
its sidecar and three reads, or one request.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from disttrain.data.index.parallel_map import together
from disttrain.data.index.remote_index import REQUESTS_AT_ONCE, describe_remote, kept_md5, remote_md5
from disttrain.data.index.shard_index import FileState, Shard, parse_manifest
from disttrain.data.index.sidecar import ShardTable, build_sidecar, build_table, fitting_sidecar, state_of
from disttrain.data.remote.ranges import RemoteFile, is_remote
from disttrain.errors import DataError, ShardError
from disttrain.system.heartbeat import beat

STATES: Final = ("written", "right", "unchanged", "not writable")


@dataclass(frozen=True)
class Indexed:
    """The result of indexing.

    Attributes:
        shards: the shards, in order.
        sidecars: number of local shards per sidecar state: ``unchanged`` (the shard was not reread), ``right``
            (confirmed by rereading the shard), ``written``, or ``not writable`` (the folder is read-only, or a key
            contains white space).
        kept: the same for the cached tables of remote shards.
        num_hashed: number of shards read to compute their MD5.
    """

    shards: tuple[Shard, ...]
    sidecars: Counter[str]
    kept: Counter[str]
    num_hashed: int


def index_shards(
    paths: Sequence[str], *, manifest: Path | None = None, md5: bool = False, anew: bool = False, progress: bool = False
) -> Indexed:
    """Index shards by path or URL, several in parallel.

    Args:
        paths: the shards.
        manifest: path of a manifest whose MD5s may be reused; it need not exist.
        md5: hash the shards without a known MD5 (reads all their bytes).
        anew: reread and rehash everything.
        progress: show progress on standard error.

    Raises:
        ShardError: a shard cannot be read (names the first one, after the others are indexed), or was modified during
            indexing.
        DataError: ``manifest`` exists but is not a manifest.
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
    done = list(together(one, paths, threads=threads, quick=are_local, label="indexing" if progress else ""))
    failed = [result for result in done if isinstance(result, ShardError)]
    if failed:
        others = f" (and {len(failed) - 1} more; `disttrain shards verify` names all faults)" if failed[1:] else ""
        raise ShardError(f"{failed[0].what}{others}", hint=failed[0].hint)
    found = [result for result in done if not isinstance(result, ShardError)]
    label = "hashing" if progress else ""
    shards, num_hashed = _with_md5s([shard for shard, _ in found], known, hash_others=md5, anew=anew, label=label)
    for path, was, is_now in zip(local, before, together(_state, local, quick=True), strict=True):
        if is_now != was:
            raise ShardError(f"shard {path} was written to while it was read", hint="index it once its writer is done")
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
    shards: Sequence[Shard], known: Mapping[str, str], *, hash_others: bool, anew: bool, label: str
) -> tuple[list[Shard], int]:
    """Add known MD5s to the shards, hash the others if asked to, and count those hashed."""
    digests = []
    for shard in shards:
        recorded = known.get(_place(shard.path), "")
        if shard.is_remote:
            # Reuse a manifest's MD5 of a remote file only if it is known to belong to the current version.
            kept = "" if anew else kept_md5(shard.path, shard.size_bytes, shard.version)
            recorded = kept if hash_others or kept == recorded else ""
        digests.append(recorded)
    unknown = [number for number, digest in enumerate(digests) if not digest] if hash_others else []
    hashes = together(_md5, [shards[number] for number in unknown], label=label if unknown else "")
    for number, digest in zip(unknown, hashes, strict=True):
        digests[number] = digest
    return [replace(shard, md5=digest) for shard, digest in zip(shards, digests, strict=True)], len(unknown)


def _md5(shard: Shard) -> str:
    if shard.is_remote:
        return remote_md5(RemoteFile(shard.path, size=shard.size_bytes, version=shard.version))
    return md5_of(shard.path, shard.size_bytes)


def _known_md5s(manifest: Path) -> dict[str, str]:
    """Return a manifest's MD5s, by place, of remote shards and of local shards that have not changed since."""
    if not manifest.exists():
        return {}
    try:
        listed = parse_manifest(manifest)
    except DataError as error:
        raise DataError(error.what, hint="remove it, or choose another name for the manifest") from None
    written = os.stat(manifest).st_mtime_ns
    recorded = [shard for shard in listed if shard.md5]
    states = together(_state, [shard.path for shard in recorded], quick=True)
    return {
        _place(shard.path): shard.md5
        for shard, (size, *times) in zip(recorded, states, strict=True)
        if shard.is_remote or (size == shard.size_bytes and max(times) < written)
    }


def _place(path: str) -> str:
    """Return a canonical name for a shard's path."""
    return path if is_remote(path) else os.path.abspath(path)


def _state(path: str) -> tuple[int, int, int]:
    """Call :func:`~disttrain.data.index.sidecar.state_of`, ignoring errors: reading the shard reports them."""
    try:
        return state_of(path)
    except OSError:
        return -1, 0, 0


def md5_of(path: str, size_bytes: int | None = None) -> str:
    """Return the hexadecimal MD5 of a file; empty if it is missing or its size differs from the one given."""
    try:
        with open(path, "rb") as file:
            if size_bytes is not None and os.fstat(file.fileno()).st_size != size_bytes:
                return ""
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except FileNotFoundError:
        return ""
