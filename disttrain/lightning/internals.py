"""Functions that wrap Lightning's protected parts.

Lightning 2.0 made its loops and connectors protected so that it can change them. No code outside this package uses
them, and each function below has a contract test (``tests/lightning/test_internals.py``) whose message names what has
moved. The loops themselves are in :mod:`disttrain.lightning.loops`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.loops.utilities import _reset_progress
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerStatus
from torch.optim import Optimizer

from disttrain.lightning.position import micro_batch_of_step


def begins_step(trainer: pl.Trainer) -> bool:
    """Return whether the current micro batch is the first of its optimizer step."""
    return micro_batch_of_step(trainer) == 0


def ends_step(trainer: pl.Trainer) -> bool:
    """Return whether the current (or most recent) micro batch is the last of its optimizer step.

    Counting is not enough: Lightning also steps on the last micro batch of an epoch, even if the step is incomplete.
    """
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def ends_epoch(trainer: pl.Trainer) -> bool:
    """Return whether the current (or most recent) micro batch is the last of its epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    # A loader without a length only reveals its last micro batch by ending.
    return progress.current.ready == trainer.num_training_batches or progress.is_last_batch


def ends_training(trainer: pl.Trainer) -> bool:
    """Return whether the last step ended its epoch or reached ``max_steps``."""
    return ends_epoch(trainer) or 0 <= trainer.max_steps <= trainer.global_step


def validation_follows(trainer: pl.Trainer) -> bool:
    """Return whether Lightning will validate after the step that has just ended."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]  # set while it trains


def run_validation(trainer: pl.Trainer) -> None:
    """Validate before the first step, as Lightning does after one, without leaving traces in its loops."""
    loop, logger = trainer.fit_loop.epoch_loop, trainer._logger_connector
    first, restarting = logger._first_loop_iter, loop.val_loop.restarting
    loop.val_loop.restarting = False
    trainer.validating = True  # tells Lightning which loop self.log() belongs to
    loop.val_loop.run()
    trainer.training = True
    logger._first_loop_iter = first
    # Otherwise the loop would treat the validation after the first step as an interrupted one and only finish it.
    _reset_progress(loop.val_loop)
    loop.val_loop._has_run, loop.val_loop.restarting = False, restarting


def end_midway(trainer: pl.Trainer) -> None:
    """End a fit early, with the teardown hooks of a complete one but not those of its end. Collective.

    Raising an exception instead would make Lightning call ``on_exception`` and mark the loggers' runs as failed.
    """
    trainer._teardown()
    call._call_teardown_hook(trainer)
    trainer.state.status, trainer.state.stage = TrainerStatus.FINISHED, None


def without_signal_handlers(trainer: pl.Trainer) -> None:
    """Keep Lightning from installing signal handlers: they broadcast and save, and hang if ranks are out of step."""
    trainer._signal_connector = _NoSignals(trainer)


class _NoSignals(_SignalConnector):
    """Installs no handlers, so it has none to restore; the trainer's ``received_sigterm`` stays False."""

    def register_signal_handlers(self) -> None:
        """Leave the process's handlers unchanged."""


def checkpoint_of(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what Lightning would save now: loops, callbacks, data module, optimizers, weights, additions by hooks."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def train_loaders(trainer: pl.Trainer) -> Any:
    """Return the ``CombinedLoader`` that holds the training loaders; None before they are set up."""
    return trainer.fit_loop._combined_loader


def set_device(module: pl.LightningModule, device: torch.device) -> None:
    """Set what ``module.device`` returns, without moving the module."""
    module._device = device


def move_optimizers(optimizers: Iterable[Optimizer], device: torch.device) -> None:
    """Move the state of optimizers to a device, in place."""
    _optimizers_to_device(optimizers, device)
