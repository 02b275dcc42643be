"""``disttrain shards ls`` and ``disttrain shards stats``: show the content of a data set.

Writes nothing except the local copies of remote shards' tables, as any reader does. Cost: reads the tables of all
shards; ``stats --classes`` also reads the classes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from disttrain.data.index.parallel_map import together
from disttrain.data.index.patterns import is_manifest, places
from disttrain.data.index.shard_index import Shard, ShardIndex, parse_manifest
from disttrain.data.index.sidecar import ShardTable
from disttrain.data.remote.ranges import shown
from disttrain.data.verify.statistics import Sizes, Statistics, count_values, in_order
from disttrain.errors import DataError
from disttrain.system.terminal import cell, say

_UNFOLDED: Final = 100_000
_BAR: Final = 40
_CLASSES_SHOWN: Final = 40


def ls(arguments: argparse.Namespace) -> int:
    """List shards or samples; return 0."""
    index = ShardIndex.open(arguments.data, write_sidecars=False)
    if arguments.samples:
        for shard, found in _tables(index):
            for key, spans in found.spans().items():
                sizes = (f"{field}:{n}" for field, (_, n) in spans.items())
                say(" ".join([shown(shard.path), key, *sizes]), flush=False)
        return 0
    total = 0
    table = Table(show_footer=True)
    table.add_column("shard", footer=count(len(index.shards), "shard"), overflow="fold")
    table.add_column("samples", footer=f"{len(index):,}", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("fields")
    for shard, found in _tables(index):
        size = _size(shard)
        total += size
        fields = cell(", ".join(found.fields))
        table.add_row(cell(shown(shard.path)), f"{shard.num_samples:,}", f"{size:,}", fields)
    table.columns[2].footer = f"{total:,}"
    _console().print(table)
    return 0


def stats(arguments: argparse.Namespace) -> int:
    """Show sizes by field, histograms and classes; return 0."""
    index = ShardIndex.open(arguments.data, write_sidecars=False)
    numbers = Statistics()
    for shard, found in _tables(index):
        numbers.add(found, _size(shard))
    console = _console()
    fewest, most = numbers.per_shard
    each = f"{fewest:,} to {most:,}" if fewest < most else f"{most:,}"
    console.print(
        f"{summary(index.shards)}, {each} per shard\n{_bytes(numbers.shards.total)} in shards, of which"
        f" {_bytes(numbers.samples.total)} in samples, the rest in headers and padding",
        highlight=False,
    )
    table = Table()
    table.add_column("field")
    for title in ("samples", "smallest", "mean", "largest", "all"):
        table.add_column(title, justify="right")
    for name, sizes in numbers.fields.items():
        columns = (_bytes(sizes.min), _bytes(sizes.mean), _bytes(sizes.max), _bytes(sizes.total))
        table.add_row(cell(name), f"{sizes.count:,}", *columns)
    console.print(table)
    _histogram(console, "bytes per sample", numbers.samples)
    _histogram(console, "bytes per shard", numbers.shards)
    if arguments.classes:
        _classes(console, index, tuple(numbers.fields))
    return 0


def _histogram(console: Console, title: str, sizes: Sizes) -> None:
    rows = [
        (_bytes(low) if low == high else f"{_bytes(low)} to {_bytes(high)}", number)
        for low, high, number in sizes.histogram()
    ]
    _bars(console, title, rows)


def _classes(console: Console, index: ShardIndex, fields: Sequence[str]) -> None:
    name = next((field for field in fields if field.rpartition(".")[2] in ("cls", "index")), None)
    if name is None:
        raise DataError(f"the samples have no field cls; they have {', '.join(fields)}", hint="omit --classes")
    found: Counter[str] = Counter()
    jobs = range(len(index.shards))
    for counts in together(lambda n: count_values(index.shards[n], index.table(n), name), jobs, label="counting"):
        found.update(counts)
    rows = in_order(found)
    if len(rows) > _CLASSES_SHOWN:
        rows = found.most_common(_CLASSES_SHOWN)
    left_out = len(found) - len(rows)
    which = f", the {len(rows)} most frequent" if left_out else ""
    _bars(console, f"samples by {name}: {len(found):,} classes{which}", rows)


def _bars(console: Console, title: str, rows: Sequence[tuple[str, int]]) -> None:
    """Print labelled numbers with proportional bars."""
    block = "█" if console.encoding.startswith("utf") else "#"
    most = max((number for _, number in rows), default=1)
    table = Table(title=cell(title), title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(justify="right", overflow="fold")
    table.add_column(justify="right")
    table.add_column(no_wrap=True)
    for label, number in rows:
        length = max(1, round(_BAR * number / most)) if number else 0
        table.add_row(cell(label), f"{number:,}", block * length)
    console.print()
    console.print(table)


def _tables(index: ShardIndex) -> Iterator[tuple[Shard, ShardTable]]:
    """Yield each shard with its table, in order."""
    are_local = not any(shard.is_remote for shard in index.shards)
    tables = together(index.table, range(len(index.shards)), quick=are_local, label="reading tables")
    return zip(index.shards, tables, strict=True)


def _size(shard: Shard) -> int:
    return shard.size_bytes if shard.size_bytes >= 0 else Path(shard.path).stat().st_size


def _console() -> Console:
    console = Console()
    # A pipe has no width, so nothing is folded or cut there.
    return console if console.is_terminal else Console(width=_UNFOLDED)


def _bytes(number: float) -> str:
    """Format a byte count with about three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1000 or (unit == "B" and number < 10_000):
            return f"{number:,.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.3g} TiB" if number < 1000 else f"{number:,.0f} TiB"


def count(number: int | str, noun: str) -> str:
    """Format a number with its noun, in the plural where needed."""
    text = number if isinstance(number, str) else f"{number}"
    return f"{text} {noun}" if number == 1 else f"{text} {noun}s"


def summary(shards: Sequence[Shard]) -> str:
    """Format the numbers of shards and samples."""
    return f"{count(len(shards), 'shard')}, {count(sum(shard.num_samples for shard in shards), 'sample')}"


def named(specs: Sequence[str]) -> list[Shard]:
    """List the shards that patterns and manifests name. Fields that only a manifest knows are -1 or empty for the rest.

    Raises:
        DataError: no shards are named, or a file is missing.
    """
    shards: list[Shard] = []
    for spec in specs:
        for place in places(spec):
            shards += parse_manifest(place) if is_manifest(place) else [Shard(place, -1, -1)]
    if not shards:
        raise DataError(f"{' '.join(map(shown, specs))} matches no shards", hint="correct the pattern")
    return shards
