"""Seed PyTorch's generators before every training micro batch; see :mod:`disttrain.parallel.randomness`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from disttrain.lightning.position import micro_batch_of_global_batch
from disttrain.parallel.randomness import seed_micro_batch
from disttrain.parallel.ranks import data_ranks


class KeyedRandomness(Callback):
    """Makes dropout and other random numbers in training independent of rank, world size and resumes.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators from the step and the micro batch's index in the global batch."""
        index = micro_batch_of_global_batch(trainer, data_ranks(trainer).rank)
        seed_micro_batch(self.seed, trainer.global_step, index, pl_module.device)
