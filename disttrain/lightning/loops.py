"""The training loop, which counts optimizer steps; it stands in for Lightning's, which counts micro batches.

What happens in a fit, with the hooks of callbacks and module in their places::

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

Lightning calls ``on_train_batch_end`` of all callbacks before that of the module. What a module does there, such as
moving a teacher's weights, belongs to the step, so what saves or ends a run does so in ``on_step_end``, which comes
later. Lightning's own counters of micro batches are kept as it keeps them, for its callbacks and loggers;
:mod:`disttrain.lightning.position` turns them into steps and back. Cost: one look at each callback a step.
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
    """Replace a trainer's loops by ours, which start at step 0 with the same limits; loading a checkpoint moves them.

    Args:
        trainer: a trainer that is not running.
        validate_every_steps: optimizer steps between validations; by default Lightning's settings say when.
    """
    given = trainer.fit_loop
    own = FitLoop(trainer, min_epochs=given.min_epochs, max_epochs=given.max_epochs)
    own.epoch_loop = StepLoop(trainer, given.min_steps, given.max_steps, validate_every_steps=validate_every_steps)
    trainer.fit_loop = own


def first_validation(trainer: pl.Trainer) -> float:
    """Return the step of a new run's first validation, once the loader is set up; infinite if it is not known."""
    loop = trainer.fit_loop.epoch_loop
    if isinstance(loop, StepLoop) and loop.validate_every_steps is not None:
        return loop.validate_every_steps
    return (trainer.check_val_every_n_epoch or 1) * steps_per_epoch(trainer)


class FitLoop(_FitLoop):
    """Lightning's loop over epochs, which also ends a run whose training was over when it was interrupted.

    Lightning's returns at once if no step is left to do, without the hooks that end a training: a run killed between
    its last checkpoint and its end would never restore its best weights nor be recorded as complete. This loop starts
    and ends such a training, with no step between.
    """

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do; a resumed run always has to run the hooks of its end."""
        nothing_to_read = self.max_batches == 0 or self.trainer.limit_train_batches == 0
        return super().skip and (nothing_to_read or not self._loaded_from_state_dict)

    def advance(self) -> None:
        """Run an epoch, or the rest of one."""
        super().advance()
        # While restarting, Lightning skips schedules that need a metric at the end of an epoch, since its checkpoints
        # hold no metrics; ours do. Its property `restarting` would set this again if there is a limit in steps.
        self._restarting = False


class StepLoop(_TrainingEpochLoop):
    """An epoch, step by step: :meth:`advance` is one optimizer step, :meth:`on_advance_end` the validation after it.

    Args:
        trainer: whose loop it is.
        min_steps: optimizer steps before which nothing stops the run early.
        max_steps: optimizer steps at which the run ends, -1 for no limit.
        validate_every_steps: optimizer steps between validations; by default Lightning's settings say when.
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
        """Whether schedules that need a metric (``ReduceLROnPlateau``) have yet to see the last step."""
        self.resumed_metrics: Mapping[str, float] | None = None
        """The metrics that such schedules may need, from a checkpoint that was loaded."""
        self._stands = False  # whether the last advance ran no micro batch

    @property
    def global_step(self) -> int:
        """Optimizer steps done: one per global batch, even if a module that optimizes by hand steps more often."""
        module = self.trainer.lightning_module
        if module is None or module.automatic_optimization:
            return super().global_step
        # Lightning counts each call of each optimizer's step(); checkpoints, limits and samples count batches.
        counts: Any = self.batch_progress.total
        return int(counts.processed // self.trainer.accumulate_grad_batches)

    def reset(self) -> None:
        """Begin or continue an epoch."""
        with warnings.catch_warnings():
            # disttrain's loaders take the position from the trainer; data/loader/user_loaders.py warns about others.
            warnings.filterwarnings("ignore", message=".*dataloader is not resumable")
            super().reset()

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Begin or continue an epoch, and step the schedules that a checkpoint was saved before."""
        super().on_run_start(data_fetcher)
        if self.resumed_metrics is None:
            return
        metrics, self.resumed_metrics = self.resumed_metrics, None
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        # If a validation was due at this step, Lightning passes that place again without one, and steps them there.
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
            self.on_iteration_done()  # Lightning's run() calls it after each: it ends the state of restarting
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
        # When it restarts at a step with a validation, Lightning's first advance returns at once to pass that place.
        self._stands = self.batch_progress.total.ready == before

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        if self.validate_every_steps is None:
            return super()._should_check_val_fx(data_fetcher)
        stops = self.trainer.should_stop and self.trainer.fit_loop._can_stop_early
        due = stops or self.global_step % self.validate_every_steps == 0
        return bool(due and ends_step(self.trainer) and self.trainer.enable_validation)

    def _broadcast_sigterm_tensor(self) -> None:
        # Lightning asks before every batch whether a rank was signalled, which costs a collective a step
        # (https://github.com/Lightning-AI/pytorch-lightning/pull/20825); disttrain votes in the background.
        pass
