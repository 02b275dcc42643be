"""Callbacks that tests add to real runs."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class KillAt(Callback):
    """Kills its own process, without any chance to clean up, at the start of a micro batch.

    Args:
        step: optimizer steps done before.
        micro_batch: micro batch of the step that follows.
    """

    def __init__(self, step: int, micro_batch: int = 0) -> None:
        self.step, self.micro_batch = step, micro_batch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Die here."""
        if trainer.global_step == self.step and batch_idx % trainer.accumulate_grad_batches == self.micro_batch:
            os.kill(os.getpid(), signal.SIGKILL)
