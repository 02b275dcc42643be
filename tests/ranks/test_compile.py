"""``compile: blocks`` on the CPU by TorchInductor: the weights of the eager run, in every layout, and breaks told."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disttrain import OptimizerConfig, ParallelConfig, Trainer
from disttrain.system.reading import read_run
from tests.support.ranks import Outcome, run_ranks
from tests.support.sameness import MicroBatches, MLPTask, TransformerTask
from tests.support.weights import differing, distance, whole_weights

STEPS, MICRO_BATCHES = 3, 4
pytestmark = [
    pytest.mark.slow,  # a minute to compile in each process, on a busy machine
    pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs g++ to compile for the CPU"),
]


class Broken(nn.Module):
    """A block in which compilation must break off."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.inner(inputs)
        torch._dynamo.graph_break()
        return hidden * 2.0  # type: ignore[no-any-return]


class Plain(MLPTask):
    """No dropout, since masks differ between compiled and eager code."""

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__(optimizer)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


class BrokenTask(Plain):
    """One of two blocks breaks."""

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__(optimizer)
        self.model.blocks[0] = Broken(self.model.blocks[0])


TASKS: dict[str, Any] = {"dropout": MLPTask, "plain": Plain, "broken": BrokenTask, "transformer": TransformerTask}


def train_in(out: str, ranks: int, options: dict[str, Any], task: str, caches: str) -> None:
    """Train some steps; rank 0 writes the weights."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": caches, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    trainer = Trainer(
        run_dir=str(Path(out).with_suffix("")),
        max_steps=STEPS,
        parallel=ParallelConfig(**options),
        gradient_clip_norm=0.5,
        seed=5,
        progress_bar=False,
    )
    accumulation = MICRO_BATCHES // ranks
    trainer.accumulate_grad_batches = accumulation
    batches = MicroBatches(trainer.global_rank, accumulation, micro_batches=MICRO_BATCHES, steps=STEPS)
    trainer.fit(TASKS[task](OptimizerConfig(name="sgd", lr=0.1, momentum=0.9)), train_dataloaders=batches)
    whole = whole_weights(trainer)
    if trainer.is_global_zero:
        torch.save(whole, out)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The weights after training with some options, what was printed, and the run's folder; once a module."""
    folder = tmp_path_factory.mktemp("compile")

    @cache
    def run(ranks: int, task: str, options: tuple[tuple[str, Any], ...]) -> tuple[dict[str, Tensor], Outcome, Path]:
        name = "-".join([task, str(ranks), *(f"{key}={value}" for key, value in options)])
        out, logs = folder / f"{name}.pt", folder / f"{name}-logs"
        arguments = (str(out), ranks, dict(options), task, str(folder / "caches"))
        outcome = run_ranks(ranks, train_in, *arguments, folder=logs, timeout=400).ok()
        return torch.load(out, weights_only=True), outcome, folder / name

    def by_name(ranks: int, task: str, **options: Any) -> tuple[dict[str, Tensor], Outcome, Path]:
        found: tuple[dict[str, Tensor], Outcome, Path] = run(ranks, task, tuple(sorted(options.items())))
        return found

    return by_name


def test_compiled_blocks_train_as_eager_ones_do(train) -> None:  # type: ignore[no-untyped-def]
    eager, _, _ = train(1, "plain", strategy="ddp")
    compiled, outcome, run_dir = train(1, "plain", strategy="ddp", compile="blocks")
    assert distance(eager, compiled) <= 1e-6
    assert "compiled 2 graphs without a break" in outcome.text
    assert read_run(run_dir)["compile"]["graphs"] >= 2


def test_a_break_is_told_with_its_reason(train) -> None:  # type: ignore[no-untyped-def]
    compiled, outcome, run_dir = train(1, "broken", strategy="ddp", compile="blocks")
    assert distance(train(1, "broken", strategy="ddp")[0], compiled) <= 1e-6
    breaks = read_run(run_dir)["compile"]["graph_breaks"]
    assert sum(breaks.values()) == 1, breaks
    assert "graph_break()" in next(iter(breaks)), breaks
    assert "with 1 break, which cost speed" in outcome.text
    assert [event["kind"] for event in read_run(run_dir)["events"]][:1] == ["compile"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_dropout_in_compiled_blocks_is_keyed(train, strategy: str) -> None:  # type: ignore[no-untyped-def]
    """Other masks than without compiling, but the same in every layout: to the bit, when summed in a tree."""
    alone, _, _ = train(1, "dropout", strategy="ddp", compile="blocks", reduction="tree")
    eager, _, _ = train(1, "dropout", strategy="ddp", reduction="tree")
    assert distance(alone, eager) > 1e-4, "dropout was not at work"
    assert not differing(alone, train(2, "dropout", strategy=strategy, compile="blocks", reduction="tree")[0])


@pytest.mark.parametrize(("strategy", "kind"), [("fsdp", "blocks"), ("ddp", "selective")])
def test_compiled_blocks_run_again(train, strategy: str, kind: str) -> None:  # type: ignore[no-untyped-def]
    alone, _, _ = train(1, "transformer", strategy="ddp", compile="blocks")
    again, outcome, _ = train(2, "transformer", strategy=strategy, compile="blocks", activation_checkpointing=kind)
    assert distance(alone, again) <= 1e-6
    assert "compiled 1 graph without a break" in outcome.text
