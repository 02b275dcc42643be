"""When checkpoints are saved, how they are written, and which are kept.

A checkpoint is saved at a step boundary, after the validation due there: it includes that validation's decisions, so a
resumed run neither repeats nor misses one. It is copied to CPU memory and written by a background thread while training
continues; the next save waits for it. An error in a background save is raised on all ranks at the same step. Older
checkpoints are deleted only after a newer one is committed. Checkpoints newer than the resume point are renamed and
ignored (:mod:`disttrain.checkpoint.cleanup`). Remote copies of committed ones follow the same rules.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from disttrain.callbacks.checkpointing.best import BestList, Rated
from disttrain.callbacks.checkpointing.guarded import Guarded
from disttrain.callbacks.checkpointing.monitor import Mode, Monitor, begin_validation, expect
from disttrain.callbacks.checkpointing.schedule import SaveTimes
from disttrain.checkpoint import cleanup
from disttrain.checkpoint.format import reader
from disttrain.checkpoint.format.fence import Attempt, guard
from disttrain.checkpoint.format.groups import trained_names
from disttrain.checkpoint.format.marker import Metric
from disttrain.checkpoint.format.retention import Keep
from disttrain.checkpoint.format.writer import SpoiltError
from disttrain.checkpoint.remote.copies import Mirror, MirrorConfig, begin
from disttrain.checkpoint.remote.uploads import Mirroring, loaded_from
from disttrain.checkpoint.saving.saver import Outcome, Saver, SaveRequest
from disttrain.distributed.synchronize_errors import raise_together
from disttrain.errors import CheckpointError, ConfigError
from disttrain.lightning.callback import Callback
from disttrain.lightning.internals import validation_follows
from disttrain.strategies.build import strategy_of
from disttrain.system.terminal import tell

_GRACE_SECONDS = 60.0  # how long a failing run waits for a save in progress


class Checkpointing(Callback, Checkpoint):
    """Saves checkpoints to ``<run_dir>/checkpoints``.

    Args:
        every_steps: steps between two checkpoints; by default, one is saved at the end of each epoch.
        every_epochs: epochs between two, at their ends.
        every_minutes: minutes between two, by rank 0's clock.
        keep_last: how many of the newest to keep.
        keep_best: how many of the best by ``monitor`` to keep; 0 keeps none for their metric.
        keep_every_steps: also save one every this many steps, and keep these permanently.
        monitor: the logged metric; by default that of early stopping, and without either, none is best.
        mode: ``min`` or ``max``.
        save: ``async`` writes in the background, from a copy in CPU memory; ``sync`` stops training meanwhile.
        on_save_error: ``stop`` ends the run if a save fails; ``continue`` trains on and records an event. The last
            checkpoint must be saved in any case.
        verify: what a resume verifies: ``checksums`` of all files, or only their ``sizes``.
        mirror: remote storage to copy committed checkpoints to, and to resume from if they are not here.
    """

    def __init__(
        self,
        *,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        every_minutes: float | None = None,
        keep_last: int = 1,
        keep_best: int = 1,
        keep_every_steps: int | None = None,
        monitor: str | None = None,
        mode: Mode = "min",
        save: Literal["async", "sync"] = "async",
        on_save_error: Literal["stop", "continue"] = "stop",
        verify: Literal["checksums", "sizes"] = "checksums",
        mirror: MirrorConfig | None = None,
    ) -> None:
        self.times = SaveTimes(
            every_steps=every_steps,
            every_epochs=every_epochs,
            every_minutes=every_minutes,
            keep_every_steps=keep_every_steps,
        )
        if keep_last < 1 or keep_best < 0:
            raise ConfigError(
                f"checkpoint.keep_last is {keep_last} and keep_best {keep_best}",
                hint="keep at least the last one, and 0 or more of the best",
            )
        self.keep_last, self.keep_best, self.keep_every_steps = keep_last, keep_best, keep_every_steps
        self.monitor = Monitor(monitor, mode) if monitor is not None and keep_best else None
        """The metric that ranks checkpoints; set by early stopping if not given."""
        self.background = save == "async"
        self.on_save_error = on_save_error
        self.verify_checksums = verify == "checksums"
        self.mirror = Mirror(mirror) if mirror is not None and mirror.url is not None else None
        """The copies on remote storage, if enabled."""
        self.directory: Path | None = None
        self.attempt: Attempt | None = None
        """This attempt, as known to the fence against stale processes; set before training if a start was searched."""
        self.faulty: tuple[Path, ...] = ()
        """Damaged checkpoints found in the search for a start."""
        self.newest: Path | None = None
        """The checkpoint that this attempt committed last or resumed from; None before either."""
        self.tell: Callable[[int, str, str], None] = lambda *told: None
        self.log_event: Callable[[int, str, str], object] = lambda *told: None
        """``tell`` records an event (step, kind, text); ``log_event`` logs each checkpoint. Called on rank 0."""
        self.guarded: Guarded | None = None
        """What the update guard needs for rollbacks; if set, only finite weights are committed."""
        self.saves_start = False
        """Whether to also save a new run before its first step, for attempts in this process that start over."""
        self._ending, self._saver = False, Saver()
        self._mirroring: Mirroring | None = None
        self._best = BestList(keep_best)
        self._saved_step = -1
        self.save_seconds = 0.0
        """Seconds for which saving has paused training in this attempt."""
        self.write_seconds = 0.0
        """Seconds spent writing, in the background or not."""

    @property
    def best_model_path(self) -> str:
        """Directory of the best checkpoint, empty if it is not here; used by Lightning for ``ckpt_path='best'``."""
        if self.directory is None or self._best.first is None or not self._best.is_first_in(self.directory):
            return ""
        return str(self.directory / self._best.first.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the folder; for training, become the only attempt that may write to it. Collective."""
        self.directory = self.directory or Path(trainer.default_root_dir) / "checkpoints"
        if stage == "fit" and self.attempt is None:
            with raise_together():
                if trainer.is_global_zero:
                    self.attempt, _ = begin(self.directory, self.mirror)
            self.attempt = trainer.strategy.broadcast(self.attempt)
        if stage == "fit" and self.mirror is not None and self.attempt is not None:
            with raise_together():
                if trainer.local_rank == 0 and not trainer.is_global_zero:  # fail early if this node cannot reach it
                    self.mirror.guard(self.attempt)
            if self._mirroring is not None:
                self._mirroring.release()
            self._mirroring = Mirroring(self.mirror, self.attempt)

    def leave_behind(self, trainer: pl.Trainer) -> list[str]:
        """Rename what this run does not continue from, before its first step; return notes on rank 0. Collective.

        Raises:
            CheckpointError: that fails, or a newer attempt has taken over.
        """
        notes: list[str] = []
        with raise_together():
            if trainer.is_global_zero:
                notes = [
                    cleanup.leave_behind(
                        self._directory(),
                        trainer.global_step,
                        start=Path(trainer.ckpt_path) if trainer.ckpt_path else None,
                        faulty=self.faulty,
                        attempt=self.attempt,
                        mirror=self.mirror,
                    )
                ]
                if self._best.first is not None and not self._best.is_first_in(self._directory()):
                    value, step, _ = self._best.first
                    what = self.monitor.name if self.monitor else "value"
                    notes.append(f"the best {what}, {value:.6g} at step {step}, is of no checkpoint in this folder")
                for note in (notes := [note for note in notes if note]):
                    tell(note)
        return notes

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the minute clock; do not save again what the run was loaded from."""
        self._ending, step = False, trainer.global_step
        self.times.begin(step)
        if self.monitor is not None and self._best.first is not None:
            expect(trainer, self.monitor.name)
        path, uncopied = loaded_from(self._directory(), trainer.ckpt_path, step, self.mirror)
        if path is not None:
            self._saved_step, self.newest = step, path
            if uncopied and self._mirroring is not None:
                self._mirroring.offer(path, step, self._keep(step))
        elif self.saves_start and not trainer.ckpt_path:
            self._save(trainer, value=None)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the last save; save if due, unless a validation follows, which changes the state."""
        started = time.perf_counter()
        self._settle(trainer, self._saver.poll())
        if self._mirroring is not None:
            self._hear(trainer, self._mirroring.poll())
        self.save_seconds += time.perf_counter() - started
        if self._due(trainer) and not validation_follows(trainer):
            self._save(trainer, value=None)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the current metrics, so that a checkpoint is rated only by new ones."""
        begin_validation(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if due, or if the metric is among the best."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = self.monitor.value(trainer) if self.monitor is not None else None
        if self._due(trainer) or (self.monitor and value is not None and self._best.admits(value, self.monitor)):
            self._save(trainer, value)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of the run, unless already done."""
        self.finish(trainer)
        self._saver.release()
        if self._mirroring is not None:
            self._mirroring.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let saves in progress finish; their errors are ignored, since the run already fails with one."""
        deadline = time.monotonic() + _GRACE_SECONDS
        self._saver.wait(_GRACE_SECONDS)
        if self._mirroring is not None:
            self._mirroring.wait(max(0.0, deadline - time.monotonic()), last=True)

    def finish(self, trainer: pl.Trainer) -> None:
        """Save the end of the run, and check that no newer attempt has taken over. Collective.

        Raises:
            CheckpointError: it cannot be written, its weights are not finite while an update guard is active, or a
                newer attempt has taken over.
        """
        self._ending = True
        self.save_if_new(trainer)
        with raise_together():
            if trainer.is_global_zero:
                guard(self._directory(), self.attempt)
                if self._saved_step == trainer.global_step and self.newest is not None:
                    self._pruning(self.newest, trainer.global_step)()  # drop what was kept for a rollback
        if self._saved_step != trainer.global_step:
            raise SpoiltError(
                f"the run ends at step {trainer.global_step} with weights that are not finite, and is not saved",
                hint="start it again, with a lower learning rate or gradient clipping: it goes on from an older step",
            )

    def save_if_new(self, trainer: pl.Trainer) -> None:
        """Commit the current step before returning, unless already done, and copy it. Collective.

        If an update guard is active, weights that are not finite are not committed; this is reported, not raised.

        Raises:
            CheckpointError: it cannot be written, regardless of ``on_save_error``.
        """
        started = time.perf_counter()
        self._settle(trainer, self._saver.wait())
        self.save_seconds += time.perf_counter() - started
        if self._saved_step != trainer.global_step:
            self._save(trainer, value=None, background=False, must=True)
        started = time.perf_counter()
        if self._wait_for_copies(trainer) and trainer.is_global_zero and self.newest is not None:
            self._pruning(self.newest, trainer.global_step)()  # drop what was kept only to be copied
        self.save_seconds += time.perf_counter() - started

    def _wait_for_copies(self, trainer: pl.Trainer) -> bool:
        """Wait for the copies in progress and due; return whether there were any. Collective."""
        copied = False
        while self._mirroring is not None and (outcome := self._mirroring.wait()) is not None:
            self._hear(trainer, outcome)
            copied = True
        return copied

    def restore_best(self, trainer: pl.Trainer) -> bool:
        """Load the best checkpoint's weights; return False if it is not here. Collective."""
        self._settle(trainer, self._saver.wait())
        path = Path(trainer.strategy.broadcast(self.best_model_path))
        if not path.name:
            return False
        strategy_of(trainer).load_weights(path)
        # The weights in memory are no longer this step's: do not save them as such.
        self._saved_step = trainer.global_step
        return True

    def settle(self, trainer: pl.Trainer) -> None:
        """Wait for the save and the copies in progress. Collective.

        Raises:
            CheckpointError: one failed, unless ``on_save_error`` or ``mirror.on_error`` is ``continue``.
        """
        self._settle(trainer, self._saver.wait())
        self._wait_for_copies(trainer)

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, newest first; no save may be in progress. Rank 0 only.

        Raises:
            CheckpointError: one cannot be deleted, or a newer attempt has taken over.
        """
        cleanup.forget_after(self._directory(), step, attempt=self.attempt, mirror=self.mirror)

    def has_best_of(self, path: Path) -> bool:
        """Return whether all checkpoints on the best list of a checkpoint still exist; False if it is damaged."""
        try:
            callbacks = reader.read_meta(path)["trainer"].get("callbacks", {})
        except CheckpointError:
            return False
        names = [name for _, _, name in callbacks.get(self.state_key, {}).get("best", [])]
        return all((path.parent / name / reader.MARKER).exists() for name in names)

    def state_dict(self) -> dict[str, Any]:
        """Return the list of the best checkpoints."""
        return {"monitor": self.monitor and self.monitor.name, "best": self._best.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best list, even if its checkpoints are in another folder: no worse one takes their place."""
        self._saved_step, self.newest = -1, None  # an earlier attempt in this process may have set them
        if self.monitor is not None and state_dict["monitor"] == self.monitor.name:
            self._best.load(state_dict["best"])

    def _due(self, trainer: pl.Trainer) -> bool:
        return self.times.due(trainer) and trainer.global_step != self._saved_step

    def _save(
        self, trainer: pl.Trainer, value: float | None, *, background: bool | None = None, must: bool = False
    ) -> None:
        step, started = trainer.global_step, time.perf_counter()
        # One save at a time: they share buffers, and each prunes by the state at its start.
        self._settle(trainer, self._saver.wait())
        path: Path = trainer.strategy.broadcast(reader.free_path(self._directory(), f"step-{step:08d}"))
        # The list is part of the checkpoint, so it must name this one before it is written.
        self._best.begin()
        metric = None
        if self.monitor is not None and value is not None:
            metric = Metric(self.monitor.name, value, self.monitor.mode)
            self._best.add(Rated(value, step, path.name), self.monitor)
        request = SaveRequest(
            self._saver,
            background=self.background if background is None else background,
            attempt=self.attempt,
            metric=metric,
            done=self._pruning(path, step) if trainer.is_global_zero else None,
            records=self._directory().parent,
            finite=trained_names(trainer.lightning_module) if self.guarded is not None else frozenset(),
        )
        try:
            trainer.save_checkpoint(path, weights_only=False, storage_options=request)
        except BaseException:
            self._best.undo()
            raise
        self._saved_step = step
        self.times.saved()
        if not request.background:
            self._settle(trainer, self._saver.wait(), must=must)
        self.save_seconds += time.perf_counter() - started

    def _settle(self, trainer: pl.Trainer, outcome: Outcome | None, *, must: bool = False) -> None:
        """Process the outcome of a save, which is the same on all ranks."""
        if outcome is None:
            return
        self.write_seconds += outcome.seconds
        if outcome.error is None:
            self.newest = outcome.path
            if trainer.is_global_zero:
                seconds = f"{outcome.seconds:.2f} s after its save began"
                self.log_event(outcome.global_step, "checkpoint", f"{outcome.path.name} is committed, {seconds}")
            if self._mirroring is not None:
                self._mirroring.offer(outcome.path, outcome.global_step, self._keep(outcome.global_step))
            return
        self._best.undo()
        self._saved_step = -1
        if (must or outcome.fatal or self.on_save_error == "stop") and not isinstance(outcome.error, SpoiltError):
            raise outcome.error
        self._tell_error(trainer, f"no checkpoint of step {outcome.global_step}", outcome.error)

    def _hear(self, trainer: pl.Trainer, outcome: Outcome | None) -> None:
        """Process the outcome of a copy, which is the same on all ranks."""
        if outcome is None or outcome.error is None:
            return
        assert self.mirror is not None
        if outcome.fatal or self.mirror.config.on_error == "stop":
            raise outcome.error
        self._tell_error(trainer, f"no copy of the checkpoint of step {outcome.global_step}", outcome.error)

    def _tell_error(self, trainer: pl.Trainer, what: str, error: BaseException) -> None:
        if trainer.is_global_zero:
            text = f"{what}, training goes on: {error.what if isinstance(error, CheckpointError) else error}"
            tell(text)
            self.tell(trainer.global_step, "save", text)

    def _keep(self, step: int) -> Keep:
        """Return what to keep at a step."""
        keep = Keep(self.keep_last, self._best.names, self.keep_every_steps)
        return keep if self.guarded is None or self._ending else self.guarded.widen(keep, step)

    def _pruning(self, new: Path, step: int) -> Callable[[], None]:
        """Return a function that deletes older checkpoints once the new one is committed, by the current best list."""
        keep = self._keep(step)
        if self._mirroring is not None:
            keep = replace(keep, best=[*keep.best, *self._mirroring.needed])
        return partial(cleanup.prune, self._directory(), keep, self.attempt, new=new, step=step)

    def _directory(self) -> Path:
        assert self.directory is not None, "the callback is not set up"
        return self.directory
