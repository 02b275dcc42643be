"""The order: how well class-sorted shards are mixed, how that trains, and what a billion samples cost.

Claims: (1) over shards that hold one class each, batches are as mixed as a uniform shuffle's at default settings;
(2) a small model trained on such shards ends where a uniform shuffle ends; (3) 100,000 shards of 10,000 samples
start within 3 seconds, in memory that grows with the shards alone, and any position is reached within 50 ms.

Method: (1) Label entropy of global batches, mean over an epoch (of many batches, at most 60 of them), divided by
that of a uniform shuffle, for shards of 1,000 samples of one class each. (2) scikit-learn's digits: a fifth is
held out, copies of the rest (shifted by up to a pixel, with noise) fill 100 shards of 1,000 samples sorted by
class; a small network is trained for one epoch. Seed by seed all orders start from the same weights; they differ
in the order of samples alone. (3) Times are taken from nothing (a new ``Order``) to the ids of the first step, at
random epochs and steps, for a rank that reads all 64 lanes and for one that reads one of them; memory by
``tracemalloc``. The manifest lists 100,000 local files, which are empty: opening it looks at each.

How to read it: 'lanes x window' are the two settings of the shuffle. One lane and a window is what a single
reader with a shuffle buffer of that size could do at best.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from disttrain.data.index.shard_index import Shard, ShardIndex, write_manifest
from disttrain.data.order.mixture import Mixture, Portion
from disttrain.data.order.sample_order import Order, OrderConfig
from disttrain.data.pack.samples import stratified_split

Ids = NDArray[np.int64]
Epochs = Callable[[int, int], Ids]  # seed and epoch to ids, shape (steps, samples)
Entropies = dict[tuple[int, int], list[float]]  # by shards and G: a uniform shuffle's, then each setting's share of it
Seconds = tuple[float, float]  # passed, and of the processor
Accuracies = dict[tuple[int, str], list[float]]  # by G and order: one a seed

SHARD: Final = 1000
SHARDS: Final = (10, 100, 1000)
BATCHES: Final = (64, 256, 1024)
FEW_LANES: Final = (130, 134, 127)  # global batch sizes without a divisor near 64, for the most shards alone
SETTINGS: Final = ((0, 16_384), (16, 4096), (4, 1024), (1, 16_384), (1, 1000))  # lanes, window; the default first
TRAIN_BATCHES: Final = (64, 256)
TRAIN_SHARDS: Final = 100
MANY_SHARDS, MANY_SAMPLES = 100_000, 10_000
LABELS_SHOWN: Final = 60


def label(lanes: int, window: int) -> str:
    return f"{lanes or 64} x {window:,}" + (" (default)" if lanes == 0 else "")


def entropy(labels: Ids) -> float:
    """Mean label entropy of batches, in nats. labels: (batch, sample)"""
    rows = []
    for row in labels:
        shares = np.bincount(row) / len(row)
        shares = shares[shares > 0]
        rows.append(-(shares * np.log(shares)).sum())
    return float(np.mean(rows))


def some_steps(order: Order) -> Ids:
    """The ids of an epoch, or of steps spread over it. ids: (step, sample)"""
    steps = np.unique(np.linspace(0, order.steps_per_epoch - 1, LABELS_SHOWN).astype(int))
    return np.concatenate([order.sample_ids(0, step) for step in steps.tolist()])


def entropies() -> Entropies:
    found: Entropies = {}
    for shards in SHARDS:
        for batch in BATCHES + (FEW_LANES if shards == SHARDS[-1] else ()):
            total = shards * SHARD
            uniform = np.random.default_rng(0).permutation(total)[: total // batch * batch].reshape(-1, batch)
            whole = entropy(uniform[:500] // SHARD)
            shares = []
            for lanes, window in SETTINGS:
                if lanes and batch % lanes:
                    shares.append(float("nan"))
                    continue
                order = Order([SHARD] * shards, OrderConfig(batch, lanes=lanes, window=window))
                shares.append(entropy(some_steps(order) // SHARD) / whole)
            found[shards, batch] = [whole, *shares]
    return found


@dataclass(frozen=True)
class Digits:
    """Digits sorted by class, and a test set; images are (samples, 64)."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def make_digits(num_samples: int) -> Digits:
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(np.int64)
    kept, held_out = stratified_split(labels, fractions=(0.8, 0.2), seed=0)
    each = num_samples // 10
    by_class = np.concatenate([np.resize(kept[labels[kept] == number], each) for number in range(10)])
    sets = []
    for seed, ids in enumerate((by_class, np.resize(held_out, 5000))):
        sets += [torch.from_numpy(noisy(data.images[ids], seed)), torch.from_numpy(labels[ids])]
    return Digits(*sets)


