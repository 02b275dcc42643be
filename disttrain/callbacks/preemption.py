"""Stop a run on request without losing work: signals, a time limit, a stop file.

SIGTERM, SIGUSR1, SIGINT, ``stop_after`` and the file ``STOP`` in the run folder only set a flag. The ranks vote on
their flags during each step, so all of them decide at the same step boundary from the same number, no matter how far
apart the signals arrived. They save a checkpoint there, and the run ends with :class:`~disttrain.errors.Preempted`:
exit code 75. In a SLURM job that is to continue, rank 0 first requeues it, while all ranks are alive. A validation that
is due or in progress is skipped; the checkpoint records that, and the resumed run starts with it, so its weights match
those of an uninterrupted run. Cost: one vote per step and per validation batch, in the background
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
_REQUEUE: Final = (2, 3, 4)  # causes that requeue the job; a stop file or Ctrl-C means that the user wants it to end
_RANK_BITS: Final = 32
_LOOK_SECONDS: Final = 1.0  # between two checks for the stop file


class Preemption(Callback, Checkpoint):  # Lightning runs Checkpoint callbacks last
    """Ends training at a step boundary when any rank is asked to stop.

    Args:
        run_dir: the run folder.
        record: the run's record.
        stop_after: duration, such as ``3h50m``, after which to stop, by rank 0's clock, counted from the start of the
            launcher or, without one, of the process.
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
        """Record signals while training is set up and runs; restore the previous handlers afterwards.

        Args:
            goes_on: keep a signal recorded during the previous attempt, which this one follows in the same process.
        """
        noted = self._signals.noted if goes_on else None
        with self._signals:
            self._signals.noted = self._signals.noted or noted
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return whether the validation of this step is still to be done."""
        return {"validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore whether a validation was skipped."""
        self._validation_due = bool(state_dict["validation_due"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Create the process group for the votes. Collective."""
        if stage == "fit" and self._votes is None:
            self._votes = Votes()

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop here if that was requested during set-up."""
        self._vote_now(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before the first step if requested; otherwise run a validation that was skipped."""
        self._from_step = trainer.global_step
        self._vote_now(trainer)
        if self._validation_due:
            self._validation_due = False
            run_validation(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start a step's vote at its last micro batch."""
        if ends_step(trainer):
            self._begin(trainer)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the vote at the step boundary; stop if it says so."""
        if not (agreed := self._result()):
            return
        self._validation_due = validation_follows(trainer)
        self._stop(trainer, agreed)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start a vote for each batch: all ranks have the same number of them."""
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
        """Stop in the middle of the validation if the ranks agreed to."""
        if trainer.state.fn == "fit" and (agreed := self._result()):
            self._validation_due = not trainer.sanity_checking
            self._stop(trainer, agreed)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before what follows training, such as a test, if requested; the next start does it."""
        self._vote_now(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Destroy the votes' process group.

        A rollback may end an attempt during a vote. A recorded stop request is kept, and counts in the next attempt's
        first vote.
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
        """Return this rank's vote: the number of a cause with the rank in the low bits; 0 to continue."""
        noted = self._signals.noted
        cause = _SIGNALS[noted] if noted is not None else 0
        if trainer.is_global_zero and not cause:  # one clock and one check of the folder for all ranks
            now = time.monotonic()
            if self._deadline is not None and now >= self._deadline:
                cause = _CAUSES.index("trainer.stop_after")
            elif now - self._looked >= _LOOK_SECONDS:
                self._looked = now
                cause = int((self.run_dir / STOP_FILE).exists())
        return cause << _RANK_BITS | trainer.global_rank if cause else 0

    def _stop(self, trainer: pl.Trainer, agreed: int) -> None:
        """Save a checkpoint and end the run. Collective: all ranks have read the same vote."""
        number, rank = agreed >> _RANK_BITS, agreed & (1 << _RANK_BITS) - 1
        cause = _CAUSES[number]
        if number in _SIGNALS.values() and trainer.world_size > 1:
            cause += f" on rank {rank}"
        # At the step that this attempt started from there is nothing new to save.
        is_new = self._from_step is not None and trainer.global_step > self._from_step
        if is_new and self.checkpoints is not None:
            self.checkpoints.save_if_new(trainer)
        message = f"stopped at step {trainer.global_step} by {cause}; {self._kept(trainer)}"
        if trainer.is_global_zero:
            self.record.stopped(trainer, f"preempted by {cause}")
            (self.run_dir / STOP_FILE).unlink(missing_ok=True)
            if number in _REQUEUE and is_to_be_requeued():
                tell(message)  # SLURM may kill the job soon after the requeue
                message = ask_to_requeue(self.run_dir)
                self.record.tell(trainer.global_step, "requeue", message)
        # A launcher kills all ranks when the first one exits, so all wait here for rank 0 to finish.
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
    """Return seconds since the start of the launcher that restarts this process or, without one, of this process."""
    process = launcher_process() if launch_id() else psutil.Process()
    started: float = process.create_time()
    return max(0.0, time.time() - started)
