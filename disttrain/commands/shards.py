"""``disttrain shards``: pack data into tar shards, index them, verify them, and show their content.

Defines the subcommands and their arguments. Packing is implemented here, the rest in
:mod:`disttrain.commands.shards_check` and :mod:`disttrain.commands.shards_show`; each subcommand is one function of the
parsed arguments. Errors that the user can fix are raised as :class:`~disttrain.errors.DisttrainError`; the caller
prints them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final

from disttrain.commands.shards_check import index, verify
from disttrain.commands.shards_show import ls, stats, summary
from disttrain.data.pack.packer import PackConfig, pack
from disttrain.data.pack.sources import SKLEARN, open_source
from disttrain.system.terminal import Parser, path_word, say

_DATA_HELP: Final = (
    "a brace pattern ('train-{000000..000007}.tar'), a glob ('train-*.tar') or a manifest (train.json); braces and"
    " manifests also as URLs"
)


def main(argv: list[str]) -> int:
    """Run one subcommand.

    Returns:
        The exit code: 0, or 1 if ``verify`` found faults.

    Raises:
        DisttrainError: an error that the user can fix.
        SystemExit: from argparse, for ``--help`` (0) and wrong arguments (2).
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="disttrain shards", description="Pack data into WebDataset tars, index, check and show them.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_pack(commands)
    _add_index(commands)
    _add_verify(commands)
    _add_ls(commands)
    _add_stats(commands)
    return parser


def _add(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=description)
    parser.set_defaults(run=run)
    return parser


def _add_pack(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _add(
        commands,
        "pack",
        _pack,
        help="pack data into tars, split into train, val and test",
        description="Pack a source into tars, with sidecars and one manifest per split. The same source and options"
        " give the same bytes; existing shards are kept, and an interrupted packing resumes when rerun.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help=f"sklearn:NAME ({', '.join(SKLEARN)}), a folder of images by class (optionally under train/, val/ and"
        " test/), a .csv or a .parquet file",
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", type=path_word, help="output folder; created if missing")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--samples-per-shard",
        metavar="N",
        type=_positive,
        default=1000,
        help="at most N samples per shard (default 1000)",
    )
    size.add_argument(
        "--shards",
        metavar="N",
        type=_positive,
        default=0,
        help="N shards for train; those of val and test get the same size",
    )
    parser.add_argument(
        "--split",
        metavar="FRACTIONS",
        type=_fractions,
        help="fractions for train, val and test, stratified, or 'none' (default: the source's own splits, else"
        " 0.7,0.15,0.15)",
    )
    parser.add_argument("--split-seed", metavar="N", type=int, default=0, help="seed of the split (default 0)")
    parser.add_argument("--target", metavar="COLUMN", default="", help="for tables: the column to predict")
    parser.add_argument(
        "--features",
        metavar="LIST",
        default="",
        help="for tables: the feature columns (default: all other numeric columns)",
    )
    parser.add_argument(
        "--task", choices=("classification", "regression"), default="", help="for tables: the kind of target"
    )
    parser.add_argument(
        "--prefix", metavar="NAME", default="", help="name files NAME-train-000000.tar instead of train-000000.tar"
    )


def _add_index(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _add(
        commands,
        "index",
        index,
        help="write sidecars and a manifest for tars",
        description="Write missing, stale or wrong sidecars from the tars' headers and, with --manifest, a manifest."
        " Unchanged shards are not read again. Sidecars are in NVIDIA DALI's format, the manifest in WebDataset's"
        " wids format. Remote shards are read by range requests, and their tables are kept on this machine.",
    )
    parser.add_argument("data", metavar="PATTERN|MANIFEST", nargs="+", help=_DATA_HELP)
    parser.add_argument("--manifest", metavar="FILE", type=path_word, help="write a manifest, such as data/train.json")
    parser.add_argument(
        "--md5",
        action="store_true",
        help="record every shard's MD5 in the manifest (reads all bytes, except of shards that have an MD5 in FILE"
        " and have not changed since)",
    )
    parser.add_argument("--force", action="store_true", help="read all shards again, changed or not")


def _add_verify(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _add(
        commands,
        "verify",
        verify,
        help="report every fault in a data set",
        description="Check every shard for truncation, a missing end block, duplicate keys, missing fields, fields"
        " that do not decode, a stale or wrong sidecar, and differences from the manifest (size, samples, MD5)."
        " Reports every fault with its shard, byte offset, sample key and field, and notes keys that occur in several"
        " shards. Exit code 0 if there are no faults, else 1.",
    )
    parser.add_argument("data", metavar="PATTERN|MANIFEST", nargs="+", help=_DATA_HELP)
    parser.add_argument(
        "--fields",
        metavar="LIST",
        help="fields that every sample must have, such as 'image.npy,cls'; separate alternatives by semicolons"
        " ('jpg;png,cls'), and append a decoder that does not follow from the extension ('cls:txt') (default: the"
        " fields of the first sample)",
    )
    parser.add_argument(
        "--no-decode",
        action="store_true",
        help="do not read the fields' contents, except for shards with an MD5 in the manifest",
    )


def _add_ls(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _add(
        commands,
        "ls",
        ls,
        help="show shards or samples",
        description="List the shards of a data set with their samples, bytes and fields, or list its samples.",
    )
    parser.add_argument("data", metavar="PATTERN|MANIFEST", nargs="+", help=_DATA_HELP)
    parser.add_argument(
        "--samples", action="store_true", help="print one line per sample: shard, key, bytes of each field"
    )


def _add_stats(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _add(
        commands,
        "stats",
        stats,
        help="show sizes by field, and histograms",
        description="Show samples, bytes, the sizes of each field, and histograms of the sizes of samples and shards.",
    )
    parser.add_argument("data", metavar="PATTERN|MANIFEST", nargs="+", help=_DATA_HELP)
    parser.add_argument(
        "--classes", action="store_true", help="also count the values of the cls field (reads those bytes)"
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
        say(f"{arguments.out_dir} already holds this packing: {summary(shards)}; nothing to do")
        return 0
    for note in done.notes:
        say(f"note: {note}")
    for prefix, split in done.splits.items():
        kept = len(split.shards) - split.num_written
        was_there = f", {kept} already present" if kept else ""
        say(f"{prefix}: {summary(split.shards)}{was_there} -> {split.manifest}")
    return 0
