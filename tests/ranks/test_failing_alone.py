"""A rank that fails alone ends with its own error, though its device waits for the others for ever.

As with NCCL, whose kernels wait on the device: here, what frees the device and what ends the groups is made to wait.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from disttrain import DDP, DisttrainError, OptimizerConfig, Trainer
from disttrain.commands import training
from disttrain.distributed import exit_codes
from tests.support.ranks import run_ranks
from tests.support.sameness import MicroBatches, MLPTask


class Fails(Callback):
    """On one rank alone."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            raise self.error


def fail_alone(run_dir: str, where: str) -> None:
    """Train on two ranks; rank 1 fails, and then waits for ever."""
    exit_codes.TEARDOWN_SECONDS = 0.5

    def wait(*arguments: Any) -> None:
        if dist.get_rank() == 1:
            threading.Event().wait()

    error = ValueError("mine alone") if where == "teardown" else DisttrainError("mine alone", hint="hint it")
    trainer = Trainer(run_dir=run_dir, max_steps=3, callbacks=[Fails(error)], progress_bar=False)
    task = MLPTask(OptimizerConfig(name="sgd", lr=0.1))
    batches = MicroBatches(trainer.global_rank, 1, micro_batches=2, steps=3)
    if where == "teardown":
        DDP.teardown = wait  # type: ignore[method-assign, assignment]
        trainer.fit(task, train_dataloaders=batches)
    else:
        dist.destroy_process_group = wait
        training.TrainingCLI = lambda argv: trainer.fit(task, train_dataloaders=batches)  # type: ignore
        training.run([])


@pytest.mark.parametrize(("where", "code"), [("teardown", 1), ("destroy", 2)])
def test_a_rank_that_cannot_free_its_device_ends_with_its_error(tmp_path: Path, where: str, code: int) -> None:
    outcome = run_ranks(2, fail_alone, str(tmp_path / "run"), where, folder=tmp_path / "logs", timeout=60)
    assert outcome.codes[1] == code, outcome.text
    assert "mine alone" in outcome.outputs[1]
    assert ("ValueError: mine alone" in outcome.outputs[1]) == (where == "teardown")
    assert "rank 1 is forced to exit 0.5 s after its error" in outcome.outputs[1]


def begin(run_dir: Path) -> None:
    """Train on two ranks, with a file in the way of the metrics."""
    trainer = Trainer(run_dir=run_dir, max_steps=1, progress_bar=False)
    batches = MicroBatches(trainer.global_rank, 1, micro_batches=2, steps=1)
    trainer.fit(MLPTask(OptimizerConfig(name="sgd", lr=0.1)), train_dataloaders=batches)


def test_a_record_that_rank_0_cannot_begin_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("mine,yours\n")
    outcome = run_ranks(2, begin, tmp_path / "run", folder=tmp_path / "logs")
    assert outcome.codes == [1, 1], outcome.text
    assert "DataError" in outcome.outputs[0]
    assert "RankError: rank 0 failed" in outcome.outputs[1], outcome.text
    assert (tmp_path / "run" / "metrics.csv").read_text() == "mine,yours\n"
