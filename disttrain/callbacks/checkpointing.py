"""When checkpoints are taken and which are kept.

A checkpoint is taken at a step boundary, after the validation that is due there: so it holds what that
validation decided, and a resumed run neither repeats nor misses one. Older checkpoints are deleted only after
a newer one is committed; the last few and the best few are kept. Cost: the time to write, when one is due.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from disttrain.callbacks.monitor import Mode, Monitor
from disttrain.checkpoint import store
from disttrain.errors import ConfigError
from disttrain.parallel.agree import raise_together
from disttrain.parallel.strategies import strategy_of


class Checkpointing(Checkpoint):
    """Saves checkpoints to ``<run_dir>/checkpoints``.

    Args:
        every_steps: steps between two checkpoints; by default one at the end of each epoch.
        keep_last: how many of the newest to keep.
        keep_best: how many of the best by ``monitor`` to keep; 0 keeps none for their metric.
        monitor: the metric, as logged; by default that of early stopping, and without either none is best.
        mode: ``min`` or ``max``.
    """

    def __init__(
        self,
        *,
        every_steps: int | None = None,
        keep_last: int = 1,
        keep_best: int = 1,
        monitor: str | None = None,
        mode: Mode = "min",
    ) -> None:
        if every_steps is not None and every_steps < 1:
            raise ConfigError(
                f"checkpoint.every_steps is {every_steps}", mend="use at least 1, or null for every epoch"
            )
        if keep_last < 1 or keep_best < 0:
            raise ConfigError(
                f"checkpoint.keep_last is {keep_last} and keep_best {keep_best}",
                mend="keep at least the last one, and 0 or more of the best",
            )
        self.every_steps, self.keep_last, self.keep_best = every_steps, keep_last, keep_best
        self.monitor = Monitor(monitor, mode) if monitor is not None and keep_best else None
        """What is best; early stopping sets it where it was not given."""
        self.directory: Path | None = None
        self._best: list[tuple[float, int, str]] = []  # (value, step, directory name), best first
        self._saved_step = -1
        self.save_seconds = 0.0
        """Seconds that saving has stopped this attempt for."""

    @property
    def best_step(self) -> int:
        """Step of the best checkpoint, -1 where there is none."""
        return self._best[0][1] if self._best else -1

    @property
    def best_model_path(self) -> str:
        """Directory of the best checkpoint, empty where there is none; Lightning's ``ckpt_path='best'``."""
        return str(self._directory() / self._best[0][2]) if self._best and self.directory else ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the run's folder."""
        self.directory = self.directory or Path(trainer.default_root_dir) / "checkpoints"
        if stage == "fit" and trainer.is_global_zero:
            store.remove_unfinished(self.directory)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where one is due and no validation follows, which would change the state."""
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate() or not self._due(trainer):
            return
        if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
            return
        self._save(trainer, value=None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where one is due or the metric is among the best."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = self.monitor.value(trainer) if self.monitor is not None else None
        if self._due(trainer) or self._among_best(value):
            self._save(trainer, value)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of the run, unless that was done."""
        self.save_if_new(trainer)

    def save_if_new(self, trainer: pl.Trainer) -> None:
        """Save the present step, unless a checkpoint of it exists. A collective."""
        if self._saved_step != trainer.global_step:
            self._save(trainer, value=None)

    def restore_best(self, trainer: pl.Trainer) -> bool:
        """Load the best checkpoint's weights; False where there is none. A collective."""
        if not self._best:
            return False
        strategy_of(trainer).load_weights(self._directory() / self._best[0][2])
        # What is in memory is no longer the state of this step.
        self._saved_step = trainer.global_step
        return True

    def state_dict(self) -> dict[str, Any]:
        """Which checkpoints are the best."""
        return {"monitor": self.monitor and self.monitor.name, "best": [list(entry) for entry in self._best]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Know the best ones again, as far as they still exist."""
        if self.monitor is None or state_dict["monitor"] != self.monitor.name or self.directory is None:
            return
        for value, step, name in state_dict["best"]:
            if (self.directory / name / store.MARKER).exists():
                self._best.append((float(value), int(step), str(name)))

    def _due(self, trainer: pl.Trainer) -> bool:
        if trainer.global_step == self._saved_step:
            return False
        if self.every_steps is not None:
            return trainer.global_step % self.every_steps == 0
        return trainer.fit_loop.epoch_loop._num_ready_batches_reached()

    def _among_best(self, value: float | None) -> bool:
        if self.monitor is None or value is None:
            return False
        if len(self._best) < self.keep_best:
            return self.monitor.better(value, self.monitor.worst)
        return self.monitor.better(value, self._best[-1][0])

    def _save(self, trainer: pl.Trainer, value: float | None) -> None:
        step, started = trainer.global_step, time.perf_counter()
        path: Path = trainer.strategy.broadcast(store.free_path(self._directory(), f"step-{step:08d}"))
        # The list is part of what is saved, so it has to name this checkpoint before it is written.
        before = list(self._best)
        if self.monitor is not None and value is not None and self._among_best(value):
            sign = 1 if self.monitor.mode == "min" else -1
            self._best.append((value, step, path.name))
            self._best.sort(key=lambda entry: (sign * entry[0], entry[1]))
            del self._best[self.keep_best :]
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except BaseException:
            self._best = before
            raise
        self._saved_step = step
        self._prune(trainer)
        self.save_seconds += time.perf_counter() - started

    def _prune(self, trainer: pl.Trainer) -> None:
        with raise_together():
            if trainer.is_global_zero:
                there, _ = store.committed(self._directory())
                kept = {name for _, _, name in self._best}
                for old in there[: -self.keep_last]:
                    if old.path.name not in kept:
                        store.remove(old.path)

    def _directory(self) -> Path:
        assert self.directory is not None, "the callback is not set up"
        return self.directory
