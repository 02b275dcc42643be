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
the cores. Resume: new processes go on from the last checkpoint, as they do after a kill; seconds from the start of the
process to the end of the first step, on rank 0: Python's imports, comparing all checksums, loading model and optimizer
(from files that are in memory), everything else before the first batch, and the step.

`--repeats 2 --steps 13 --every_steps 4` takes about four minutes on two cores, and five gigabytes of memory.

How to read it: compare ratios within one run. Seconds follow the disk and the machine, and whatever else it does. Where
writing takes longer than the steps between two saves, the next save waits, and the stall says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from common import Micro, Regression, machine, run_ranks
from lightning.pytorch.callbacks import Callback

from disttrain import Checkpointing, ParallelConfig, Trainer
from disttrain.checkpoint.format import verification
from disttrain.checkpoint.format.marker import committed

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


class Watch(Callback):
    """Seconds of each step without its save, and of each save with the looks at it since the save before."""

    def __init__(self, checkpoints: Checkpointing, every_steps: int) -> None:
        self.checkpoints, self.every_steps = checkpoints, every_steps
        self.stalls: list[float] = []
        self.free: list[float] = []
        self.busy: list[float] = []
        self._ended = self._spent = 0.0
        self._writes = False  # when the step began

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now, spent = time.perf_counter(), self.checkpoints.save_seconds
        if batch_idx and batch_idx % self.every_steps == 0:
            self.stalls.append(spent - self._spent)
            self._spent = spent
        elif batch_idx > 2:
            (self.busy if self._writes else self.free).append(now - self._ended)
        self._ended, self._writes = now, self.checkpoints._saver.busy


def train(run_dir: Path, settings: Settings, way: str) -> dict[str, float]:
    """Train a new model; this rank's seconds."""
    checkpoints = Checkpointing(every_steps=settings.every_steps, save=way)  # type: ignore[arg-type]
    watch = Watch(checkpoints, settings.every_steps)
    trainer = make_trainer(run_dir, settings, [checkpoints, watch])
    if trainer.is_global_zero:
        shutil.rmtree(run_dir, ignore_errors=True)
    trainer.fit(Regression(settings.width, LAYERS), train_dataloaders=micro(settings, trainer.global_rank))
    return {
        "stall": median(watch.stalls[1:]),
        "first": watch.stalls[0],
        "write": checkpoints.write_seconds / (len(watch.stalls) + 1),
        "free": median(watch.free),
        "busy": median(watch.busy) if watch.busy else 0.0,
        "bytes": committed(run_dir / "checkpoints")[0][-1].num_bytes,
    }


class Stations(Callback):
    """The times at which a resumed run comes to its first batch and to the end of its first step."""

    def __init__(self) -> None:
        self.begun = self.ended = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.begun = self.begun or time.time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ended = self.ended or time.time()


def resume(rank: int, started: float, run_dir: Path, settings: Settings, out: Path) -> None:
    """Go on from the newest checkpoint for a step; rank 0 writes the seconds of each part since its process began."""
    imported, spent = time.time(), dict.fromkeys(("verify", "load"), 0.0)

    def timed(owner: Any, name: str, entry: str) -> None:
        known = getattr(owner, name)

        def call(*arguments: Any, **more: Any) -> Any:
            begun = time.time()
            try:
                return known(*arguments, **more)
            finally:
                spent[entry] += time.time() - begun

        setattr(owner, name, call)

    stations = Stations()
    settings = replace(settings, steps=settings.steps + 1)
    trainer = make_trainer(run_dir, settings, [Checkpointing(every_steps=1000), stations])
    timed(verification, "fault_together", "verify")
    timed(trainer.strategy, "load_checkpoint", "load")
    trainer.save_checkpoint = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    start = trainer.find_start("auto")
    assert start.checkpoint is not None
    model, batches = Regression(settings.width, LAYERS), micro(settings, rank)
    trainer.fit(model, train_dataloaders=batches, ckpt_path=str(start.checkpoint))
    parts = {"import": imported - started, **spent, "step": stations.ended - stations.begun}
    parts["other"] = stations.begun - started - parts["import"] - sum(spent.values())
    if rank == 0:
        out.write_text(json.dumps({**parts, "total": stations.ended - started}))


def micro(settings: Settings, rank: int) -> Micro:
    """The batches of a rank: an epoch is as long as a run."""
    return Micro(settings.samples, settings.width, settings.steps, rank)


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


def one_rank(rank: int, started: float, folder: Path, settings: Settings) -> None:
    """Both ways, in one group of ranks; rank 0 writes what it measured, and the last run stays."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for repeat in range(settings.repeats):
        for way in WAYS if repeat % 2 else WAYS[::-1]:
            found[way].append(train(folder / "run", settings, way))
            gc.collect()  # a trainer refers to itself; its gigabytes would stay
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def measure(ranks: int, settings: Settings, where: Path | None) -> dict[str, list[dict[str, float]]]:
    """What each way and a resume took, by repeat."""
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        run_ranks(ranks, one_rank, folder, settings)
        found: dict[str, list[dict[str, float]]] = json.loads((folder / "found.json").read_text())
        found["resume"] = []
        for _ in range(settings.repeats):
            record = folder / "run" / "run.json"
            record.write_text(record.read_text().replace('"completed"', '"running"'))
            run_ranks(ranks, resume, folder / "run", settings, folder / "resume.json")
            found["resume"].append(json.loads((folder / "resume.json").read_text()))
    return found


def table(results: dict[int, dict[str, list[dict[str, float]]]], settings: Settings, command: str) -> str:
    """The figures as Markdown."""
    parameters = sum(p.numel() for p in Regression(settings.width, LAYERS).parameters())

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
    lines += ["", "| ranks | step, nothing written | step, while a save is written |", "|-:|-:|-:|"]
    for ranks, found in results.items():
        both = found["async"] + found["sync"]
        lines.append(f"| {ranks} | {of(both, 'free'):.2f} | {of(found['async'], 'busy'):.2f} |")
    parts = ("import", "verify", "load", "other", "step", "total")
    lines += [
        "",
        "A resume, from the start of the process to the end of its first step:",
        "",
        "| ranks | import | checksums | load | model, ranks, set-up | first step | in all |",
        "|-:|-:|-:|-:|-:|-:|-:|",
    ]
    for ranks, found in results.items():
        lines.append(f"| {ranks} | " + " | ".join(f"{of(found['resume'], part):.2f}" for part in parts) + " |")
    return "\n".join([*lines, "", machine(command), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
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
    changed = [f"--ranks {' '.join(map(str, given.ranks))}"] if given.ranks != [1, 2] else []
    changed += [f"--{n} {getattr(given, n)}" for n in names if getattr(given, n) != getattr(Settings, n)]
    text = table(results, settings, " ".join(["python benchmarks/checkpoint.py", *changed]))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".md").write_text(text)
    record = {"settings": asdict(settings), "seconds": {str(ranks): found for ranks, found in results.items()}}
    given.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
