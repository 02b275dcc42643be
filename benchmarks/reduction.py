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
import multiprocessing
import os
import platform
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

from disttrain import OptimizerConfig, ParallelConfig, Task, Trainer
from disttrain.data.batches import COUNT, KEY, WEIGHT
from disttrain.models.mlp import MLP

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


class Regression(Task):
    """A network wide enough that its gradients are worth reducing."""

    def __init__(self) -> None:
        super().__init__(optimizer=OptimizerConfig(name="adamw", lr=1e-4))
        torch.manual_seed(0)
        self.model = MLP(WIDTH, hidden=[WIDTH] * LAYERS, out_features=WIDTH)

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = self.model(batch["inputs"])
        return out

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch["inputs"]).square().mean(dim=1)


class Micro:
    """The same random micro batch again and again: no loader is measured."""

    def __init__(self, settings: Settings, rank: int) -> None:
        draw = torch.Generator().manual_seed(rank)
        inputs = torch.randn(settings.samples, WIDTH, generator=draw)
        names = [str(number) for number in range(settings.samples)]
        self.batch = {"inputs": inputs, WEIGHT: torch.ones(len(names)), KEY: names, COUNT: len(names)}
        self.length = settings.steps * settings.accumulation

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([self.batch] * self.length)


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
    trainer.fit(Regression(), train_dataloaders=Micro(settings, trainer.global_rank))
    first = next(iter(trainer.strategy.lightning_module_state_dict().values()))
    whole = first.full_tensor() if hasattr(first, "full_tensor") else first
    return 1000 * median(times.seconds[WARM_UP:] or [0.0]), whole.detach().clone()


def one_rank(rank: int, ranks: int, port: int, folder: Path, settings: Settings) -> None:
    """All contenders, in one group of ranks; rank 0 writes what it measured."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_RUN_ID"] = "benchmark"
    torch.set_num_threads(1)
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
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        arguments = [(rank, ranks, port, Path(name), settings) for rank in range(ranks)]
        processes = [context.Process(target=one_rank, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"exit codes {[process.exitcode for process in processes]}")
        found: dict[str, list[float]] = json.loads((Path(name) / f"{ranks}.json").read_text())
    return found


def table(results: dict[int, dict[str, list[float]]], settings: Settings, command: str) -> str:
    """The figures as Markdown."""
    parameters = sum(p.numel() for p in Regression().parameters())
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
