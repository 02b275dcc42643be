"""What benchmarks with ranks have in common: a network, a batch, ranks of their own, and the last line of a table."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain import OptimizerConfig, Task
from disttrain.data.loader.batches import COUNT, KEY, WEIGHT
from disttrain.distributed.rendezvous import reserve_port
from disttrain.distributed.world import detect_world
from disttrain.models.mlp import MLP


class Regression(Task):
    """A network of square layers that learns to give back what it gets."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__(optimizer=OptimizerConfig(name="adamw", lr=1e-4))
        torch.manual_seed(0)
        self.model = MLP(width, hidden=[width] * layers, out_features=width)

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = self.model(batch["inputs"])
        return out

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch["inputs"]).square().mean(dim=1)


class Micro:
    """The same random micro batch of a rank again and again: no loader is measured."""

    def __init__(self, samples: int, width: int, length: int, rank: int) -> None:
        inputs = torch.randn(samples, width, generator=torch.Generator().manual_seed(rank))
        names = [str(number) for number in range(samples)]
        self.batch = {"inputs": inputs, WEIGHT: torch.ones(len(names)), KEY: names, COUNT: len(names)}
        self.length, self.rank, self.num_replicas = length, rank, detect_world().size  # no rank has another's

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([self.batch] * self.length)


def run_ranks(ranks: int, target: Callable[..., None], *arguments: Any) -> None:
    """Call a function in that many new processes, each with one thread.

    Args:
        ranks: how many.
        target: called with the rank, the time (``time.time()``) at which its process was started, and the arguments.
        arguments: passed on.

    Raises:
        RuntimeError: one has failed.
    """
    context = multiprocessing.get_context("spawn")
    processes = []
    with reserve_port() as port:
        for rank in range(ranks):
            given = (rank, ranks, port, time.time(), target, arguments)
            processes.append(context.Process(target=_rank, args=given, daemon=True))
            processes[-1].start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"exit codes {[process.exitcode for process in processes]}")


def _rank(
    rank: int, ranks: int, port: int, started: float, target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_RUN_ID"] = "benchmark"
    torch.set_num_threads(1)
    target(rank, started, *arguments)


def machine(command: str) -> str:
    """The line that says where a table comes from."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    return f"{cpu()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}; `{command}`."


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
