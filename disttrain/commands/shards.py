"""``disttrain shards``: pack data into tars, index them, check them, and show what they hold.

Each subcommand is one function over the parsed arguments. What a user can mend is raised as a
:class:`~disttrain.errors.DisttrainError`, which the caller prints; ``verify`` instead collects every fault and
returns 1. Shards are read by their headers, several at a time; ``verify`` also hashes those whose manifest
holds an MD5.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from disttrain.data.index import Shard, ShardIndex, describe_shard, expand, parse_manifest, write_manifest
from disttrain.data.pack import PackConfig, pack
from disttrain.data.remote import shown
from disttrain.data.sidecar import build_table, read_sidecar, sidecar_is_fresh, write_sidecar_file
from disttrain.data.sources import SKLEARN, open_source
from disttrain.data.verify import first_fields, shard_faults
from disttrain.data.write import md5_of
from disttrain.errors import ConfigError, DataError

_THREADS: Final = 8
_UNFOLDED: Final = 100_000
_DATA_HELP: Final = "a brace pattern ('train-{000000..000007}.tar'), a glob ('train-*.tar') or a manifest (train.json)"


def main(argv: list[str]) -> int:
    """Run one subcommand.

    Returns:
        The exit code: 0, or 1 where ``verify`` found faults.

    Raises:
        DisttrainError: what the user can mend.
        SystemExit: argparse's own, for ``--help`` (0) and wrong arguments (2).
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="disttrain shards", description="Pack data into WebDataset tars, index, check and show them."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_pack(commands)
    index = _add(
        commands,
        "index",
        _index,
        help="write sidecars and a manifest for tars",
        description="Read the headers of all shards, write the sidecars that are missing, stale or wrong, and, if"
        " asked, a manifest. The sidecars are in NVIDIA DALI's form, the manifest in WebDataset's wids form.",
    )
    index.add_argument("patterns", metavar="PATTERN", nargs="+", help=_DATA_HELP)
    index.add_argument("--manifest", metavar="FILE", type=Path, help="write a manifest, such as data/train.json")
    index.add_argument("--md5", action="store_true", help="record every shard's MD5 in it (reads all bytes)")
    verify = _add(
        commands,
        "verify",
        _verify,
        help="name every fault of a data set",
        description="Check every shard: truncation, a missing end block, keys that occur twice, missing fields, a"
        " stale or wrong sidecar, and what a manifest records (size, samples, MD5). Names all faults, each with"
        " shard, byte offset and sample key. Exit code 0 without faults, 1 with.",
    )
    verify.add_argument("data", metavar="PATTERN|MANIFEST", nargs="+", help=_DATA_HELP)
    verify.add_argument(
        "--fields",
        metavar="LIST",
        help="fields that every sample must have, such as 'image.npy,cls', alternatives as 'jpg;png,cls'"
        " (default: those of the first sample)",
    )
    show = _add(
        commands,
        "ls",
        _ls,
        help="show shards or samples",
        description="List the shards of a data set with samples, bytes and fields, or its samples.",
    )
    show.add_argument("data", metavar="PATTERN|MANIFEST", nargs="+", help=_DATA_HELP)
    show.add_argument("--samples", action="store_true", help="one line a sample: shard, key, bytes of each field")
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=description)
    parser.set_defaults(run=run)
    return parser


