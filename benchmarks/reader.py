"""Small samples: how fast disttrain's loader reads them, against webdataset's own.

Claim: from the same plain tars, disttrain's loader delivers shuffled batches faster than a Python loop can
``pread`` the payloads, since it gathers them from mapped files, and at many times the rate of webdataset's
recommended pipeline; and it starts in the middle of an epoch as fast as at its beginning. Its first batch waits
for the index of every shard that it draws from, which webdataset does without.

Method: samples of 800 random bytes and a class number below 1,000 lie in shards of 1,000, in the page cache. A
repeat runs every contender once, rates over a whole epoch in batches of 256; the order rotates from repeat to
repeat. Both loaders shuffle, give tensors, have run once before it counts, and are checked to deliver the right
number of samples: webdataset all N, disttrain ``N // 256 * 256``. webdataset keeps its workers between epochs.
The bounds are ``cat`` of the tars and one ``pread`` a payload in random order. 'First batch' counts from nothing
(index, order, workers) to a batch, 'resume' the same to the batch in the middle of an epoch; webdataset has no
position, so it iterates to there.

How to read it: ratios within one run mean more than rates, which follow the machine. Samples this small show
the cost of the loader itself; where decoding or the disk costs more, the loaders come closer.
"""

from __future__ import annotations

import argparse
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
import webdataset as wds
from matplotlib.figure import Figure

from disttrain.data.decode.fields import Field
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.index.sidecar import load_table
from disttrain.data.loader.loaders import LoaderConfig, TrainLoader
from disttrain.data.order.sample_order import Order, OrderConfig
from disttrain.data.pack.samples import Sample, Samples
from disttrain.data.pack.shard_writer import write_shard
from disttrain.data.reader.sample_reader import Reader
from disttrain.parallel.config import BatchPlan

SAMPLE_BYTES: Final = 800
SHARD_SAMPLES: Final = 1000
BATCH: Final = 256
WORKERS: Final = (0, 2)
OURS, THEIRS = "disttrain", "webdataset"
CAT, PREAD = ("cat of the tars", ""), ("pread of the payloads", "")
COLORS: Final = {OURS: "#1f6fb4", THEIRS: "#d9822b"}

Results = dict[tuple[str, str], list[float]]  # by who and what


def make_sample(number: int) -> Sample:
    payload = np.random.default_rng(number).bytes(SAMPLE_BYTES)
    return Sample(f"{number:08d}", {"bin": payload, "cls": str(number % 1000).encode()})


@dataclass(frozen=True)
class Data:
    """The shards to read: a folder of ``num_samples`` samples."""

    folder: Path
    num_samples: int

    @property
    def shards(self) -> list[str]:
        starts = range(0, self.num_samples, SHARD_SAMPLES)
        return [str(self.folder / f"train-{start // SHARD_SAMPLES:06d}.tar") for start in starts]

    def make(self) -> None:
        """Write the shards that are missing, each with its index beside it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        samples = Samples(self.num_samples, make_sample)
        cuts = np.split(np.arange(self.num_samples), range(SHARD_SAMPLES, self.num_samples, SHARD_SAMPLES))
        for path, ids in zip(map(Path, self.shards), cuts, strict=True):
            if not path.exists():
                write_shard(samples, ids, path, lambda _: None)


def disttrain_loader(data: Data, workers: int, step: int = 0) -> TrainLoader:
    epochs = count()  # each iteration is another epoch, in another order
    index = ShardIndex.open(data.shards)
    payload = Field("bin", decoder="tensor", dtype="uint8", shape=(SAMPLE_BYTES,))
    reader = Reader(index, {"data": payload, "label": Field("cls")})
    order, plan = Order(index.sizes, OrderConfig(global_batch_size=BATCH)), BatchPlan(BATCH, BATCH)
    return TrainLoader(reader, order, plan, config=LoaderConfig(threads=workers), position=lambda: (next(epochs), step))


def webdataset_loader(data: Data, workers: int, *, keep_workers: bool = False) -> Any:
    """The pipeline that webdataset's documentation recommends; its loader turns the arrays into tensors."""
    dataset = wds.WebDataset(data.shards, shardshuffle=len(data.shards)).shuffle(1000).decode().to_tuple("bin", "cls")
    dataset = dataset.map_tuple(partial(np.frombuffer, dtype=np.uint8), int).batched(BATCH)
    return wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=keep_workers)


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
    if delivered == num_samples:
        return delivered / seconds
    raise RuntimeError(f"{delivered} samples delivered, not {num_samples}")


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
    files = {shard: os.open(shard, os.O_RDONLY) for shard in data.shards}
    fields = [(file, spans["bin"]) for shard, file in files.items() for spans in load_table(shard).spans().values()]
    spans = [fields[place] for place in np.random.default_rng(0).permutation(len(fields))]
    started = time.perf_counter()
    for file, (at, size) in spans:
        os.pread(file, size, at)
    seconds = time.perf_counter() - started
    for file in files.values():
        os.close(file)
    return len(spans) / seconds


