"""Options that change where numbers live or what DDP knows, and not what is computed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain import OptimizerConfig, ParallelConfig, Trainer
from disttrain.parallel.model.fsdp_internals import fsdp_modules, trained_parameters
from tests.support.ranks import run_ranks
from tests.support.sameness import MicroBatches, MLPTask
from tests.support.weights import differing, distance, whole_weights

STEPS, MICRO_BATCHES = 6, 8


class Spare(MLPTask):
    """Has a layer that no step uses."""

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__(optimizer)
        self.spare = torch.nn.Linear(2, 2)


TASKS: dict[str, type[MLPTask]] = {"mlp": MLPTask, "spare": Spare}


def train_in(out: str, ranks: int, options: dict[str, Any], task: str) -> None:
    """Train some steps, clipped; rank 0 writes the weights."""
    trainer = Trainer(
        run_dir=str(Path(out).with_suffix("")),
        max_steps=STEPS,
        parallel=ParallelConfig(**options),
        gradient_clip_norm=0.5,
        seed=5,
        progress_bar=False,
    )
    trainer.accumulate_grad_batches = MICRO_BATCHES // ranks
    batches = MicroBatches(trainer.global_rank, MICRO_BATCHES // ranks, micro_batches=MICRO_BATCHES, steps=STEPS)
    optimizer = OptimizerConfig(name="sgd", lr=0.1, momentum=0.9)
    trainer.fit(TASKS[task](optimizer), train_dataloaders=batches)
    if "offload" in options:
        records = [record for unit in fsdp_modules(trainer.model) for record in trained_parameters(unit)]
        assert records
        assert all(record.offload_to_cpu for record in records)
    whole = whole_weights(trainer)
    if trainer.is_global_zero:
        torch.save(whole, out)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The weights after training with some options, once a module."""
    folder = tmp_path_factory.mktemp("options")

    @cache
    def run(ranks: int, task: str, options: tuple[tuple[str, Any], ...]) -> dict[str, torch.Tensor]:
        name = "-".join([task, str(ranks), *(f"{key}={value}" for key, value in options)])
        out = folder / f"{name}.pt"
        run_ranks(ranks, train_in, str(out), ranks, dict(options), task, folder=folder / f"{name}-logs").ok()
        found: dict[str, torch.Tensor] = torch.load(out, weights_only=True)
        return found

    def by_name(ranks: int, task: str = "mlp", **options: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = run(ranks, task, tuple(sorted(options.items())))
        return found

    return by_name


def test_offloading_changes_no_bit(train) -> None:  # type: ignore[no-untyped-def]
    plain = train(2, strategy="fsdp")
    assert not differing(plain, train(2, strategy="fsdp", offload=True))


@pytest.mark.parametrize("reduction", ["fast", "tree"])
def test_gradients_outside_the_buckets_have_the_same_bits(train, reduction: str) -> None:  # type: ignore[no-untyped-def]
    inside, outside = (
        train(2, strategy="ddp", reduction=reduction, gradient_as_bucket_view=view) for view in (True, False)
    )
    assert not differing(inside, outside)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_static_graph_trains_as_one_process_does(train, ranks: int) -> None:  # type: ignore[no-untyped-def]
    """With accumulation: the first micro batch of the run reduces too, which must not count it twice."""
    alone = train(1, strategy="ddp")
    assert distance(alone, train(ranks, strategy="ddp", static_graph=True)) <= 1e-6


def test_a_static_graph_leaves_out_what_no_step_uses(train) -> None:  # type: ignore[no-untyped-def]
    alone = train(1, task="spare", strategy="ddp")
    assert distance(alone, train(2, task="spare", strategy="ddp", static_graph=True)) <= 1e-6