def _add_pack(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(
        commands,
        "pack",
        _pack,
        help="write data as tars, in train, val and test",
        description="Pack a source into tars with sidecars and a manifest for each split. The same source and options"
        " give the same bytes; what is already there is kept, and an interrupted packing goes on.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help=f"sklearn:NAME ({', '.join(SKLEARN)}), a folder of images by class (optionally under train/, val/ and"
        " test/), a .csv or a .parquet file",
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder to write to; made if it is not there")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--samples-per-shard", metavar="N", type=_positive, default=1000, help="at most N (default 1000)")
    size.add_argument(
        "--shards", metavar="N", type=_positive, default=0, help="N for train; val and test get as large ones"
    )
    parser.add_argument(
        "--split",
        metavar="FRACTIONS",
        type=_fractions,
        help="of train, val and test, stratified (default 0.7,0.15,0.15, or the source's own), or 'none'",
    )
    parser.add_argument("--split-seed", metavar="N", type=int, default=0, help="chooses the split (default 0)")
    parser.add_argument("--target", metavar="COLUMN", default="", help="of a table: the column to predict")
    parser.add_argument(
        "--features",
        metavar="LIST",
        default="",
        help="of a table: the columns to learn from (default: all others with numbers)",
    )
    parser.add_argument("--task", choices=("classification", "regression"), default="", help="what the target is")
    parser.add_argument(
        "--prefix", metavar="NAME", default="", help="NAME-train-000000.tar instead of train-000000.tar"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _fractions(text: str) -> tuple[float, ...]:
    if text == "none":
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'none' nor fractions such as 0.7,0.15,0.15") from None


def _pack(arguments: argparse.Namespace) -> int:
    features = [name.strip() for name in arguments.features.split(",") if name.strip()]
    source = open_source(arguments.source, target=arguments.target, task=arguments.task, features=features)
    config = PackConfig(
        samples_per_shard=arguments.samples_per_shard,
        num_shards=arguments.shards,
        fractions=arguments.split,
        split_seed=arguments.split_seed,
        prefix=arguments.prefix,
    )
    done = pack(source, out_dir=arguments.out_dir, config=config, progress=True)
    if done.was_complete:
        shards = [shard for split in done.splits.values() for shard in split.shards]
        print(f"{arguments.out_dir} holds this packing already: {_summary(shards)}; nothing to do")
        return 0
    for note in done.notes:
        print(f"note: {note}")
    for prefix, split in done.splits.items():
        kept = len(split.shards) - split.num_written
        was_there = f", {kept} kept from before" if kept else ""
        print(f"{prefix}: {_summary(split.shards)}{was_there} -> {split.manifest}")
    return 0


def _index(arguments: argparse.Namespace) -> int:
    manifest: Path | None = arguments.manifest
    if arguments.md5 and manifest is None:
        raise ConfigError("--md5 has no manifest to go into", mend="add --manifest FILE")
    if manifest is not None and not manifest.parent.is_dir():
        raise DataError(f"folder {manifest.parent} does not exist", mend="make it, or correct --manifest")
    paths = [shard.path for shard in _named(arguments.patterns)]
    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(pool.map(_index_one, paths))
        digests = list(pool.map(md5_of, paths)) if arguments.md5 else [""] * len(paths)
    shards = [replace(shard, md5=md5) for (shard, _), md5 in zip(results, digests, strict=True)]
    counts = {state: sum(found == state for _, found in results) for state in ("written", "right", "not writable")}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    print(f"{_summary(shards)}; sidecars: {told}")
    if counts["not writable"]:
        print("note: no sidecar where the folder is read-only or a key holds white space; headers are read instead")
    if manifest is not None:
        try:
            write_manifest(manifest, shards, name=manifest.stem)
        except OSError as error:
            raise DataError(f"cannot write {manifest}: {error.strerror}", mend="choose another place") from None
        print(f"manifest: {manifest}")
    return 0


def _index_one(path: str) -> tuple[Shard, str]:
    """A shard, and what became of its sidecar."""
    table = build_table(path)
    state = "right"
    there = read_sidecar(path) if sidecar_is_fresh(path) else None
    if there is None or there.spans() != table.spans():
        state = "written" if write_sidecar_file(path, table) else "not writable"
    return replace(describe_shard(path, write_sidecar=False), num_samples=len(table)), state


def _verify(arguments: argparse.Namespace) -> int:
    shards = _named(arguments.data)
    paths = [shard.path for shard in shards]
    fields = [name.strip() for name in arguments.fields.split(",")] if arguments.fields else first_fields(paths)
    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(pool.map(lambda shard: shard_faults(shard, fields=fields), shards))
    faults = [fault for found, _ in results for fault in found]
    for fault in faults:
        print(fault)
    samples = sum(count for _, count in results)
    print(f"{_count(len(shards), 'shard')}, {_count(samples, 'sample')}: {_count(len(faults) or 'no', 'fault')}")
    return 1 if faults else 0


def _ls(arguments: argparse.Namespace) -> int:
    index = ShardIndex.open(arguments.data, write_sidecars=False)
    if arguments.samples:
        for number, shard in enumerate(index.shards):
            for key, fields in index.table(number).spans().items():
                print(shard.path, key, *(f"{field}:{size}" for field, (_, size) in fields.items()))
        return 0
    sizes = [s.size_bytes if s.is_remote else Path(s.path).stat().st_size for s in index.shards]
    table = Table(show_footer=True)
    table.add_column("shard", footer=_count(len(sizes), "shard"), overflow="fold")
    table.add_column("samples", footer=f"{len(index):,}", justify="right")
    table.add_column("bytes", footer=f"{sum(sizes):,}", justify="right")
    table.add_column("fields")
    for number, (shard, size) in enumerate(zip(index.shards, sizes, strict=True)):
        table.add_row(shard.path, f"{shard.num_samples:,}", f"{size:,}", ", ".join(index.table(number).fields))
    console = Console()
    # A pipe has no width: nothing is folded or cut there.
    (console if console.is_terminal else Console(width=_UNFOLDED)).print(table)
    return 0


def _count(number: int | str, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _summary(shards: Sequence[Shard]) -> str:
    return f"{_count(len(shards), 'shard')}, {_count(sum(shard.num_samples for shard in shards), 'sample')}"


def _named(specs: Sequence[str]) -> list[Shard]:
    """The shards that patterns and manifests name; what only a manifest knows is -1 or empty for the others."""
    shards: list[Shard] = []
    for spec in specs:
        if spec.endswith(".json"):
            shards.extend(parse_manifest(spec))
        else:
            shards.extend(Shard(path, -1, -1) for path in expand(spec))
    remote = next((shard for shard in shards if shard.is_remote), None)
    if remote is not None:
        raise ConfigError(
            f"{shown(remote.path)} is remote; this subcommand reads local shards", mend="run it where the shards lie"
        )
    if not shards:
        raise DataError(f"{' '.join(specs)} names no shards", mend="correct the pattern")
    return shards
