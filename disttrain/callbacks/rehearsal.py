"""A dry save before the first step: what a checkpoint could not hold, or a resume not bring back, is found now.

Everything that a save gathers is gathered once and looked at: types, shapes and names, on all ranks, which decide
together. Nothing is copied, written, stepped or drawn, and no buffer is synchronized. Callbacks that change a run in a
way that a resume cannot repeat are refused by what they are. Cost: a walk over the state, once an attempt.
"""

from __future__ import annotations

from typing import Final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    Callback,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from disttrain.errors import ConfigError, DisttrainError
from disttrain.parallel.agree import gather, raise_together
from disttrain.parallel.strategies import strategy_of

_REFUSED: Final[dict[type[Callback], tuple[str, str]]] = {
    StochasticWeightAveraging: (
        "averages weights in its own copy of the module and replaces the optimizer's schedule, neither of which a"
        " checkpoint holds",
        "use disttrain.EMA, whose averages are saved and sharded",
    ),
    WeightAveraging: (
        "puts its averages in the place of the weights in a checkpoint",
        "use disttrain.EMA, whose averages are saved beside the weights and sharded",
    ),
    ModelPruning: (
        "gives the module other parameters in mid-run (weight_orig, weight_mask), which a new process lacks when it"
        " loads a checkpoint",
        "prune after training: disttrain checkpoints export, then torch.nn.utils.prune; or mask the weights in"
        " forward() by a buffer",
    ),
    OnExceptionCheckpoint: (
        "saves on the ranks that failed, in the midst of a step",
        "leave it out: a run that failed resumes from its last checkpoint (checkpoint.every_steps, every_minutes)",
    ),
}


class Rehearsal(Callback):
    """Makes the dry save once all callbacks, the module and its optimizers are set up."""

    def __init__(self) -> None:
        self._done = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse callbacks whose changes no resume brings back.

        Raises:
            ConfigError: there is one.
        """
        self._done = False
        for callback in trainer.callbacks if stage == "fit" else ():  # type: ignore[attr-defined]
            for kind, (what, mend) in _REFUSED.items():
                if isinstance(callback, kind):
                    raise ConfigError(f"the callback {type(callback).__name__} {what}", mend=mend)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look before a checkpoint is loaded: then a start that cannot work has changed nothing.

        Raises:
            CheckpointError: a checkpoint could not be saved or resumed.
        """
        with raise_together():
            try:
                strategy_of(trainer).rehearse()
                self._done = True
            except DisttrainError:
                raise
            except Exception:  # a hook's own: it may count on what only comes about when training starts
                self._done = False
        self._done = all(gather(self._done))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look now, if a hook failed before."""
        if not self._done:
            self._done = True
            with raise_together():
                strategy_of(trainer).rehearse()
