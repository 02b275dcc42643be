"""The record of a run, ``run.json``: attempts, events, stop reason, best metric and result.

Rank 0 rewrites the small file atomically when something happens, never per step, so a run killed at any time leaves a
valid record. The report is generated from it. Each event is also a line of ``events.jsonl``, as are attempts and
checkpoints; that file is append-only, so it keeps what several attempts logged, in order.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from disttrain.callbacks.bad_sample_report import FOLDER, BadSamples
from disttrain.callbacks.checkpointing.callback import Checkpointing
from disttrain.callbacks.early_stopping import EarlyStopping
from disttrain.checkpoint.format.fence import guard
from disttrain.data.module import sharded_data
from disttrain.data.order.mixture import Mixture
from disttrain.distributed.synchronize_errors import raise_together
from disttrain.errors import DisttrainError
from disttrain.run.folder import COMPLETED, PREEMPTED, Start, launch_id, note_begun, take_back, write_run
from disttrain.run.loggers import MetricsLog
from disttrain.slurm.requeue import job_of
from disttrain.system.files import (
    EVENT_LOG,
    append_lines,
    hold,
    make_folder,
    release,
    remove_leftovers,
    sync_records,
    to_json,
)
from disttrain.system.output import dropped_output
from disttrain.system.reading import RUN_FILE, read_run
from disttrain.system.terminal import tell
from disttrain.version import __version__

_MOST_ATTEMPTS: Final = 50
_MOST_EVENTS: Final = {"start": 50, "stop": 50}  # each attempt adds at least one of each
_MOST_OTHERS: Final = 500


class RunRecord(Callback):
    """Keeps ``run.json`` of a run folder.

    Args:
        run_dir: the run folder.
        bad_samples: the callback that counts skipped samples.
        strategy: name of the strategy, for the record.
        precision: the precision, for the record.
    """

    def __init__(self, run_dir: Path, bad_samples: BadSamples, *, strategy: str, precision: str) -> None:
        self.run_dir, self.bad_samples = run_dir, bad_samples
        self._layout = {"strategy": strategy, "precision": precision}
        self.start = Start(None)
        """The decision on where the run starts; its notes become events."""
        self.record: dict[str, Any] = {}
        self.checkpoints: Checkpointing | None = None
        """The callback that saves; set by the Trainer, as is ``stopping``."""
        self.stopping: EarlyStopping | None = None
        self.awaits_result = False
        """Whether the run is complete only after :meth:`add_result`."""
        self.goes_on = False
        """Whether the next attempt continues the last one in this process; the record counts them as one."""
        self._began = 0.0
        self._complaints: set[tuple[str, int | None]] = set()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Unpin the run folder before training; receive checkpointing's events."""
        if stage == "fit":
            release(self.run_dir)
        if self.checkpoints is not None:
            self.checkpoints.tell, self.checkpoints.log_event = self.tell, self.log_event

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open or continue the record, and begin an attempt, unless this continues one."""
        hold(self.run_dir)
        notes: list[str] = []
        if not self.goes_on and self.checkpoints is not None:
            # First, before the record names this attempt: a restart resumes from what the folder holds then. And before
            # rows are dropped: this raises if a newer attempt, which may have logged them, has taken over.
            notes = self.checkpoints.leave_behind(trainer)
        with raise_together():
            for logger in trainer.loggers:
                if isinstance(logger, MetricsLog):
                    logger.truncate_after(trainer.global_step)
            if not self.goes_on and trainer.is_global_zero:
                self._begin_attempt(trainer, notes)

    def _begin_attempt(self, trainer: pl.Trainer, notes: Sequence[str] = ()) -> None:
        now, self._began = time.time(), time.monotonic()
        make_folder(self.run_dir)
        remove_leftovers(self.run_dir / RUN_FILE)
        self.record = {"format": 1, "name": self.run_dir.name, "command": "fit", "created": now}
        self.record |= {"attempts": [], "events": [], **read_run(self.run_dir)}  # a file that may lack any of these
        checkpoints = self.checkpoints
        if checkpoints is not None and checkpoints.attempt is not None:
            self.record["id"] = checkpoints.attempt.run
        attempt = {
            "started": now,
            "ended": None,
            "seconds": None,
            "from_step": trainer.global_step,
            "to_step": None,
            "world_size": trainer.world_size,
            **self._layout,
        }
        if launch := launch_id():
            attempt["launch"] = launch
        attempt |= job_of()
        self.record.setdefault("attempts", []).append(attempt)
        note_begun(self.run_dir)
        ranks = f"{trainer.world_size} rank{'s' * (trainer.world_size > 1)}"
        layout = f"{ranks}, {self._layout['strategy']}, {self._layout['precision']}"
        number = len(self.record["attempts"]) + (self.record.get("attempts_left_out") or 0)
        self.log_event(trainer.global_step, "attempt", f"attempt {number} begins: {layout}")
        self.record |= {"status": "running", "ended": None, "environment": _environment(trainer.strategy.root_device)}
        for note in (*self.start.notes, *notes):
            self.event(trainer.global_step, "start", note)
        self._write()

    def event(self, step: int, kind: str, text: str, **more: Any) -> None:
        """Record an event; it is written with the next change of the record."""
        told = self.log_event(step, kind, text, **more)
        self.record.setdefault("events", []).append(told)

    def log_event(self, step: int, kind: str, text: str, **more: Any) -> dict[str, Any]:
        """Append a line to the event log only, and return its content. Rank 0 only."""
        told = {"step": step, "time": time.time(), "kind": kind, "text": text, **more}
        try:
            append_lines(self.run_dir / EVENT_LOG, to_json(told) + "\n")
        except OSError as error:
            self._complain(EVENT_LOG, error)
        return told

    def note_micro_batch_size(self, size: int) -> None:
        """Record the micro batch size that an attempt uses, if found automatically. Rank 0 only."""
        self.record["attempts"][-1]["micro_batch_size"] = size
        self._write()

    def set_ranks(self, ranks: list[dict[str, Any]]) -> None:
        """Store the ranks' step times; they are written with the next change of the record. Rank 0 only."""
        self.record["ranks"] = ranks

    def tell(self, step: int, kind: str, text: str, **more: Any) -> None:
        """Record an event and write it now. Rank 0 only."""
        self.event(step, kind, text, **more)
        if "attempts" in self.record:
            self._write()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the stop reason and the best metric, once the last checkpoint is committed."""
        if self.checkpoints is not None:
            self.checkpoints.finish(trainer)
        with raise_together():
            if trainer.is_global_zero:
                self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        now = time.time()
        reason = stop_reason(trainer, self.stopping)
        self.record["attempts"][-1] |= {"ended": now, "to_step": trainer.global_step, "stop_reason": reason}
        self._note_seconds()
        status = "trained" if self.awaits_result else COMPLETED
        self.record |= {"status": status, "ended": now, "stop_reason": reason, **_samples_seen(trainer)}
        stopping = self.stopping
        if stopping is not None and stopping.monitor is not None and stopping.has_best:
            monitor = stopping.monitor
            self.record["best"] = {
                "monitor": monitor.name,
                "mode": monitor.mode,
                "value": stopping.best,
                "step": stopping.best_step,
            }
        data = sharded_data(trainer)
        if data is not None and isinstance(data.order, Mixture):
            counts, epochs = data.order.counts_of(trainer.global_step), data.order.epochs_of(trainer.global_step)
            self.record["sources"] = {name: {"samples": counts[name], "epochs": epochs[name]} for name in counts}
        bad = self.bad_samples
        if bad.total:
            self.record["bad_samples"] = bad.total
            text = f"bad samples were met and skipped {bad.total} times; {self.run_dir / FOLDER} lists them"
            self.event(trainer.global_step, "data", text)
        if bad.filtered:
            self.record["filtered_samples"] = bad.filtered
        self.event(trainer.global_step, "stop", reason)
        self._write(must=True)

    def stopped(self, trainer: pl.Trainer, reason: str) -> None:
        """Record that training was preempted and will continue in another attempt. Rank 0 only."""
        if not self.record:  # it was stopped before its first step
            self._begin_attempt(trainer)
        ending = {"ended": time.time(), "stop_reason": reason, "status": PREEMPTED}
        self.record["attempts"][-1] |= {"to_step": trainer.global_step, **ending}
        self._note_seconds()
        self.record |= {**ending, **_samples_seen(trainer)}
        self.event(trainer.global_step, "stop", reason)
        self._write()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Move an older run back into its folder if the start failed before the first step."""
        if trainer.is_global_zero and not self.record and self.start.aside is not None:
            take_back(self.run_dir, self.start.aside)
            tell(f"the older run was moved back to {self.run_dir}")

    def add(self, entries: dict[str, Any]) -> None:
        """Add or replace entries of the record. Rank 0 only."""
        self.record |= entries
        self._write()

    def add_result(self, result: dict[str, float]) -> None:
        """Add the test metrics. Rank 0 only."""
        self.record["result"] = {**self.record.get("result", {}), **result}
        if self.awaits_result:
            self.record["status"] = COMPLETED
        self._write(must=True)

    def _note_seconds(self) -> None:
        """Record how long the attempt took, by a monotonic clock."""
        self.record["attempts"][-1]["seconds"] = round(time.monotonic() - self._began, 3)

    def note_output(self) -> None:
        """Record output that could not be printed, if there is more of it. Rank 0 only."""
        if dropped_output() != self.record.get("dropped_output", {}):
            self._write()

    def _write(self, *, must: bool = False) -> None:
        if dropped := dropped_output():
            self.record["dropped_output"] = dropped
        if self.checkpoints is not None and self.checkpoints.directory is not None:
            # A process superseded by a newer attempt on another node must not write the record either: guard() raises.
            with suppress(OSError):  # if the fence cannot be read, keep writing
                guard(self.checkpoints.directory, self.checkpoints.attempt)
        try:
            if must:  # it marks the run complete, so everything it refers to must be on disk
                sync_records(self.run_dir, 0)
            write_run(self.run_dir, bounded(self.record))
        except OSError as error:
            if must:
                raise DisttrainError(
                    f"{self.run_dir / RUN_FILE} cannot be written: {error.strerror}",
                    hint="make room, or the folder writable; the same command ends the run from its last checkpoint",
                ) from error
            self._complain(RUN_FILE, error)

    def _complain(self, name: str, error: OSError) -> None:
        """Report a file that cannot be written, once per file and cause; a full disk must not end training."""
        if (name, error.errno) not in self._complaints:
            self._complaints.add((name, error.errno))
            tell(f"{self.run_dir / name} cannot be written, training goes on: {error.strerror}")


