"""A dry save before the first step: what a checkpoint could not hold, or a resume not bring back, is found now.

Everything that a save gathers is gathered and looked at: types, shapes and names, on all ranks, which decide together;
where a hook fails, once more when training starts. Nothing is copied, written, stepped or drawn, and no buffer is
synchronized. Cost: a walk over the state, once or twice an attempt.
"""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from disttrain.distributed.synchronize_errors import gather, raise_together
from disttrain.errors import DisttrainError
from disttrain.strategies.build import strategy_of


class Rehearsal(Callback):
    """Makes the dry save once all callbacks, the module and its optimizers are set up."""

    def __init__(self) -> None:
        self._done = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look before a checkpoint is loaded: then a start that cannot work has changed nothing.

        Raises:
            CheckpointError: a checkpoint could not be saved or resumed.
        """
        strategy, found = strategy_of(trainer), None
        with raise_together():
            try:
                found = strategy.rehearse()
            except DisttrainError:
                raise
            except Exception:  # a hook's own: it may count on what only comes about when training starts
                pass
            if found is not None:
                strategy.examine(found)
        self._done = all(gather(found is not None))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look now, if a hook failed before."""
        if not self._done:
            self._done = True
            with raise_together():
                strategy_of(trainer).examine(strategy_of(trainer).rehearse())
