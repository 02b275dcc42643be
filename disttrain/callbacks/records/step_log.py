"""Log loss, learning rate, throughput and data wait every few steps.

The loss covers all samples since the last log and is summed on the device by the task; the host synchronizes with the
device only when a line is logged. The sums are part of a checkpoint, so the first line after a resume is the mean over
the same steps as without it, on any number of ranks. Throughput excludes validation and checkpoints.
"""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from disttrain.callbacks.bad_sample_report import BadSamples
from disttrain.callbacks.checkpointing.callback import Checkpointing
from disttrain.data.loader.loaders import TrainLoader
from disttrain.data.module import sharded_data
from disttrain.errors import ConfigError
from disttrain.lightning.callback import Callback
from disttrain.tasks.base import Task


class StepLog(Callback):
    """Sends training metrics to the loggers.

    Args:
        every_steps: optimizer steps between two lines.
        bad_samples: the callback that counts skipped samples.
    """

    def __init__(self, every_steps: int, bad_samples: BadSamples) -> None:
        if every_steps < 1:
            raise ConfigError(f"trainer.log_every_steps is {every_steps}", hint="use at least 1")
        self.every_steps, self.bad_samples = every_steps, bad_samples
        self.checkpoints: Checkpointing | None = None
        """The callback that saves, whose time is excluded; set by the Trainer."""
        self.latest: dict[str, float] = {}
        """The last logged values by name."""
        self.samples = 0
        """Samples trained on in this attempt."""
        self.seconds = 0.0
        """Seconds spent on them, excluding validation and checkpoints."""
        self._since = 0.0
        self._steps = 0
        self._wait = 0.0
        self._saving = 0.0
        self._task: Task | None = None  # set while training
        self._loss: Tensor | None = None
        self._resumed_sums: list[float] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last line; the same on all ranks."""
        sums = self._task.train_sums if self._task is not None else None
        return {"train_sums": None if sums is None else sums.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the sums, so that the next line includes the steps before the checkpoint."""
        self._resumed_sums = state_dict["train_sums"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; start the loss sums from the checkpoint's, or from nothing."""
        self._since, self._wait, self._steps = time.perf_counter(), _waited(trainer), 0
        self._saving = self._saving_seconds()
        if isinstance(pl_module, Task):
            sums, self._resumed_sums = self._resumed_sums, None
            self._task = pl_module
            pl_module.train_sums = (
                None if sums is None else torch.tensor(sums, dtype=torch.float64).to(pl_module.device)
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the last micro batch's loss, for modules that do not sum their own."""
        self._loss = outputs.get("loss") if isinstance(outputs, dict) and self._task is None else None

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count a step; log if due."""
        self._steps += 1
        if trainer.global_step % self.every_steps == 0:
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_clock(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the validation metrics and restart the clock."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if isinstance(pl_module, Task):
            self._send(trainer, pl_module.last_evaluation)
        # This validation's checkpoint is saved after this; its time is subtracted later.
        self._since, self._saving = time.perf_counter(), self._saving_seconds()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the steps since the last line to the totals."""
        self._stop_clock(trainer)

    def _stop_clock(self, trainer: pl.Trainer) -> None:
        """Add the time since the clock was started, and restart it."""
        now, saving = time.perf_counter(), self._saving_seconds()
        self.seconds += now - self._since - (saving - self._saving)
        self._since, self._saving = now, saving
        loaded = sharded_data(trainer)
        if loaded is not None:
            self.samples += self._steps * loaded.global_batch_size
        self._steps = 0

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values: dict[str, float] = {}
        if isinstance(pl_module, Task):
            loss = pl_module.take_train_loss()
            if loss is not None:
                values["train/loss"] = float(loss)
        elif self._loss is not None:
            values["train/loss"] = float(trainer.strategy.reduce(self._loss * trainer.accumulate_grad_batches))
        norm = getattr(pl_module if isinstance(pl_module, Task) else trainer.strategy, "grad_norm", None)
        if norm is not None:
            values["train/grad_norm"] = float(norm)
        values["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        seconds, samples, waited = self.seconds, self.samples, _waited(trainer)
        self._stop_clock(trainer)
        elapsed = max(1e-9, self.seconds - seconds)
        if self.samples > samples:
            values["samples_per_second"] = (self.samples - samples) / elapsed
        values["data_wait"] = min(1.0, max(0.0, waited - self._wait) / elapsed)
        self._wait = waited
        loaded = sharded_data(trainer)
        if loaded is not None and loaded.skip_bad:
            values["train/bad_samples"] = self.bad_samples.total
        self._send(trainer, values)

    def _saving_seconds(self) -> float:
        return self.checkpoints.save_seconds if self.checkpoints is not None else 0.0

    def _send(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        self.latest.update(values)
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=trainer.global_step)


def _waited(trainer: pl.Trainer) -> float:
    loader = trainer.train_dataloader
    return loader.wait_seconds if isinstance(loader, TrainLoader) else 0.0
