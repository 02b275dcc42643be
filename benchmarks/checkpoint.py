"""What a checkpoint costs training: saved in the background against saved while training waits; and a resume.

Claim: with 80 million parameters and AdamW, a save in the background stops training for at most 0.15 of the time
that the same save takes when training waits for the disk.

Method: a multi-layer perceptron of 84 million parameters, float32, AdamW (a state of one gigabyte), one thread a rank,
gloo on one machine. The ranks are started once for each number of them; then every repeat trains a new model each
way, with a checkpoint every few steps, in alternating order. Stall: the seconds for which a save kept the training
loop, waiting for an earlier save included, on rank 0; a repeat's figure is the median of its saves after the first,
which also makes the buffers. The end of the run, always saved while everybody waits, is not counted. The table gives
medians over the repeats, and median, least and most of the ratios async / sync of the repeats. Steps: the median
step, saves left out, while nothing is written and while a save is being written, since the writing thread shares
the cores. Resume: seconds to compare all checksums and to load model and optimizer, from files that are in memory.

How to read it: compare ratios within one run. Seconds follow the disk and the machine, and whatever else it does. Where
writing takes longer than the steps between two saves, the next save waits, and the stall says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from disttrain import Checkpointing, OptimizerConfig, ParallelConfig, Task, Trainer
from disttrain.checkpoint import verify
from disttrain.checkpoint.marker import committed
from disttrain.data.batches import COUNT, KEY, WEIGHT
from disttrain.models.mlp import MLP

LAYERS: Final = 4
WAYS: Final = ("async", "sync")


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    width: int = 4096
    samples: int = 4
    steps: int = 25
    every_steps: int = 8
    repeats: int = 3
    strategy: str = "ddp"


class Regression(Task):
    """A network whose state is large and whose steps are short."""

    def __init__(self, width: int) -> None:
        super().__init__(optimizer=OptimizerConfig(name="adamw", lr=1e-4))
        torch.manual_seed(0)
        self.width = width
        self.model = MLP(width, hidden=[width] * LAYERS, out_features=width)

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = self.model(batch["inputs"])
        return out

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch["inputs"]).square().mean(dim=1)


class Micro:
    """The same random micro batch again and again: no loader is measured."""

    def __init__(self, settings: Settings, rank: int) -> None:
        inputs = torch.randn(settings.samples, settings.width, generator=torch.Generator().manual_seed(rank))
        names = [str(number) for number in range(settings.samples)]
        self.batch = {"inputs": inputs, WEIGHT: torch.ones(len(names)), KEY: names, COUNT: len(names)}
        self.length = settings.steps

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([self.batch] * self.length)


class Watch(Callback):
    """Seconds of each step without its save, and of each save."""

    def __init__(self, checkpoints: Checkpointing) -> None:
        self.checkpoints = checkpoints
        self.stalls: list[float] = []
        self.free: list[float] = []
        self.busy: list[float] = []
        self._ended = self._spent = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now, spent = time.perf_counter(), self.checkpoints.save_seconds
        if spent > self._spent:
            self.stalls.append(spent - self._spent)
        elif batch_idx > 2:
            (self.busy if self.checkpoints._saver.busy else self.free).append(now - self._ended)
        self._ended, self._spent = now, spent


def train(folder: Path, settings: Settings, way: str) -> dict[str, float]:
    """Train a new model, then resume it; this rank's seconds."""
    run_dir = folder / "run"
    checkpoints = Checkpointing(every_steps=settings.every_steps, save=way)  # type: ignore[arg-type]
    watch = Watch(checkpoints)
    trainer = make_trainer(run_dir, settings, [checkpoints, watch])
    trainer.fit(Regression(settings.width), train_dataloaders=Micro(settings, trainer.global_rank))
    path = committed(run_dir / "checkpoints")[0][-1].path
    found = {
        "stall": median(watch.stalls[1:]),
        "first": watch.stalls[0],
        "write": checkpoints.write_seconds / (len(watch.stalls) + 1),
        "free": median(watch.free),
        "busy": median(watch.busy) if watch.busy else 0.0,
        "bytes": committed(run_dir / "checkpoints")[0][-1].num_bytes,
    }
    started = time.perf_counter()
    verify.ensure(path)
    found["verify"] = time.perf_counter() - started
    trainer = make_trainer(run_dir, settings, [Checkpointing(every_steps=1000)])
    strategy: Any = trainer.strategy
    load = strategy.load_checkpoint

    def timed(*arguments: Any, **more: Any) -> Any:
        started = time.perf_counter()
        loaded = load(*arguments, **more)
        found["load"] = time.perf_counter() - started
        return loaded

    strategy.load_checkpoint = timed
    trainer.fit(Regression(settings.width), train_dataloaders=Micro(settings, trainer.global_rank), ckpt_path=str(path))
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        shutil.rmtree(run_dir)
    trainer.strategy.barrier()
    return found


