"""Small samples: how fast disttrain's loader reads them, against webdataset's own.

Claim: from the same plain tars, disttrain's loader delivers shuffled batches at more than half of the rate at
which a Python loop can ``pread`` the payloads at all, which is many times the rate of webdataset's recommended
pipeline; and it starts in the middle of an epoch as fast as at its beginning.

Method: samples of 800 random bytes and a class number below 1,000 lie in shards of 1,000, in the page cache.
One repeat runs every contender once over a whole epoch in batches of 256, in an order that rotates from repeat
to repeat, so that other load on the machine falls on all. Both loaders shuffle, give tensors, and are checked
to deliver the right number of samples: webdataset all N, disttrain ``N // 256 * 256``. Each has run once
before it counts, and webdataset keeps its workers between epochs. The bounds are ``cat`` of the tars and one
``pread`` a payload in random order. 'First batch' counts from nothing (index, order, workers) to a batch, and
'resume' the same to the batch in the middle of an epoch; webdataset has no position, so it iterates to there.

How to read it: ratios within one run mean more than rates, which follow the machine. Samples this small show
the cost of the loader itself; where decoding or the disk costs more, the loaders come closer.

Run: ``python benchmarks/reader.py`` (some minutes; ``--samples 8000 --repeats 1`` for a first look).
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from matplotlib.figure import Figure

from disttrain.data.decode import Field
from disttrain.data.index import ShardIndex, load_table
from disttrain.data.loader import LoaderConfig, TrainLoader
from disttrain.data.order import Order, OrderConfig
from disttrain.data.reader import Reader
from disttrain.data.samples import Sample, Samples
from disttrain.data.write import write_shard
from disttrain.parallel.config import BatchPlan

SAMPLE_BYTES: Final = 800
SHARD_SAMPLES: Final = 1000
BATCH: Final = 256
WORKERS: Final = (0, 2)
OURS, THEIRS = "disttrain", "webdataset"
COLORS: Final = {OURS: "#1f6fb4", THEIRS: "#d9822b", "bound": "#b5b5b5"}
LABELS: Final = ("thousand samples/s; more is better", "milliseconds (log scale); less is better")

Results = dict[str, list[float]]


@dataclass(frozen=True)
class Data:
    """The shards to read: a folder of ``num_samples`` samples."""

    folder: Path
    num_samples: int

    @property
    def shards(self) -> list[str]:
        starts = range(0, self.num_samples, SHARD_SAMPLES)
        return [str(self.folder / f"train-{start // SHARD_SAMPLES:06d}.tar") for start in starts]

    @property
    def steps(self) -> int:
        return self.num_samples // BATCH

    def make(self) -> None:
        """Write the shards that are missing, each with its index beside it."""
        self.folder.mkdir(parents=True, exist_ok=True)

        def read(number: int) -> Sample:
            payload = np.random.default_rng(number).bytes(SAMPLE_BYTES)
            return Sample(f"{number:08d}", {"bin": payload, "cls": str(number % 1000).encode()})

        samples = Samples(self.num_samples, read)
        for number, path in enumerate(self.shards):
            ids = np.arange(number * SHARD_SAMPLES, min((number + 1) * SHARD_SAMPLES, self.num_samples))
            if not Path(path).exists():
                write_shard(samples, ids, Path(path), lambda _: None)


def disttrain_loader(data: Data, workers: int, step: int = 0) -> TrainLoader:
    epochs = count()  # each iteration is another epoch, in another order
    index = ShardIndex.open(data.shards)
    payload = Field(ext="bin", decoder="tensor", dtype="uint8", shape=(SAMPLE_BYTES,))
    reader = Reader(index, {"data": payload, "label": Field(ext="cls")})
    order, plan = Order(index.sizes, OrderConfig(global_batch_size=BATCH)), BatchPlan(BATCH, BATCH)
    config = LoaderConfig(threads=workers)
    return TrainLoader(reader, order, plan, config=config, position=lambda: (next(epochs), step))


def webdataset_loader(data: Data, workers: int, *, keep_workers: bool = False) -> Any:
    """The pipeline that webdataset's documentation recommends; its loader turns the arrays into tensors."""
    wds: Any = importlib.import_module("webdataset")
    dataset = wds.WebDataset(data.shards, shardshuffle=len(data.shards)).shuffle(1000).decode().to_tuple("bin", "cls")
    dataset = dataset.map_tuple(partial(np.frombuffer, dtype=np.uint8), int).batched(BATCH)
    return wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=keep_workers and workers > 0)


def size_of(batch: Any) -> int:
    """Samples in a batch, which must be tensors of the right kind."""
    payload, label = (batch["data"], batch["label"]) if isinstance(batch, dict) else batch
    if payload.dtype != torch.uint8 or label.dtype != torch.int64 or payload.shape != (len(label), SAMPLE_BYTES):
        raise RuntimeError(f"not a batch: {payload.dtype} {tuple(payload.shape)} and {label.dtype}")
    return len(payload)


def epoch_rate(loader: Iterable[Any], num_samples: int) -> float:
    """Samples a second over a whole epoch."""
    started = time.perf_counter()
    delivered = sum(map(size_of, loader))
    seconds = time.perf_counter() - started
    if delivered != num_samples:
        raise RuntimeError(f"{delivered} samples delivered, not {num_samples}")
    return delivered / seconds


def seconds_to_batch(make: Callable[[], Iterable[Any]], skip: int = 0) -> float:
    """Seconds from nothing to the batch after ``skip`` others."""
    started = time.perf_counter()
    size_of(next(islice(make(), skip, None)))
    return time.perf_counter() - started


