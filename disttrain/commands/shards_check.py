"""``disttrain shards index`` and ``disttrain shards verify``: process several shards at a time, with progress.

``index`` raises the first fault as an error. ``verify`` prints every fault as it is found, then keys that occur in
several shards, and returns 1 if there are faults. Imports PyTorch only if ``verify`` decodes samples.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from disttrain.commands.shards_show import count, named, summary
from disttrain.data.index.build import STATES, index_shards
from disttrain.data.index.evidence import notices
from disttrain.data.index.parallel_map import together
from disttrain.data.index.remote_index import index_folder
from disttrain.data.index.shard_index import ShardIndex, write_manifest
from disttrain.data.remote.ranges import shown
from disttrain.data.verify.keys import Keys
from disttrain.data.verify.shards import first_fields, shard_faults
from disttrain.errors import ConfigError, DataError
from disttrain.system.terminal import redacted, say

if TYPE_CHECKING:
    from disttrain.data.verify.decode_check import Decoders

_THREADS: Final = 8
_REPEATS_SHOWN: Final = 5


def index(arguments: argparse.Namespace) -> int:
    """Write sidecars and, on request, a manifest; return 0."""
    manifest: Path | None = arguments.manifest
    if arguments.md5 and manifest is None:
        raise ConfigError("--md5 needs a manifest to write to", hint="add --manifest FILE")
    if manifest is not None and not manifest.parent.is_dir():
        raise DataError(f"folder {manifest.parent} does not exist", hint="create it, or correct --manifest")
    paths = [shard.path for shard in named(arguments.data)]
    found = index_shards(paths, manifest=manifest, md5=arguments.md5, anew=arguments.force, progress=True)
    say("; ".join([summary(found.shards), *_state_counts(found.sidecars, found.kept)]))
    if found.sidecars["not writable"] or found.kept["not writable"]:
        why = "if the folder is read-only, a key contains white space or the shard contains links"
        say(f"note: no sidecar is written {why}; headers are read instead")
    for notice in notices(ShardIndex(found.shards)):
        say(f"note: {notice}")
    if manifest is not None:
        try:
            write_manifest(manifest, found.shards, name=manifest.stem)
        except OSError as error:
            raise DataError(f"cannot write {manifest}: {error.strerror}", hint="choose another path") from None
        known = sum(bool(shard.md5) for shard in found.shards) - found.num_hashed
        hashes = {"hashed": found.num_hashed, "MD5 unchanged": known}
        details = ", ".join(f"{number} {what}" for what, number in hashes.items() if number)
        say(f"manifest: {manifest}{f' ({details})' if details else ''}")
        if any(redacted(shard.path) != shard.path for shard in found.shards):
            say("note: it contains URLs with a query or a user name, which may be secrets; only you can read it")
    return 0


def _state_counts(sidecars: Counter[str], kept: Counter[str]) -> Iterator[str]:
    for what, states in (("sidecars", sidecars), (f"tables kept in {index_folder()}", kept)):
        if states:
            yield f"{what}: {', '.join(f'{states[state]} {state}' for state in STATES if states[state])}"


def verify(arguments: argparse.Namespace) -> int:
    """Print every fault; return 1 if there are any, else 0."""
    shards = named(arguments.data)
    wanted = [name.strip().partition(":") for name in (arguments.fields or "").split(",") if name.strip()]
    decoders = None if arguments.no_decode else _decoders(wanted)
    fields = [name for name, _, _ in wanted] or first_fields(shard.path for shard in shards)
    keys = Keys(shards)

    def check(number: int) -> tuple[list[str], int]:
        return shard_faults(shards[number], fields=fields, decoding=decoders, tell_keys=partial(keys.add, number))

    num_faults = num_samples = 0
    for faults, samples in together(check, range(len(shards)), threads=_THREADS, label="verifying"):
        for fault in faults:
            say(fault)
        num_faults += len(faults)
        num_samples += samples
    _print_repeats(keys)
    for why in decoders.left_out.values() if decoders is not None else ():
        say(f"note: not decoded: {why}")
    say(f"{count(len(shards), 'shard')}, {count(num_samples, 'sample')}: {count(num_faults or 'no', 'fault')}")
    return 1 if num_faults else 0


def _print_repeats(keys: Keys) -> None:
    """List some keys that occur in several shards: often a mistake, but not a fault, as shards may count from 0."""
    repeats, total = keys.repeats(_REPEATS_SHOWN)
    for key, first, second in repeats:
        there = "which is listed twice" if first.path == second.path else f"and in shard {shown(second.path)}"
        say(f"note: key {key!r} is in shard {shown(first.path)}, {there}")
    if total > len(repeats):
        say(f"note: {count(total, 'key')} in total occur in more than one shard")


def _decoders(wanted: Sequence[tuple[str, str, str]]) -> Decoders:
    from disttrain.data.verify.decode_check import Decoders

    chosen = {ext.strip().lower(): kind for names, _, kind in wanted if kind for ext in names.split(";")}
    return Decoders(chosen)
