"""``trainer.validate_every_steps``: Lightning's validation interval counts micro batches, the configuration steps."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from disttrain.lightning_advice import check_by_hand


class ValidationInterval(Callback):
    """Turns the validation interval, in steps, into Lightning's micro batches once these are known."""

    def __init__(self, validate_every_steps: int | None) -> None:
        self._every = validate_every_steps

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The data module has set the accumulation by now."""
        if stage == "fit":
            check_by_hand(trainer)
        if self._every is not None and stage == "fit":
            trainer.val_check_interval = self._every * trainer.accumulate_grad_batches
            trainer.check_val_every_n_epoch = None