def make_trainer(run_dir: Path, settings: Settings, callbacks: list[Callback]) -> Trainer:
    """A trainer on the CPU."""
    return Trainer(
        run_dir=str(run_dir),
        max_steps=settings.steps,
        parallel=ParallelConfig(strategy=settings.strategy),  # type: ignore[arg-type]
        log_every_steps=1000,
        accelerator="cpu",
        callbacks=callbacks,
        progress_bar=False,
    )


def one_rank(rank: int, ranks: int, port: int, folder: Path, settings: Settings) -> None:
    """Both ways, in one group of ranks; rank 0 writes what it measured."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_RUN_ID"] = "benchmark"
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for repeat in range(settings.repeats):
        for way in WAYS if repeat % 2 else WAYS[::-1]:
            found[way].append(train(folder, settings, way))
            gc.collect()  # a trainer refers to itself; its gigabytes would stay
    if rank == 0:
        (folder / f"{ranks}.json").write_text(json.dumps(found))


def measure(ranks: int, settings: Settings, where: Path | None) -> dict[str, list[dict[str, float]]]:
    """What each way took, by repeat."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=where) as name:
        processes = [
            context.Process(target=one_rank, args=(rank, ranks, port, Path(name), settings), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"exit codes {[process.exitcode for process in processes]}")
        found: dict[str, list[dict[str, float]]] = json.loads((Path(name) / f"{ranks}.json").read_text())
    return found


def table(results: dict[int, dict[str, list[dict[str, float]]]], settings: Settings, command: str) -> str:
    """The figures as Markdown."""
    parameters = sum(p.numel() for p in Regression(settings.width).parameters())

    def of(found: list[dict[str, float]], name: str) -> float:
        return median(each[name] for each in found)

    first = next(iter(results.values()))["async"][0]["bytes"]
    lines = [
        "# What a checkpoint costs",
        "",
        "What is measured, and how to read it, stands in [`benchmarks/checkpoint.py`](../checkpoint.py).",
        "",
        f"{parameters:,} parameters, AdamW, {first / 1e6:,.0f} MB a checkpoint, {settings.strategy},"
        f" {settings.repeats} repeats, a save every {settings.every_steps} steps. Seconds.",
        "",
        "| ranks | stall async | stall sync | async / sync, median (least, most) | first async | writing, async |",
        "|-:|-:|-:|-:|-:|-:|",
    ]
    for ranks, found in results.items():
        ratios = [a["stall"] / b["stall"] for a, b in zip(found["async"], found["sync"], strict=True)]
        lines.append(
            f"| {ranks} | {of(found['async'], 'stall'):.2f} | {of(found['sync'], 'stall'):.2f} |"
            f" {median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f}) |"
            f" {of(found['async'], 'first'):.2f} | {of(found['async'], 'write'):.2f} |"
        )
    lines += [
        "",
        "| ranks | step, nothing written | step, while a save is written | resume: checksums | resume: load |",
        "|-:|-:|-:|-:|-:|",
    ]
    for ranks, found in results.items():
        both = found["async"] + found["sync"]
        lines.append(
            f"| {ranks} | {of(both, 'free'):.2f} | {of(found['async'], 'busy'):.2f} | {of(both, 'verify'):.2f} |"
            f" {of(both, 'load'):.2f} |"
        )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    lines += ["", f"{cpu()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}; `{command}`.", ""]
    return "\n".join(lines)


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--where", type=Path, help="a folder on the disk to measure; by default the temporary one")
    for name in ("width", "repeats", "steps", "every_steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name))
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default=Settings.strategy)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/checkpoint"))
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    names = ("width", "repeats", "steps", "every_steps", "strategy")
    settings = Settings(**{name: getattr(given, name) for name in names})
    results = {ranks: measure(ranks, settings, given.where) for ranks in given.ranks}
    changed = [f"--{n} {getattr(given, n)}" for n in names if getattr(given, n) != getattr(Settings, n)]
    text = table(results, settings, " ".join(["python benchmarks/checkpoint.py", *changed]))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".md").write_text(text)
    record = {"settings": asdict(settings), "seconds": {str(ranks): found for ranks, found in results.items()}}
    given.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