def noisy(images: NDArray[np.float64], seed: int) -> NDArray[np.float32]:
    """Shifted by up to one pixel, with noise of a quarter of the range. images: (sample, 8, 8)"""
    draw = np.random.default_rng(seed)
    size, places = len(images), np.arange(8)
    down, right = draw.integers(0, 3, (2, size, 1)) + places  # each: (sample, pixel)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    moved = padded[np.arange(size)[:, None, None], down[:, :, None], right[:, None, :]]
    return np.asarray((moved + draw.normal(0, 4, moved.shape) - 5) / 6, dtype=np.float32).reshape(size, 64)


def train(digits: Digits, order: Epochs, seed: int) -> float:
    """Test accuracy after an epoch of SGD under a cosine schedule."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    batches = torch.from_numpy(order(seed, 0))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for ids in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(digits.images[ids]), digits.labels[ids]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float((net(digits.test_images).argmax(1) == digits.test_labels).double().mean())


def orders(num_samples: int, batch: int) -> Iterator[tuple[str, Epochs]]:
    """A uniform shuffle, disttrain's settings, and no shuffle at all."""
    steps = num_samples // batch

    def uniform(seed: int, epoch: int) -> Ids:
        return np.random.default_rng((seed, epoch)).permutation(num_samples)[: steps * batch].reshape(-1, batch)

    def with_settings(lanes: int, window: int) -> Epochs:
        def ids(seed: int, epoch: int) -> Ids:
            config = OrderConfig(batch, seed=seed, lanes=lanes, window=window)
            return Order([num_samples // TRAIN_SHARDS] * TRAIN_SHARDS, config).sample_ids(epoch, 0, steps)

        return ids

    yield "uniform shuffle", uniform
    for lanes, window in SETTINGS:
        yield label(lanes, window), with_settings(lanes, window)
    yield "no shuffle", lambda seed, epoch: np.arange(steps * batch).reshape(-1, batch)


def accuracies(seeds: int, num_samples: int) -> Accuracies:
    digits = make_digits(num_samples)
    found: Accuracies = {}
    for batch in TRAIN_BATCHES:
        for seed in range(seeds):
            for name, order in orders(num_samples, batch):
                found.setdefault((batch, name), []).append(train(digits, order, seed))
            print(f"trained with G = {batch}, seed {seed}", flush=True)
    return found


@dataclass
class Scale:
    """Seconds, and bytes, of a billion samples."""

    seconds: dict[str, list[Seconds]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    partition_seconds: float = 0.0


def timed(run: Callable[[], object]) -> Seconds:
    """Passed, and of the processor: the second does not grow with what else the machine does."""
    started, used = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - started, time.process_time() - used


def measure_scale(repeats: int) -> Scale:
    found = Scale()
    sizes = np.full(MANY_SHARDS, MANY_SAMPLES)
    config = OrderConfig(1024, seed=1)
    draw = np.random.default_rng(0)
    steps = Order(sizes, config).steps_per_epoch
    portions = [
        Portion(name, (MANY_SAMPLES,) * (MANY_SHARDS // 2), weight) for name, weight in (("a", 3.0), ("b", 1.0))
    ]
    one_lane = (160, 176)
    kinds: dict[str, Callable[[int, int], object]] = {
        "start at step 0, all 64 lanes": lambda epoch, step: Order(sizes, config).sample_ids(0, 0),
        "resume, all 64 lanes": lambda epoch, step: Order(sizes, config).sample_ids(epoch, step),
        "resume, 1 lane of 64": lambda epoch, step: Order(sizes, config).sample_ids(epoch, step, 1, one_lane),
        "resume, mixture of 2 sources": lambda epoch, step: Mixture(portions, config).sample_ids(epoch, step),
    }
    for repeat in range(repeats + 1):
        epoch, step = int(draw.integers(1000)), int(draw.integers(steps - 1))
        taken = {name: timed(partial(run, epoch, step)) for name, run in kinds.items()}
        order = Order(sizes, config)
        order.sample_ids(epoch, step)
        taken["the step after a resume, all 64 lanes"] = timed(partial(order.sample_ids, epoch, step + 1))
        if repeat:  # once before it counts
            for name, seconds in taken.items():
                found.seconds.setdefault(name, []).append(seconds)
    found.partition_seconds = timed(partial(check_partition, sizes))[0]
    for name, positions in (("all 64 lanes", None), ("1 lane of 64", one_lane)):
        tracemalloc.start()
        order = Order(np.full(MANY_SHARDS, MANY_SAMPLES), config)
        order.sample_ids(0, steps // 2, 1, positions)
        found.memory[f"order, {name}"] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    measure_index(found, config)
    return found


def check_partition(sizes: Ids) -> None:
    """4,096 ranks, two samples each, read a step without a gap or an overlap."""
    ranks, config = 4096, OrderConfig(8192, seed=1)
    order = Order(sizes, config)
    step = order.steps_per_epoch // 2
    parts = [order.sample_ids(7, step, 1, (2 * rank, 2 * rank + 2))[0] for rank in range(ranks)]
    whole = Order(sizes, config).sample_ids(7, step)[0]
    if not np.array_equal(np.concatenate(parts), whole) or len(np.unique(whole)) != 2 * ranks:
        raise RuntimeError("4,096 ranks do not partition a step")


def measure_index(found: Scale, config: OrderConfig) -> None:
    """From a manifest to the first step."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = [folder / f"train-{number:06d}.tar" for number in range(MANY_SHARDS)]
        for path in paths:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        write_manifest(folder / "local.json", [Shard(str(path), MANY_SAMPLES, 0) for path in paths], name="local")
        urls = [f"https://example.org/data/{path.name}" for path in paths]
        write_manifest(folder / "remote.json", [Shard(url, MANY_SAMPLES, 10**9) for url in urls], name="remote")

        def start(kind: str) -> None:
            index = ShardIndex.open(str(folder / f"{kind}.json"))
            Order(index.sizes, config).sample_ids(0, 0)

        for kind in ("local", "remote"):
            name = f"start-up from a manifest, {kind} shards"
            found.seconds[name] = [timed(partial(start, kind)) for _ in range(5)]
        tracemalloc.start()
        index = ShardIndex.open(str(folder / "local.json"))
        found.memory["index"] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        if len(index) != MANY_SHARDS * MANY_SAMPLES:
            raise RuntimeError(f"the index holds {len(index)} samples")


def entropy_table(found: Entropies) -> list[str]:
    names = [label(*setting) for setting in SETTINGS]
    lines = [
        f"| shards = classes | global batch | uniform, nats | {' | '.join(names)} |",
        "|-:" * (3 + len(names)) + "|",
    ]
    for (shards, batch), (whole, *shares) in found.items():
        lanes = OrderConfig(batch).num_lanes
        size = f"{batch:,}" if lanes == 64 else f"{batch:,}, so by default {lanes} lane{'s' * (lanes > 1)}"
        cells = [f"{shards:,}", size, f"{whole:.2f}", *("" if np.isnan(share) else f"{share:.3f}" for share in shares)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def accuracy_table(found: Accuracies) -> list[str]:
    lines = [
        "| global batch | order | test accuracy, mean +- sd | difference to uniform, mean +- standard error |",
        "|-:|-|-:|-:|",
    ]
    for (batch, name), values in found.items():
        pairs = np.array(values) - np.array(found[batch, "uniform shuffle"])
        error = pairs.std(ddof=1) / np.sqrt(len(pairs)) if len(pairs) > 1 else float("nan")
        other = "" if name == "uniform shuffle" else f"{100 * pairs.mean():+.2f} +- {100 * error:.2f} points"
        spread = np.std(values, ddof=1) if len(values) > 1 else float("nan")
        lines.append(f"| {batch} | {name} | {100 * np.mean(values):.2f} +- {100 * spread:.2f} % | {other} |")
    return lines


def scale_table(found: Scale) -> list[str]:
    lines = ["| milliseconds | median | min | max | median of processor time |", "|-|-:|-:|-:|-:|"]
    for name, measured in sorted(found.seconds.items()):
        passed, used = np.array(measured).T * 1000
        numbers = np.median(passed), passed.min(), passed.max(), np.median(used)
        lines.append(f"| {name} | {' | '.join(f'{number:,.1f}' for number in numbers)} |")
    lines += ["", "| memory | MiB | bytes a shard |", "|-|-:|-:|"]
    lines += [f"| {name} | {size / 2**20:,.1f} | {size / MANY_SHARDS:,.0f} |" for name, size in found.memory.items()]
    return lines


def page(mixed: Entropies, trained: Accuracies, scale: Scale, command: str, load: float) -> str:
    seeds = max(map(len, trained.values()))
    return "\n".join(
        [
            "# The order\n",
            "What is measured, and how to read it, stands in [`benchmarks/order.py`](../order.py).\n",
            "![Label entropy and test accuracy](order.png)\n",
            "## Class-sorted shards: label entropy\n",
            "One class a shard, 1,000 samples a shard. Shares of a uniform shuffle's entropy, by lanes x window:\n",
            *entropy_table(mixed),
            "\n## Class-sorted shards: training\n",
            f"Noisy copies of the digits, {TRAIN_SHARDS} shards of one class each, one epoch, {seeds} seeds:\n",
            *accuracy_table(trained),
            f"\n## {MANY_SHARDS:,} shards, {MANY_SHARDS * MANY_SAMPLES:,} samples, global batches of 1,024\n",
            *scale_table(scale),
            "\nThe order's memory holds, beside the shards, a window of 64 lanes or of one. The ids of a step of 8,192"
            " samples were asked for by 4,096 simulated ranks, one after the other, in"
            f" {scale.partition_seconds:.1f} s: each exactly once.",
            f"\nMachine: {machine()}. Its one-minute load was {load:.1f} before this began.\n",
            f"Command: `{command}`\n",
        ]
    )


def machine() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    versions = ", ".join(f"{name} {version(name)}" for name in ("disttrain", "torch", "numpy", "scikit-learn"))
    cpu = f"{model[1] if model else 'unknown CPU'}, {os.cpu_count()} cores, {platform.system()}"
    return f"{cpu}; Python {platform.python_version()}, {versions}"


def chart(mixed: Entropies, trained: Accuracies) -> Figure:
    """Left: entropy by setting, a mark for each data set and batch. Right: accuracies, a mark for each seed."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = dict(zip(SHARDS, ("#8ec1e8", "#1f6fb4", "#0b2f52"), strict=True))
    marks = dict(zip(BATCHES, ("o", "s", "D"), strict=True))
    left.axvline(1, color="#b5b5b5", linewidth=1)
    left.axvline(0.95, color="#b5b5b5", linewidth=1, linestyle=":")
    shown = {key: shares for key, (_, *shares) in mixed.items() if key[1] in BATCHES}
    for place, ((shards, batch), shares) in enumerate(shown.items()):
        heights = np.arange(len(shares)) + (place - 4) * 0.07
        left.plot(
            shares, heights, marks[batch], color=colors[shards], markersize=5, label=f"{shards:,} shards, G = {batch:,}"
        )
    left.set_yticks(range(len(SETTINGS)), [label(*setting) for setting in SETTINGS])
    left.set_xlabel("label entropy, share of a uniform shuffle's (dotted: 0.95)")
    left.set_xlim(0, 1.12)
    left.legend(fontsize=7, frameon=False, loc="upper left")
    left.set_ylabel("lanes x window")
    names = list(dict.fromkeys(name for _, name in trained))
    for batch, color, shift in zip(TRAIN_BATCHES, ("#1f6fb4", "#d9822b"), (-0.13, 0.13), strict=True):
        for place, name in enumerate(names):
            values = 100 * np.array(trained[batch, name])
            first = f"G = {batch}" if place == 0 else None
            right.plot(
                values, np.full(len(values), place + shift), "o", color=color, markersize=4, alpha=0.6, label=first
            )
            right.plot([values.mean()] * 2, [place + shift - 0.12, place + shift + 0.12], color="black", linewidth=1.5)
    right.set_yticks(range(len(names)), names)
    right.set_xlabel("test accuracy in %, a dot a seed, bars are means")
    right.legend(frameon=False, loc="lower center")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="seeds that are trained")
    parser.add_argument("--samples", type=int, default=100_000, help="samples to train on")
    parser.add_argument("--repeats", type=int, default=30, help="times that the order is resumed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    command = (
        f"python benchmarks/order.py --seeds {options.seeds} --samples {options.samples} --repeats {options.repeats}"
    )
    scale, mixed, trained = measure_scale(options.repeats), entropies(), accuracies(options.seeds, options.samples)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "order.md").write_text(page(mixed, trained, scale, command, load))
    chart(mixed, trained).savefig(options.out / "order.png", dpi=150)


if __name__ == "__main__":
    main()
