"""``bf16-true`` on real ranks: bfloat16 gradients are added over the ranks in float32, unless told otherwise."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from disttrain import OptimizerConfig, ParallelConfig, Trainer
from tests.support.ranks import run_ranks
from tests.support.sameness import MicroBatches, MLPTask
from tests.support.weights import differing, distance, whole_weights

STEPS = 6
pytestmark = pytest.mark.slow


class Quiet(MLPTask):
    """Inputs that stay float32 where weights are bfloat16."""

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = self.model(batch["inputs"].to(self.model.head.weight.dtype))
        return out


def train_in(out: str, ranks: int, parallel: ParallelConfig, precision: str) -> None:
    """Train some steps; rank 0 writes the weights."""
    trainer = Trainer(
        run_dir=str(Path(out).with_suffix("")),
        max_steps=STEPS,
        parallel=parallel,
        precision=precision,  # type: ignore[arg-type]
        gradient_clip_norm=1.0,
        seed=5,
        progress_bar=False,
    )
    batches = MicroBatches(trainer.global_rank, 4 // ranks, micro_batches=4, steps=STEPS)
    trainer.accumulate_grad_batches = 4 // ranks
    trainer.fit(Quiet(OptimizerConfig(name="sgd", lr=0.3)), train_dataloaders=batches)
    whole = whole_weights(trainer)
    if trainer.is_global_zero:
        torch.save(whole, out)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The weights after training, once a module."""
    folder = tmp_path_factory.mktemp("half")

    @cache
    def run(ranks: int, strategy: str, reduce_dtype: str, precision: str = "bf16-true") -> dict[str, Tensor]:
        out = folder / f"{ranks}-{strategy}-{reduce_dtype}-{precision}.pt"
        parallel = ParallelConfig(strategy=strategy, reduce_dtype=reduce_dtype)  # type: ignore[arg-type]
        run_ranks(ranks, train_in, str(out), ranks, parallel, precision, folder=folder / f"{out.stem}-logs").ok()
        found: dict[str, Tensor] = torch.load(out, weights_only=True)
        return found

    return run


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_true_trains_as_float32_does_but_for_rounding(train, strategy: str) -> None:  # type: ignore[no-untyped-def]
    exact = train(1, "ddp", "fp32", "32-true")
    wide, narrow = (train(4, strategy, reduce_dtype) for reduce_dtype in ("fp32", "bf16"))
    assert {t.dtype for t in wide.values()} == {torch.bfloat16}
    apart = {"fp32": distance(exact, wide), "bf16": distance(exact, narrow)}
    assert all(1e-4 < value < 3e-2 for value in apart.values()), apart
    assert differing(wide, narrow), "the type in which gradients travel changed nothing"


def test_both_strategies_add_ranks_alike(train) -> None:  # type: ignore[no-untyped-def]
    """One micro batch a rank: no rounding between them, and the sum over ranks is float32's."""
    assert distance(train(4, "ddp", "fp32"), train(4, "fsdp", "fp32")) <= 4e-3
