"""Dry-run a save before the first step, to find early what a checkpoint cannot hold or a resume cannot restore.

Everything that a save would gather is gathered and checked (types, shapes and names) on all ranks, which decide
together; if a hook fails, once more when training starts. Nothing is copied, written or stepped, no random number is
drawn and no buffer is synchronized. Cost: one or two walks over the state per attempt.
"""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from disttrain.distributed.synchronize_errors import gather, raise_together
from disttrain.errors import DisttrainError
from disttrain.strategies.build import strategy_of


class Rehearsal(Callback):
    """Runs the dry save once all callbacks, the module and its optimizers are set up."""

    def __init__(self) -> None:
        self._done = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before a checkpoint is loaded, so that a start that cannot work changes nothing.

        Raises:
            CheckpointError: a checkpoint could not be saved or resumed.
        """
        strategy, found = strategy_of(trainer), None
        with raise_together():
            try:
                found = strategy.rehearse()
            except DisttrainError:
                raise
            except Exception:  # from a user's hook, which may need state that exists only once training starts
                pass
            if found is not None:
                strategy.examine(found)
        self._done = all(gather(found is not None))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check now if a hook failed before."""
        if not self._done:
            self._done = True
            with raise_together():
                strategy_of(trainer).examine(strategy_of(trainer).rehearse())
