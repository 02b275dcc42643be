"""Stopping a run from outside so that it loses nothing: signals, a time limit, a stop file.

SIGTERM, SIGUSR1, SIGINT, ``stop_after`` and the file ``STOP`` in the run's folder only leave a note. The ranks
vote on their notes during each step, so all of them decide at the same step boundary from the same number,
however far apart the signals came. They save a checkpoint there, and the run ends with a
:class:`~disttrain.errors.Preempted`: exit code 75; in a SLURM job that is to go on, rank 0 has it requeued first,
while all ranks are alive. A validation that was due or under way is left; the
checkpoint says so, and the resumed run begins with it, which makes its weights those of a run that was never
stopped. Cost: one vote a step and a validation batch, in the background
(:mod:`disttrain.distributed.async_max_reduce`).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
import psutil
from lightning.pytorch.callbacks import Checkpoint

from disttrain.callbacks.checkpointing.callback import Checkpointing
from disttrain.callbacks.records.run_record import RunRecord
from disttrain.distributed.async_max_reduce import Votes
from disttrain.distributed.world import detect_world
from disttrain.errors import Preempted
from disttrain.lightning.callback import Callback
from disttrain.lightning.internals import ends_step, run_validation, validation_follows
from disttrain.run.folder import launch_id, launcher_process
from disttrain.slurm.requeue import ask_to_requeue, is_to_be_requeued
from disttrain.system.durations import parse_duration
from disttrain.system.signals import NotedSignals
from disttrain.system.terminal import tell

STOP_FILE: Final = "STOP"
_CAUSES: Final = ("", "the file STOP", "trainer.stop_after", "SIGUSR1", "SIGTERM", "SIGINT")
_SIGNALS: Final = {signal.SIGUSR1: 3, signal.SIGTERM: 4, signal.SIGINT: 5}
_REQUEUE: Final = (2, 3, 4)  # causes after which a job goes on; a stop file and Ctrl-C are a person's
_RANK_BITS: Final = 32
_LOOK_SECONDS: Final = 1.0  # between two looks for the stop file


class Preemption(Callback, Checkpoint):  # Lightning calls its checkpoint callbacks last
    """Ends training at a step boundary when any rank is asked to.

    Args:
        run_dir: the run's folder.
        record: the run's record.
        stop_after: duration, such as ``3h50m``, after which to stop, by rank 0's clock, counted from the start
            of the launcher or, without one, of the process.
    """

    def __init__(self, run_dir: Path, record: RunRecord, *, stop_after: str | None = None) -> None:
        self.run_dir, self.record = run_dir, record
        self.checkpoints: Checkpointing | None = None
        """The callback that saves; set by the Trainer."""
        seconds = parse_duration(stop_after, "trainer.stop_after") if stop_after is not None else 0.0
        self._deadline = time.monotonic() - _age_seconds() + seconds if seconds else None
        self._signals = NotedSignals(speaks=detect_world().rank == 0)
        self._votes: Votes | None = None
        self._looked = 0.0
        self._from_step: int | None = None
        self._validation_due = False

    @contextmanager
    def noting(self, *, goes_on: bool) -> Iterator[None]:
        """Note signals while training is set up and runs; before and after, they do what they did.

        Args:
            goes_on: whether what the attempt before has noted still counts, since this one follows it by itself.
        """
        noted = self._signals.noted if goes_on else None
        with self._signals:
            self._signals.noted = self._signals.noted or noted
            yield

    def state_dict(self) -> dict[str, Any]:
        """Whether the validation of this step is still to come."""
        return {"validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Know of a validation that was left."""
        self._validation_due = bool(state_dict["validation_due"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the votes their group. A collective."""
        if stage == "fit" and self._votes is None:
            self._votes = Votes()

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop here if the set-up was asked to."""
        self._vote_now(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before the first step if that was asked for; else make up for a validation that was left."""
        self._from_step = trainer.global_step
        self._vote_now(trainer)
        if self._validation_due:
            self._validation_due = False
            run_validation(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a step's vote at its last micro batch."""
        if ends_step(trainer):
            self._begin(trainer)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the vote at the step boundary."""
        if not (agreed := self._result()):
            return
        self._validation_due = validation_follows(trainer)
        self._stop(trainer, agreed)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begin a vote for each batch: every rank has as many."""
        if trainer.state.fn == "fit":
            self._begin(trainer)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Leave the validation where that was agreed."""
        if trainer.state.fn == "fit" and (agreed := self._result()):
            self._validation_due = not trainer.sanity_checking
            self._stop(trainer, agreed)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training is over, and what follows it is left to the next start."""
        self._vote_now(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the votes' group.

        A rollback ends an attempt in the midst of a vote. What asks the run to stop is noted still, and counts in the
        next attempt's first vote.
        """
        if stage == "fit" and self._votes is not None:
            self._votes.result()
            self._votes.close()
            self._votes = None

    def _begin(self, trainer: pl.Trainer) -> None:
        assert self._votes is not None, "the callback is not set up"
        self._votes.begin(self._own(trainer))

    def _result(self) -> int:
        assert self._votes is not None, "the callback is not set up"
        return self._votes.result()

    def _vote_now(self, trainer: pl.Trainer) -> None:
        self._begin(trainer)
        if agreed := self._result():
            self._stop(trainer, agreed)

    def _own(self, trainer: pl.Trainer) -> int:
        """What this rank brings: the number of a cause, with the rank's below it; 0 to go on."""
        noted = self._signals.noted
        cause = _SIGNALS[noted] if noted is not None else 0
        if trainer.is_global_zero and not cause:  # one clock and one look at the folder decide for all
            now = time.monotonic()
            if self._deadline is not None and now >= self._deadline:
                cause = _CAUSES.index("trainer.stop_after")
            elif now - self._looked >= _LOOK_SECONDS:
                self._looked = now
                cause = int((self.run_dir / STOP_FILE).exists())
        return cause << _RANK_BITS | trainer.global_rank if cause else 0

    def _stop(self, trainer: pl.Trainer, agreed: int) -> None:
        """Save and end. A collective: all ranks have read the same vote."""
        number, rank = agreed >> _RANK_BITS, agreed & (1 << _RANK_BITS) - 1
        cause = _CAUSES[number]
        if number in _SIGNALS.values() and trainer.world_size > 1:
            cause += f" on rank {rank}"
        # At the step that this attempt started from, nothing is new: what it started from serves again.
        is_new = self._from_step is not None and trainer.global_step > self._from_step
        if is_new and self.checkpoints is not None:
            self.checkpoints.save_if_new(trainer)
        message = f"stopped at step {trainer.global_step} by {cause}; {self._kept(trainer)}"
        if trainer.is_global_zero:
            self.record.stopped(trainer, f"preempted by {cause}")
            (self.run_dir / STOP_FILE).unlink(missing_ok=True)
            if number in _REQUEUE and is_to_be_requeued():
                tell(message)  # SLURM may leave no time for it later
                message = ask_to_requeue(self.run_dir)
                self.record.tell(trainer.global_step, "requeue", message)
        # A launcher ends all ranks with the first that ends: none does before rank 0 is done.
        assert self._votes is not None, "the callback is not set up"
        self._votes.now(0)
        raise Preempted(message)

    def _kept(self, trainer: pl.Trainer) -> str:
        saved = self.checkpoints.newest if self.checkpoints is not None else None
        if saved is not None:
            again = self.record.start.resume == "auto"
            return f"{'the same command' if again else '--resume auto'} goes on from checkpoint {saved}"
        if trainer.ckpt_path:
            return f"the same command goes on from checkpoint {trainer.ckpt_path}"
        return "nothing was to be saved yet; the same command starts again"


def _age_seconds() -> float:
    """Seconds since the launcher was started that restarts this process, or else since this process was."""
    process = launcher_process() if launch_id() else psutil.Process()
    started: float = process.create_time()
    return max(0.0, time.time() - started)