def bounded(record: dict[str, Any]) -> dict[str, Any]:
    """Drop a record's oldest attempts and events of each kind, since a run may be restarted any number of times.

    The first attempt is kept, as are the number of dropped entries and the duration of dropped attempts;
    ``events.jsonl`` has all of them.
    """
    attempts = record.get("attempts", [])
    if len(attempts) > _MOST_ATTEMPTS:
        gone = attempts[1 : len(attempts) - _MOST_ATTEMPTS + 1]
        del attempts[1 : len(gone) + 1]
        record["attempts_left_out"] = (record.get("attempts_left_out") or 0) + len(gone)
        seconds = sum(attempt.get("seconds") or 0.0 for attempt in gone)
        record["seconds_left_out"] = round((record.get("seconds_left_out") or 0.0) + seconds, 3)
    kinds: dict[str, int] = {}
    kept = []
    for event in reversed(record.get("events", [])):
        kind = event.get("kind", "")
        kinds[kind] = kinds.get(kind, 0) + 1
        if kinds[kind] <= _MOST_EVENTS.get(kind, _MOST_OTHERS):
            kept.append(event)
    if left := len(record.get("events", [])) - len(kept):
        record["events"] = kept[::-1]
        record["events_left_out"] = (record.get("events_left_out") or 0) + left
    return record


