"""The price of equal bits: a step with ``reduction: tree`` against the same step with ``reduction: fast``.

Claim: at 4 ranks, on a model of 8 million parameters, summing gradients in one fixed tree costs at most 1.3 times
the step of plain DDP, and of plain FSDP.

Method: a multi-layer perceptron of 8.4 million parameters, float32, AdamW, clipping by norm, one thread a rank, gloo on
one machine. The ranks are started once for each number of them; then a repeat trains a new model with every contender
for some steps, and the order rotates from repeat to repeat. A repeat's figure is the median of its steps after the
first three, on rank 0; the table gives the median over repeats, and the median, minimum and maximum of the ratios
tree / fast of the repeats. Before it counts, one step of each is compared: the weights must agree but for rounding.

How to read it: ratios within one run mean more than times, which follow the machine. Ranks that share a core make
both slower, and the tree's own work, which would overlap with the backward pass, is then never free. Gloo copies
between processes of one machine; no figure here says anything about NCCL.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from common import Micro, Regression, machine, run_ranks
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from disttrain import ParallelConfig, Trainer

WIDTH: Final = 1024
LAYERS: Final = 7
WARM_UP: Final = 3
CONTENDERS: Final = [(strategy, reduction) for strategy in ("ddp", "fsdp") for reduction in ("fast", "tree")]


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    samples: int = 64
    accumulation: int = 2
    steps: int = 12
    repeats: int = 5
    clip: float | None = 1.0


class StepTimes(Callback):
    """Seconds of each step, from its first micro batch to the end of its last."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.seconds.append(time.perf_counter() - self._started)


def train(folder: Path, settings: Settings, strategy: str, reduction: str, steps: int) -> tuple[float, Tensor]:
    """Train a new model; gives the median step in milliseconds and this rank's first weights."""
    times = StepTimes()
    trainer = Trainer(
        run_dir=str(folder / "run"),
        max_steps=steps,
        parallel=ParallelConfig(strategy=strategy, reduction=reduction),  # type: ignore[arg-type]
        gradient_clip_norm=settings.clip,
        log_every_steps=1000,
        accelerator="cpu",
        callbacks=[times],
        progress_bar=False,
    )
    trainer.save_checkpoint = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    trainer.accumulate_grad_batches = settings.accumulation
    length = settings.steps * settings.accumulation
    micro = Micro(settings.samples, WIDTH, length, trainer.global_rank)
    trainer.fit(Regression(WIDTH, LAYERS), train_dataloaders=micro)
    first = next(iter(trainer.strategy.lightning_module_state_dict().values()))
    whole = first.full_tensor() if hasattr(first, "full_tensor") else first
    return 1000 * median(times.seconds[WARM_UP:] or [0.0]), whole.detach().clone()


def one_rank(rank: int, started: float, ranks: int, folder: Path, settings: Settings) -> None:
    """All contenders, in one group of ranks; rank 0 writes what it measured."""
    weights = [train(folder, settings, *contender, 1)[1] for contender in CONTENDERS]
    for contender, other in zip(CONTENDERS, weights, strict=True):
        if not torch.allclose(weights[0], other, rtol=1e-3, atol=1e-5):
            raise RuntimeError(f"{contender} trained otherwise than {CONTENDERS[0]}")
    found: dict[str, list[float]] = {"-".join(contender): [] for contender in CONTENDERS}
    for repeat in range(settings.repeats):
        turn = repeat % len(CONTENDERS)
        for contender in CONTENDERS[turn:] + CONTENDERS[:turn]:
            found["-".join(contender)].append(train(folder, settings, *contender, settings.steps)[0])
    if rank == 0:
        (folder / f"{ranks}.json").write_text(json.dumps(found))


def measure(ranks: int, settings: Settings) -> dict[str, list[float]]:
    """Milliseconds a step, by contender: one a repeat."""
    with tempfile.TemporaryDirectory() as name:
        run_ranks(ranks, one_rank, ranks, Path(name), settings)
        found: dict[str, list[float]] = json.loads((Path(name) / f"{ranks}.json").read_text())
    return found


def table(results: dict[int, dict[str, list[float]]], settings: Settings, command: str) -> str:
    """The figures as Markdown."""
    parameters = sum(p.numel() for p in Regression(WIDTH, LAYERS).parameters())
    lines = [
        "# Gradients summed in one tree",
        "",
        "What is measured, and how to read it, stands in [`benchmarks/reduction.py`](../reduction.py).",
        "",
        f"{parameters:,} parameters, {settings.accumulation} micro batches of {settings.samples} samples a rank and"
        f" step, clipping {'on' if settings.clip else 'off'}, {settings.repeats} repeats of {settings.steps} steps.",
        "",
        "| ranks | strategy | fast, ms a step | tree, ms a step | tree / fast, median (least, most) |",
        "|-:|-|-:|-:|-:|",
    ]
    for ranks, found in results.items():
        for strategy in ("ddp", "fsdp"):
            fast, tree = found[f"{strategy}-fast"], found[f"{strategy}-tree"]
            ratios = [b / a for a, b in zip(fast, tree, strict=True)]
            lines.append(
                f"| {ranks} | {strategy} | {median(fast):.0f} | {median(tree):.0f} |"
                f" {median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f}) |"
            )
    return "\n".join([*lines, "", machine(command), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=Settings.repeats)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--samples", type=int, default=Settings.samples)
    parser.add_argument("--accumulation", type=int, default=Settings.accumulation)
    parser.add_argument("--no-clip", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reduction"))
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    settings = Settings(
        samples=given.samples,
        accumulation=given.accumulation,
        steps=given.steps,
        repeats=given.repeats,
        clip=None if given.no_clip else 1.0,
    )
    results = {ranks: measure(ranks, settings) for ranks in given.ranks}
    command = "python benchmarks/reduction.py" + (f" --repeats {given.repeats}" if given.repeats != 5 else "")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    text = table(results, settings, command)
    given.out.with_suffix(".md").write_text(text)
    record = {"settings": asdict(settings), "milliseconds_a_step": {str(r): found for r, found in results.items()}}
    given.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