def cat_rate(data: Data) -> float:
    started = time.perf_counter()
    subprocess.run(["cat", *data.shards], stdout=subprocess.DEVNULL, check=True)
    return data.num_samples / (time.perf_counter() - started)


def pread_rate(data: Data) -> float:
    """One system call for every payload, in random order."""
    files = [os.open(shard, os.O_RDONLY) for shard in data.shards]
    tables = map(load_table, data.shards)
    columns = ((file, t.offsets[:, t.fields.index("bin")].tolist()) for file, t in zip(files, tables, strict=True))
    spans = [(file, at) for file, offsets in columns for at in offsets]
    spans = [spans[place] for place in np.random.default_rng(0).permutation(len(spans))]
    started = time.perf_counter()
    for file, at in spans:
        os.pread(file, SAMPLE_BYTES, at)
    seconds = time.perf_counter() - started
    for file in files:
        os.close(file)
    return len(spans) / seconds


def measure(data: Data, repeats: int) -> tuple[Results, Results]:
    """Rates by contender in samples a second, and waits by contender in seconds."""
    ours = {workers: disttrain_loader(data, workers) for workers in WORKERS}
    theirs = {workers: webdataset_loader(data, workers, keep_workers=True) for workers in WORKERS}
    rates: dict[str, Callable[[], float]] = {"cat": partial(cat_rate, data), "pread": partial(pread_rate, data)}
    waits: dict[str, Callable[[], float]] = {}
    for w in WORKERS:
        rates[f"{OURS} {w}"] = partial(epoch_rate, ours[w], data.steps * BATCH)
        rates[f"{THEIRS} {w}"] = partial(epoch_rate, theirs[w], data.num_samples)
        for name, step in (("first batch", 0), ("resume mid-epoch", data.steps // 2)):
            waits[f"{OURS} {w} {name}"] = partial(seconds_to_batch, partial(disttrain_loader, data, w, step))
            waits[f"{THEIRS} {w} {name}"] = partial(seconds_to_batch, partial(webdataset_loader, data, w), step)
    for run in rates.values():
        run()
    every = [*rates.items(), *waits.items()]
    found: Results = {name: [] for name, _ in every}
    for repeat in range(repeats):
        first = repeat * len(every) // repeats
        for name, run in every[first:] + every[:first]:
            found[name].append(run())
        shown = ", ".join(f"{name} {found[name][-1]:,.0f}" for name in rates)
        print(f"repeat {repeat + 1} of {repeats}, samples/s: {shown}", flush=True)
    return {name: found[name] for name in rates}, {name: found[name] for name in waits}


def machine() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("disttrain", "torch", "webdataset", "numpy"))
    return f"{model[1] if model else 'unknown CPU'}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, {libraries}"


def row(name: str, values: list[float], *more: str, unit: float = 1) -> str:
    """A line of a table: who, workers, then median, least and most."""
    who, _, rest = name.partition(" ")
    numbers = [f"{value * unit:,.0f}" for value in (median(values), min(values), max(values))]
    return f"| {' | '.join([who, rest, *numbers, *more])} |"


def page(data: Data, rates: Results, waits: Results, command: str) -> str:
    lines = [
        "# Reading small samples\n",
        f"{data.num_samples:,} samples of {SAMPLE_BYTES} bytes and a label in {len(data.shards)} shards, batches of"
        f" {BATCH}, page cache warm; {len(rates['cat'])} alternating repeats. Workers are threads in disttrain and"
        " processes in webdataset; 0 reads in the main process. What is measured, and how to read it, stands in"
        " [`benchmarks/reader.py`](../reader.py).\n",
        "| samples/s | workers | median | min | max | to webdataset | to pread |\n|-|-|-:|-:|-:|-:|-:|",
    ]
    for name, values in rates.items():
        peer = rates.get(f"{THEIRS} {name.partition(' ')[2]}")
        ratio = f"{median(values) / median(peer):.1f}" if peer else ""
        lines.append(row(name, values, ratio, f"{median(values) / median(rates['pread']):.2f}"))
    lines.append("\n| milliseconds | workers, to what | median | min | max |\n|-|-|-:|-:|-:|")
    lines += [row(name, values, unit=1000) for name, values in waits.items()]
    return "\n".join([*lines, f"\nMachine: {machine()}.\n", f"Command: `{command}`\n"])


def chart(rates: Results, waits: Results) -> Figure:
    """Rates on the left, waits on the right; bars are medians, whiskers the whole range."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, results, unit, label in ((left, rates, 1e-3, LABELS[0]), (right, waits, 1e3, LABELS[1])):
        for place, (name, values) in enumerate(results.items()):
            color = COLORS.get(name.split()[0], COLORS["bound"])
            middle, low, high = (unit * value for value in (median(values), min(values), max(values)))
            axes.barh(place, middle, color=color, height=0.7)
            axes.hlines(place, low, high, color="black", linewidth=1)
            axes.annotate(f"{middle:,.0f}", (high, place), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(results)), list(results))
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    right.set_xscale("log")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare disttrain's loader with webdataset's on small samples.")
    parser.add_argument("--samples", type=int, default=60_000, help="samples in the data set")
    parser.add_argument("--repeats", type=int, default=7, help="times that everything is measured")
    parser.add_argument("--data", type=Path, help="folder to keep the shards in (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args()
    command = f"python benchmarks/reader.py --samples {options.samples} --repeats {options.repeats}"
    with tempfile.TemporaryDirectory() as temporary:
        data = Data(options.data or Path(temporary), options.samples)
        data.make()
        rates, waits = measure(data, options.repeats)
    text = page(data, rates, waits, command)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "reader.md").write_text(text)
    chart(rates, waits).savefig(options.out / "reader.png", dpi=150)
    print(text)


if __name__ == "__main__":
    main()
