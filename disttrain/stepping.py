"""A training loop that tells callbacks when a step is over: ``on_step_end(trainer, pl_module)``.

Lightning calls ``on_train_batch_end`` of all callbacks before that of the module, so what a module does there, such as
moving a teacher's weights, belongs to a step whose checkpoint has been taken already, and a resumed run would lack it.
``on_step_end`` comes once everything of an optimizer step has been done, before the validation that may follow; what
saves or ends a run does so there. Cost: one look at each callback a step.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class SteppingEpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the micro batches of an epoch, with the hook after those that end a step."""

    plateaus_due = False
    """A step was done, and schedules that wait for a metric (``ReduceLROnPlateau``) have not seen it yet."""
    resumed_metrics: Mapping[str, float] | None = None
    """What such schedules may want of the metrics before a checkpoint that was loaded."""

    @property
    def global_step(self) -> int:
        """Optimizer steps done: one a global batch, however often a module that optimizes by hand steps in it."""
        module = self.trainer.lightning_module
        if module is None or module.automatic_optimization:
            return super().global_step
        # Lightning counts each call of each optimizer's step(); checkpoints, limits and samples count batches.
        counts: Any = self.batch_progress.total
        return int(counts.processed // self.trainer.accumulate_grad_batches)

    def _broadcast_sigterm_tensor(self) -> None:
        """Nothing: a broadcast a batch, which under rank skew hangs.

        See https://github.com/Lightning-AI/pytorch-lightning/pull/20825.
        """

    def reset(self) -> None:
        """Begin an epoch, or continue one."""
        with warnings.catch_warnings():
            # disttrain's loaders take the position from the trainer; of others disttrain.data.user_loaders tells.
            warnings.filterwarnings("ignore", message=".*dataloader is not resumable")
            super().reset()

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Begin or continue an epoch; what a checkpoint was taken before is done now."""
        super().on_run_start(data_fetcher)
        if self.resumed_metrics is None:
            return
        metrics, self.resumed_metrics = self.resumed_metrics, None
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        # Where a validation was due at the step, Lightning comes past it once more, without running it.
        if self.plateaus_due and not self._should_check_val_fx(data_fetcher):
            self.update_lr_schedulers("step", update_plateau_schedulers=True)

    def update_lr_schedulers(self, interval: str, update_plateau_schedulers: bool) -> None:
        """Step the schedules that are due."""
        if interval == "step" and update_plateau_schedulers and not self._should_accumulate():
            if not self.plateaus_due:
                return
            self.plateaus_due = False
        super().update_lr_schedulers(interval, update_plateau_schedulers)

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on a micro batch."""
        before = self.batch_progress.total.ready
        super().advance(data_fetcher)
        # A resumed loop may only stand where it stood.
        if self.batch_progress.total.ready == before or self._should_accumulate():
            return
        self.plateaus_due = True
        for callback in self.trainer.callbacks:
            if hasattr(callback, "on_step_end"):
                callback.on_step_end(self.trainer, self.trainer.lightning_module)
