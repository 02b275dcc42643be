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
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from matplotlib.figure import Figure

from disttrain.data.decode import Field
from disttrain.data.index import ShardIndex
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

Results = dict[str, list[float]]


@dataclass(frozen=True)
class Data:
    """The shards to read: a folder of ``num_samples`` samples."""

    folder: Path
    num_samples: int

    @property
    def shards(self) -> list[str]:
        count = -(-self.num_samples // SHARD_SAMPLES)
        return [str(self.folder / f"train-{number:06d}.tar") for number in range(count)]

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


def disttrain_loader(data: Data, workers: int, epoch: int = 0, step: int = 0) -> TrainLoader:
    index = ShardIndex.open(data.shards)
    fields = {
        "data": Field(ext="bin", decoder="tensor", dtype="uint8", shape=(SAMPLE_BYTES,)),
        "label": Field(ext="cls"),
    }
    return TrainLoader(
        Reader(index, fields),
        Order(index.sizes, OrderConfig(global_batch_size=BATCH)),
        BatchPlan(BATCH, BATCH),
        config=LoaderConfig(threads=workers),
        position=lambda: (epoch, step),
    )


def to_array(payload: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(payload, dtype=np.uint8)


def same(label: int) -> int:
    return label


def webdataset_loader(data: Data, workers: int, *, keep_workers: bool = False) -> Any:
    """The pipeline that webdataset's documentation recommends; its loader turns the arrays into tensors."""
    wds: Any = importlib.import_module("webdataset")
    dataset = (
        wds.WebDataset(data.shards, shardshuffle=len(data.shards))
        .shuffle(1000)
        .decode()
        .to_tuple("bin", "cls")
        .map_tuple(to_array, same)
        .batched(BATCH)
    )
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
    batches = iter(make())
    for _ in range(skip):
        next(batches)
    size_of(next(batches))
    return time.perf_counter() - started


def cat_rate(data: Data) -> float:
    started = time.perf_counter()
    subprocess.run(["cat", *data.shards], stdout=subprocess.DEVNULL, check=True)
    return data.num_samples / (time.perf_counter() - started)


def pread_rate(data: Data) -> float:
    """One system call for every payload, in random order."""
    index = ShardIndex.open(data.shards)
    files = [os.open(shard, os.O_RDONLY) for shard in data.shards]
    tables = [index.table(shard) for shard in range(len(files))]
    spans = [
        (file, at) for file, t in zip(files, tables, strict=True) for at in t.offsets[:, t.fields.index("bin")].tolist()
    ]
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
    rates: dict[str, Callable[[], float]] = {"cat": lambda: cat_rate(data), "pread": lambda: pread_rate(data)}
    waits: dict[str, Callable[[], float]] = {}
    half = data.steps // 2
    for w in WORKERS:
        rates[f"{OURS} {w}"] = lambda w=w: epoch_rate(ours[w], data.steps * BATCH)
        rates[f"{THEIRS} {w}"] = lambda w=w: epoch_rate(theirs[w], data.num_samples)
        for name, step in (("first", 0), ("resume", half)):
            waits[f"{OURS} {w} {name}"] = lambda w=w, s=step: seconds_to_batch(lambda: disttrain_loader(data, w, 0, s))
            waits[f"{THEIRS} {w} {name}"] = lambda w=w, s=step: seconds_to_batch(lambda: webdataset_loader(data, w), s)
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
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("disttrain", "torch", "webdataset", "numpy"))
    return f"{model}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, {libraries}"


def page(data: Data, rates: Results, waits: Results, command: str) -> str:
    lines = [
        "# Reading small samples",
        "",
        f"{data.num_samples:,} samples of {SAMPLE_BYTES} bytes and a label in {len(data.shards)} shards, batches of"
        f" {BATCH}, page cache warm; {len(rates['cat'])} alternating repeats. Workers are threads in disttrain and"
        " processes in webdataset; 0 reads in the main process. What is measured, and how to read it, stands in"
        " [`benchmarks/reader.py`](../reader.py).",
        "",
        "| | workers | samples/s, median | min | max | to webdataset | to pread |",
        "|-|-|-:|-:|-:|-:|-:|",
    ]
    for name, values in rates.items():
        who, _, workers = name.partition(" ")
        middle = median(values)
        ratio = f"{middle / median(rates[f'{THEIRS} {workers}']):.1f} x" if workers else ""
        share = f"{middle / median(rates['pread']):.3f} x"
        numbers = " | ".join(f"{value:,.0f}" for value in (middle, min(values), max(values)))
        lines.append(f"| {who} | {workers} | {numbers} | {ratio} | {share} |")
    lines += ["", "| | workers | | milliseconds, median | min | max |", "|-|-|-|-:|-:|-:|"]
    for name, values in waits.items():
        who, workers, what = name.split()
        words = "to the first batch" if what == "first" else f"to batch {data.steps // 2} of {data.steps}"
        numbers = " | ".join(f"{value * 1000:,.0f}" for value in (median(values), min(values), max(values)))
        lines.append(f"| {who} | {workers} | {words} | {numbers} |")
    return "\n".join([*lines, "", f"Machine: {machine()}.", "", f"Command: `{command}`", ""])
