"""Early stopping on an exact validation metric, decided once for all ranks.

The metric covers all samples on every rank, and rank 0's value decides, so all ranks stop at the same step. Patience,
best value and decision are saved in checkpoints: a resumed run stops at the same step as an uninterrupted one. A short
validation before step 0 checks the monitor's name. Validations that do not log the metric do not count.
"""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from disttrain.callbacks.checkpointing.callback import Checkpointing
from disttrain.callbacks.checkpointing.monitor import Mode, Monitor, begin_validation, expect
from disttrain.errors import ConfigError
from disttrain.lightning.loops import first_validation
from disttrain.lightning.position import steps_per_epoch
from disttrain.system.terminal import tell


class EarlyStopping(Callback):
    """Stops training when a validation metric has not improved for a number of validations.

    Args:
        monitor: the logged metric, such as ``val/loss``; without one, nothing is stopped or restored.
        mode: ``min`` or ``max``.
        patience: validations without improvement before the run stops.
        min_delta: an improvement must be larger than this to count.
        restore_best: end with the weights of the best validation instead of the last ones.
    """

    def __init__(
        self,
        *,
        monitor: str | None = None,
        mode: Mode = "min",
        patience: int = 5,
        min_delta: float = 0.0,
        restore_best: bool = True,
    ) -> None:
        if patience < 1:
            raise ConfigError(f"early_stopping.patience is {patience}", hint="use at least 1")
        self.monitor = None if monitor is None else Monitor(monitor, mode, min_delta)
        self.patience = patience
        self.restore_best = restore_best
        self.best = math.nan
        self.best_step = 0
        self.waited = 0
        self.stop_reason = ""
        self.checkpoints: Checkpointing | None = None
        """The callback that keeps the best weights; set by the Trainer."""
        self._told = False  # about a validation without the metric

    @property
    def has_best(self) -> bool:
        """Whether any validation has logged a value that counts."""
        return not math.isnan(self.best)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let checkpointing rank by this metric, unless it has its own monitor."""
        checkpoints = self.checkpoints
        if checkpoints is not None and checkpoints.monitor is None and checkpoints.keep_best:
            checkpoints.monitor = self.monitor and Monitor(self.monitor.name, self.monitor.mode)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the monitor's name before step 0."""
        if self.monitor is not None:
            self.monitor.value(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the settings; stop again if the run had decided to stop when it was interrupted."""
        if self.monitor is not None and not trainer.enable_validation:
            raise ConfigError(
                f"early stopping monitors {self.monitor.name!r}, but the run has no validation",
                hint="set data.val, or leave early_stopping.monitor out",
            )
        if self.monitor is not None:
            if self.has_best:
                expect(trainer, self.monitor.name)
            self._check_interval(trainer)
        if self.stop_reason:
            trainer.should_stop = True

    def _check_interval(self, trainer: pl.Trainer) -> None:
        """Warn if the run ends before its first validation, so that early stopping never acts."""
        assert self.monitor is not None
        first, epoch = first_validation(trainer), steps_per_epoch(trainer)
        limits: list[float] = [trainer.max_steps] if trainer.max_steps > 0 else []
        limits += [trainer.max_epochs * epoch] if trainer.max_epochs is not None and trainer.max_epochs > 0 else []
        last = min(limits, default=math.inf)
        if first <= last or math.isinf(first):
            return
        self._tell(
            trainer,
            f"the first validation would be at step {first} and the run ends at step {last}: early stopping on"
            f" {self.monitor.name!r} never acts; set trainer.validate_every_steps to {last} or less",
        )

    def _tell(self, trainer: pl.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            tell(text)
            if self.checkpoints is not None:
                self.checkpoints.tell(trainer.global_step, "monitor", text)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the current metrics, to tell them from those of this validation."""
        begin_validation(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, count and decide."""
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = self.monitor.value(trainer)
        if value is None:
            if not self._told:
                text = f"the validation at step {trainer.global_step} did not log {self.monitor.name!r}"
                self._tell(trainer, f"{text}: such validations do not count for early stopping")
            self._told = True
            return
        if self.monitor.better(value, self.best if self.has_best else self.monitor.worst):
            self.best, self.best_step, self.waited = value, trainer.global_step, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.stop_reason = (
                f"{self.monitor.name} has not improved on {self.best:.6g} (step {self.best_step})"
                f" for {self.patience} validations"
            )
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last state, then restore the best weights."""
        checkpoints = self.checkpoints
        if checkpoints is None or not (self.restore_best and self.has_best):
            return
        checkpoints.save_if_new(trainer)
        if not checkpoints.restore_best(trainer) and trainer.is_global_zero:
            text = (
                f"the weights of the best validation (step {self.best_step}) are of no checkpoint here: the last stay"
            )
            tell(text)
            checkpoints.tell(trainer.global_step, "best", text)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, the patience used and the decision."""
        return {
            "monitor": self.monitor and self.monitor.name,
            "best": self.best,
            "best_step": self.best_step,
            "waited": self.waited,
            "stop_reason": self.stop_reason,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts, unless another metric is monitored now."""
        if self.monitor is not None and state_dict["monitor"] == self.monitor.name:
            self.best, self.best_step = state_dict["best"], state_dict["best_step"]
            self.waited = state_dict["waited"]
            # A run resumed with more patience continues.
            self.stop_reason = state_dict["stop_reason"] if self.waited >= self.patience else ""
