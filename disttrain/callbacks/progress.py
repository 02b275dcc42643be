"""Show progress on rank 0: a bar on a terminal, otherwise one line per validation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from disttrain.callbacks.records.step_log import StepLog
from disttrain.tasks.base import run_steps


class StepProgress(ProgressBar):
    """Shows step, loss, samples/s and time left; prints nothing per step without a terminal.

    Args:
        log: the log whose values are shown.
    """

    def __init__(self, log: StepLog) -> None:
        super().__init__()
        self._values = log
        self._console = Console(highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; called on all ranks except 0."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar."""
        self._close()  # training starts again after a rollback
        if not (self._enabled and trainer.is_global_zero and self._console.is_terminal):
            return
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, refresh_per_second=4)
        self._task = self._bar.add_task("", total=run_steps(trainer), completed=trainer.global_step)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar; its own thread redraws it a few times per second."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=trainer.global_step, description=self._shown("train/loss"))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print one line with the latest values."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not (self._enabled and trainer.is_global_zero):
            return
        names = ["train/loss", *sorted(name for name in self._values.latest if name.startswith("val/"))]
        self._console.print(
            f"step {trainer.global_step:>6}  epoch {trainer.current_epoch:>3}  {self._shown(*names)}", soft_wrap=True
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the bar, which restores the terminal."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _shown(self, *names: str) -> str:
        latest = self._values.latest
        parts = [f"{name} {latest[name]:.4f}" for name in names if name in latest]
        if "samples_per_second" in latest:
            parts.append(f"{latest['samples_per_second']:,.0f} samples/s")
        return "  ".join(parts)
