"""A Lightning callback that is also told when an optimizer step is over."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch import callbacks


class Callback(callbacks.Callback):
    """Lightning's ``Callback`` with the hook that :class:`~disttrain.trainer.Trainer` adds.

    Example:
        >>> class Count(Callback):
        ...     steps = 0
        ...
        ...     def on_step_end(self, trainer, pl_module):
        ...         self.steps += 1
    """

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after each optimizer step, on all ranks, once per global batch.

        ``trainer.global_step`` counts the step. ``on_train_batch_end`` of its last micro batch is over for all
        callbacks and the module; the validation that may be due is still to come. A checkpoint may be saved here.
        """
