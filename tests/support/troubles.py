"""Further callbacks that tests add to real runs: slow passes and copies, spoilt weights, errors of the user's own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from disttrain.checkpoint.remote.copies import Mirror


class SlowBackward(Callback):
    """Makes every backward pass take longer on one rank, before the last gradient is there.

    Args:
        seconds: how much longer.
        rank: on which rank.
    """

    def __init__(self, seconds: float, rank: int = 1) -> None:
        self.seconds, self.rank = seconds, rank

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the brake on."""
        if trainer.global_rank == self.rank:
            next(pl_module.parameters()).register_hook(lambda gradient: time.sleep(self.seconds))


class SlowCopy(Callback):
    """Makes the upload of every file of a checkpoint take longer on one rank.

    Args:
        seconds: how much longer.
        rank: which rank.
    """

    def __init__(self, seconds: float, rank: int = 0) -> None:
        self.seconds, self.rank = seconds, rank

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the brake on."""
        if trainer.global_rank == self.rank:
            known = Mirror.upload

            def slow(mirror: Mirror, name: str, path: Path) -> None:
                time.sleep(self.seconds)
                known(mirror, name, path)

            Mirror.upload = slow  # type: ignore[method-assign]


class Refuse(pl.LightningModule):
    """Cannot be made."""

    def __init__(self) -> None:
        raise ValueError("my table has no such column")


class LoseServer(Callback):
    """Fails on one rank as code that talks to a server of its own might, with the words of a collective that fails.

    Args:
        rank: which rank.
    """

    def __init__(self, rank: int = 1) -> None:
        self.rank = rank

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fail."""
        if trainer.global_rank == self.rank:
            raise RuntimeError("my metrics server db:5432: Connection refused")


class SpoilWeights(Callback):
    """Makes a weight no number at the end of a step, once, as a fault of the device's might.

    Args:
        step: which, counted from 1.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Spoil it."""
        if trainer.global_step == self.step:
            self.step = -1
            with torch.no_grad():
                next(pl_module.parameters()).mul_(float("nan"))