def measure(data: Data, repeats: int) -> tuple[Results, Results]:
    """Rates in samples a second, and waits in seconds."""
    rates: dict[tuple[str, str], Callable[[], float]] = {CAT: partial(cat_rate, data), PREAD: partial(pread_rate, data)}
    waits: dict[tuple[str, str], Callable[[], float]] = {}
    steps = data.num_samples // BATCH
    for w in WORKERS:
        ours, theirs = disttrain_loader(data, w), webdataset_loader(data, w, keep_workers=w > 0)
        rates[OURS, f"{w} workers"] = partial(epoch_rate, ours, steps * BATCH)
        rates[THEIRS, f"{w} workers"] = partial(epoch_rate, theirs, data.num_samples)
    for name, step in (("first batch", 0), ("resume mid-epoch", steps // 2)):
        for w in WORKERS:
            what = f"{name}, {w} workers"
            waits[OURS, what] = partial(seconds_to_batch, partial(disttrain_loader, data, w, step))
            waits[THEIRS, what] = partial(seconds_to_batch, partial(webdataset_loader, data, w), skip=step)
    _ = [run() for run in rates.values()]  # once before it counts
    every = [*rates.items(), *waits.items()]
    found: Results = {contender: [] for contender, _ in every}
    for repeat in range(repeats):
        for contender, run in every[repeat % len(every) :] + every[: repeat % len(every)]:
            found[contender].append(run())
        print(f"repeat {repeat + 1} of {repeats}", flush=True)
    return {contender: found[contender] for contender in rates}, {contender: found[contender] for contender in waits}


def machine() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    versions = ", ".join(f"{name} {version(name)}" for name in ("disttrain", "torch", "webdataset", "numpy"))
    cpu = f"{model[1] if model else 'unknown CPU'}, {os.cpu_count()} cores, {platform.system()}"
    return f"{cpu}; Python {platform.python_version()}, {versions}"


def row(contender: tuple[str, str], values: list[float], *more: str, unit: float = 1) -> str:
    """A line of a table: who and what, then median, least and most."""
    numbers = [f"{value * unit:,.0f}" for value in (median(values), min(values), max(values))]
    return f"| {' | '.join([*contender, *numbers, *more])} |"


def speedup(rates: Results, who: str, what: str) -> str:
    """disttrain's rate as a multiple of webdataset's; empty for others."""
    return f"{median(rates[who, what]) / median(rates[THEIRS, what]):.1f}" if who == OURS else ""


def page(data: Data, rates: Results, waits: Results, command: str) -> str:
    lines = [
        "# Reading small samples\n",
        f"{data.num_samples:,} samples of {SAMPLE_BYTES} bytes and a label in {len(data.shards)} shards, batches of"
        f" {BATCH}, page cache warm; {len(rates[CAT])} alternating repeats. Workers are threads in disttrain and"
        " processes in webdataset; with 0 the main process reads. What is measured, and how to read it, stands in"
        " [`benchmarks/reader.py`](../reader.py).\n\n![Rates and waits](reader.png)\n",
        "| samples/s | | median | min | max | to webdataset | to pread |\n|-|-|-:|-:|-:|-:|-:|",
    ]
    for (who, what), values in rates.items():
        share = median(values) / median(rates[PREAD])
        lines.append(row((who, what), values, speedup(rates, who, what), f"{share:.2f}"))
    lines.append("\n| milliseconds | | median | min | max |\n|-|-|-:|-:|-:|")
    lines += [row(name, values, unit=1000) for name, values in waits.items()]
    return "\n".join([*lines, f"\nMachine: {machine()}.\n", f"Command: `{command}`\n"])


def chart(rates: Results, waits: Results) -> Figure:
    """Rates on the left, waits on the right; bars are medians, lines the whole range."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = ((rates, 1e-3, "thousand samples/s (more is better)"), (waits, 1e3, "milliseconds (less is better)"))
    for axes, (results, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for place, ((who, what), values) in enumerate(results.items()):
            middle, low, high = (unit * value for value in (median(values), min(values), max(values)))
            axes.barh(place, middle, color=COLORS.get(who, "#b5b5b5"), height=0.7)
            axes.hlines(place, low, high, color="black", linewidth=1)
            more = f" = {speedup(rates, who, what)} x webdataset" if who == OURS and results is rates else ""
            axes.annotate(f"{middle:,.0f}{more}", (high, place), (5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(results)), [f"{who}, {what}" if what else who for who, what in results])
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60_000, help="samples in the data set")
    parser.add_argument("--repeats", type=int, default=9, help="times that everything is measured")
    parser.add_argument("--data", type=Path, help="folder to keep the shards in (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args()
    command = f"python benchmarks/reader.py --samples {options.samples} --repeats {options.repeats}"
    with tempfile.TemporaryDirectory() as temporary:
        data = Data(options.data or Path(temporary), options.samples)
        data.make()
        rates, waits = measure(data, options.repeats)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "reader.md").write_text(page(data, rates, waits, command))
    chart(rates, waits).savefig(options.out / "reader.png", dpi=150)


if __name__ == "__main__":
    main()
