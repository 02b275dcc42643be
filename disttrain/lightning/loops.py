"""Training loops that count optimizer steps and finish what an interrupted run had left: they stand in for Lightning's.

``on_step_end`` of a :class:`~disttrain.lightning.callback.Callback` is called once everything of an optimizer step is
done, before the validation that may follow. Lightning calls ``on_train_batch_end`` of all callbacks before that of the
module, so what a module does there, such as moving a teacher's weights, belongs to a step whose checkpoint has been
taken already, and a resumed run would lack it. What saves or ends a run does so in ``on_step_end``. Cost: one look at
each callback a step.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from disttrain.lightning.callback import Callback
from disttrain.lightning.internals import ends_step, validation_follows


def use_own_loops(trainer: pl.Trainer) -> None:
    """Give a trainer loops that count from 0, with the limits of those that it has; loading a checkpoint sets them."""
    given = trainer.fit_loop
    own = FitLoop(trainer, min_epochs=given.min_epochs, max_epochs=given.max_epochs)
    own.epoch_loop = StepLoop(trainer, min_steps=given.min_steps, max_steps=given.max_steps)
    trainer.fit_loop = own


class FitLoop(_FitLoop):
    """Lightning's loop over epochs, which also ends a run whose training was over when it was interrupted.

    Lightning's returns at once if no step is left to do, without the hooks that end a training: a run killed between
    its last checkpoint and its end would never restore its best weights nor be recorded as complete. This loop starts
    and ends such a training, with no step between.
    """

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do; a resumed run always has its end to come to."""
        nothing_to_read = self.max_batches == 0 or self.trainer.limit_train_batches == 0
        return super().skip and (nothing_to_read or not self._loaded_from_state_dict)

    def advance(self) -> None:
        """Run an epoch, or the rest of one."""
        super().advance()
        # While it restarts, Lightning skips schedules that wait for a metric at the end of an epoch, since it keeps no
        # metrics; ours do. Not by its property `restarting`, which would set it again if there is a limit in steps.
        self._restarting = False


class StepLoop(_TrainingEpochLoop):
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
        if self.plateaus_due and not validation_follows(self.trainer):
            self.update_lr_schedulers("step", update_plateau_schedulers=True)

    def update_lr_schedulers(self, interval: str, update_plateau_schedulers: bool) -> None:
        """Step the schedules that are due."""
        if interval == "step" and update_plateau_schedulers and ends_step(self.trainer):
            if not self.plateaus_due:
                return
            self.plateaus_due = False
        super().update_lr_schedulers(interval, update_plateau_schedulers)

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on a micro batch."""
        before = self.batch_progress.total.ready
        super().advance(data_fetcher)
        # A resumed loop may only stand where it stood.
        if self.batch_progress.total.ready == before or not ends_step(self.trainer):
            return
        self.plateaus_due = True
        for callback in self.trainer.callbacks:
            if isinstance(callback, Callback):
                callback.on_step_end(self.trainer, self.trainer.lightning_module)

    def _broadcast_sigterm_tensor(self) -> None:
        # Lightning asks before every batch whether a rank was signalled, which costs a collective a step
        # (https://github.com/Lightning-AI/pytorch-lightning/pull/20825); disttrain votes in the background.
        pass
