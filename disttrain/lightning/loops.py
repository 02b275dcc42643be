"""A training loop that counts optimizer steps; it replaces Lightning's, which counts micro batches.

The order of events in a fit, with the hooks of callbacks and module::

    for epoch in epochs:                     on_train_epoch_start
        for step in epoch:
            for micro_batch in step:         on_train_batch_start
                loss = training_step(micro_batch)
                loss.backward()              on_before_backward, on_after_backward
                if micro_batch is last:      on_before_optimizer_step
                    clip gradients; step the optimizer and the schedules
                                             on_train_batch_end
                                             on_step_end
            if a validation is due:          on_validation_start, ..., on_validation_end
                                             on_train_epoch_end

Lightning calls ``on_train_batch_end`` of all callbacks before the module's. What a module does there, such as updating
a teacher's weights, is part of the step, so code that saves or ends a run uses the later hook ``on_step_end``.
Lightning's micro-batch counters are maintained as in Lightning, for its callbacks and loggers;
:mod:`disttrain.lightning.position` converts them to steps and back. Cost: one iteration over the callbacks per step.
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
from disttrain.lightning.position import steps_per_epoch


def use_own_loops(trainer: pl.Trainer, *, validate_every_steps: int | None = None) -> None:
    """Replace a trainer's loops with ours: same limits, starting at step 0 until a checkpoint is loaded.

    Args:
        trainer: a trainer that is not running.
        validate_every_steps: optimizer steps between validations; by default as in Lightning's settings.
    """
    given = trainer.fit_loop
    own = FitLoop(trainer, min_epochs=given.min_epochs, max_epochs=given.max_epochs)
    own.epoch_loop = StepLoop(trainer, given.min_steps, given.max_steps, validate_every_steps=validate_every_steps)
    trainer.fit_loop = own


def first_validation(trainer: pl.Trainer) -> float:
    """Return the step of a new run's first validation, once the loader is set up; infinite if unknown."""
    loop = trainer.fit_loop.epoch_loop
    if isinstance(loop, StepLoop) and loop.validate_every_steps is not None:
        return loop.validate_every_steps
    return (trainer.check_val_every_n_epoch or 1) * steps_per_epoch(trainer)


class FitLoop(_FitLoop):
    """Lightning's loop over epochs, which also finishes a run that was interrupted after its last step.

    Lightning's loop returns immediately if no steps are left, without calling the hooks at the end of training. A run
    killed between its last checkpoint and its end would then never restore its best weights or be recorded as
    complete. This loop starts and ends training in that case, without a step in between.
    """

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do; a resumed run always has to call the hooks at its end."""
        nothing_to_read = self.max_batches == 0 or self.trainer.limit_train_batches == 0
        return super().skip and (nothing_to_read or not self._loaded_from_state_dict)

    def advance(self) -> None:
        """Run an epoch, or the rest of one."""
        super().advance()
        # While restarting, Lightning skips metric-based schedules at the end of an epoch, because its checkpoints hold
        # no metrics; ours do. Its `restarting` property would set the flag again if max_steps is set, so bypass it.
        self._restarting = False


class StepLoop(_TrainingEpochLoop):
    """Runs an epoch: :meth:`advance` is one optimizer step, :meth:`on_advance_end` the validation after it.

    Args:
        trainer: the trainer that runs this loop.
        min_steps: optimizer steps before which the run cannot stop early.
        max_steps: optimizer steps at which the run ends; -1 for no limit.
        validate_every_steps: optimizer steps between validations; by default as in Lightning's settings.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        min_steps: int | None = None,
        max_steps: int = -1,
        *,
        validate_every_steps: int | None = None,
    ) -> None:
        super().__init__(trainer, min_steps, max_steps)
        self.validate_every_steps = validate_every_steps
        self.plateaus_due = False
        """Whether metric-based schedules (``ReduceLROnPlateau``) have not been stepped since the last step."""
        self.resumed_metrics: Mapping[str, float] | None = None
        """The metrics that such schedules may need, from the loaded checkpoint."""
        self._stands = False  # whether the last advance ran no micro batch

    @property
    def global_step(self) -> int:
        """Optimizer steps done: one per global batch, even if a module with manual optimization steps more often."""
        module = self.trainer.lightning_module
        if module is None or module.automatic_optimization:
            return super().global_step
        # Lightning counts every optimizer's step() calls; checkpoints, limits and data positions need global batches.
        counts: Any = self.batch_progress.total
        return int(counts.processed // self.trainer.accumulate_grad_batches)

    def reset(self) -> None:
        """Begin or continue an epoch."""
        with warnings.catch_warnings():
            # disttrain's loaders read the position from the trainer; data/loader/user_loaders.py warns about others.
            warnings.filterwarnings("ignore", message=".*dataloader is not resumable")
            super().reset()

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Begin or continue an epoch, and step metric-based schedules that the checkpoint was saved before."""
        super().on_run_start(data_fetcher)
        if self.resumed_metrics is None:
            return
        metrics, self.resumed_metrics = self.resumed_metrics, None
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        # If a validation was due at this step, Lightning revisits it without validating, and steps the schedules there.
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
        """Train for one optimizer step."""
        self._advance_by_micro_batch(data_fetcher)
        while not ends_step(self.trainer):
            self.on_iteration_done()  # as Lightning's run() does after each; resets the restarting flag
            self._advance_by_micro_batch(data_fetcher)
        if self._stands:
            return
        self.plateaus_due = True
        for callback in self.trainer.callbacks:
            if isinstance(callback, Callback):
                callback.on_step_end(self.trainer, self.trainer.lightning_module)

    def _advance_by_micro_batch(self, data_fetcher: _DataFetcher) -> None:
        before = self.batch_progress.total.ready
        super().advance(data_fetcher)
        # After a restart at a step with a validation, Lightning's first advance() returns without running a batch.
        self._stands = self.batch_progress.total.ready == before

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        if self.validate_every_steps is None:
            return super()._should_check_val_fx(data_fetcher)
        stops = self.trainer.should_stop and self.trainer.fit_loop._can_stop_early
        due = stops or self.global_step % self.validate_every_steps == 0
        return bool(due and ends_step(self.trainer) and self.trainer.enable_validation)

    def _broadcast_sigterm_tensor(self) -> None:
        # Lightning broadcasts before every batch whether rank 0 received SIGTERM, which costs a collective per batch
        # (https://github.com/Lightning-AI/pytorch-lightning/pull/20825); disttrain votes in the background.
        pass
