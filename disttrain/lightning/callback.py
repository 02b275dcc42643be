"""A Lightning callback with an additional hook at the end of each optimizer step."""

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

        ``trainer.global_step`` already counts the step. All callbacks and the module have run ``on_train_batch_end``
        for its last micro batch; a validation, if due, runs afterwards. A checkpoint may be saved here.
        """