def _samples_seen(trainer: pl.Trainer) -> dict[str, int]:
    """Return how many samples the steps so far used; repeated samples and skipped updates count each time."""
    data = sharded_data(trainer)
    return {} if data is None else {"samples_seen": trainer.global_step * data.global_batch_size}


def stop_reason(trainer: pl.Trainer, stopping: EarlyStopping | None) -> str:
    """Return why a trainer's fit ended."""
    if stopping is not None and stopping.stop_reason:
        return stopping.stop_reason
    if 0 < trainer.max_steps <= trainer.global_step:
        return f"max_steps {trainer.max_steps} reached"
    if trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch:
        return f"max_epochs {trainer.max_epochs} reached"
    return "the trainer was told to stop"


def _environment(device: torch.device) -> dict[str, str]:
    found = {
        "disttrain": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    commit = _git_commit()
    return {**found, "git": commit} if commit else found


def _git_commit() -> str:
    """Return the commit of the working directory, with ``+`` if it has changes; empty outside a repository."""
    git = shutil.which("git")
    if git is None:
        return ""

    def run(*arguments: str) -> str:
        done = subprocess.run([git, *arguments], capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = run("rev-parse", "--short=12", "HEAD")
    return f"{commit}+" if commit and run("status", "--porcelain", "--untracked-files=no") else commit
