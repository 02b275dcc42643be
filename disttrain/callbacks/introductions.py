"""Give callbacks references to the callbacks they work with, so that none searches the trainer's list."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from disttrain.callbacks.checkpointing.callback import Checkpointing
from disttrain.callbacks.early_stopping import EarlyStopping
from disttrain.callbacks.preemption import Preemption
from disttrain.callbacks.records.run_record import RunRecord
from disttrain.callbacks.records.step_log import StepLog
from disttrain.callbacks.records.trace import StepTrace
from disttrain.callbacks.update_guard.callback import UpdateGuard


class Introductions(Callback):
    """Connects the Trainer's and the user's callbacks; must come first in the trainer's list.

    Args:
        record: the run's record.
        step_log: the log of training metrics.
    """

    def __init__(self, record: RunRecord, step_log: StepLog) -> None:
        self._record, self._step_log = record, step_log
        self.checkpoints: Checkpointing | None = None
        """The callback that saves: the user's or the Trainer's default."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connect again: the module may have added callbacks in ``configure_callbacks``."""
        self.introduce(trainer.callbacks)  # type: ignore[attr-defined]

    def introduce(self, callbacks: list[Callback]) -> None:
        """Give each callback the others it works with."""
        self.checkpoints = next((one for one in callbacks if isinstance(one, Checkpointing)), None)
        self._record.stopping = next((one for one in callbacks if isinstance(one, EarlyStopping)), None)
        for one in callbacks:
            if isinstance(one, EarlyStopping | Preemption | RunRecord | StepLog | UpdateGuard):
                one.checkpoints = self.checkpoints
            if isinstance(one, UpdateGuard):
                one.record = self._record
            elif isinstance(one, StepTrace):
                one.step_log = self._step_log
