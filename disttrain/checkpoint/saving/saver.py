"""Background saving: a thread on each rank writes while training continues.

Only one save is in progress at a time; starting the next one waits for it. The threads have their own gloo process
group, so their collectives never interleave with those of training. When a save ends, the threads agree on the step
boundary at which its outcome is reported: the first that no rank has passed. So all ranks see success or failure at the
same step, without a collective in the training loop. Cost per step: acquiring one lock.

    rank 0, training   | step 41 | step 42 | step 43 -> reported    (polls at every boundary)
    rank 0, thread     ... writes, commits, "I am at 41" ----+
    rank 1, thread     ... writes          "I am at 42" ----+-> report at 43
    rank 1, training      | step 42 | step 43 -> reported
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch.distributed as dist

from disttrain.checkpoint.format.fence import Attempt, FencedError
from disttrain.checkpoint.format.marker import About, Metric
from disttrain.checkpoint.format.reader import Tensors
from disttrain.checkpoint.format.writer import Job, pack_meta
from disttrain.checkpoint.saving.staging import Stage, own_part
from disttrain.distributed.synchronize_errors import is_distributed, new_group, raise_together
from disttrain.errors import DisttrainError
from disttrain.system.device import same_device
from disttrain.system.stack_summary import waiting_for

_SAVE = "a save or a copy"


class Work(Protocol):
    """A job on a checkpoint: writing it, or copying it elsewhere."""

    @property
    def final(self) -> Path:
        """The checkpoint's directory."""

    @property
    def about(self) -> About:
        """What its marker records."""

    def run(self, group: dist.ProcessGroup | None = None) -> None:
        """Do the work. Collective over the group; if one rank fails, all ranks raise."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended; it succeeds on all ranks or on none.

    Attributes:
        path: the checkpoint.
        global_step: its step.
        error: this rank's error, or None if the checkpoint was committed.
        fatal: the run must stop: it is fenced off, or a rank is gone. The same on all ranks.
        seconds: duration of the save.
    """

    path: Path
    global_step: int
    error: BaseException | None
    fatal: bool
    seconds: float


@dataclass
class _Flight:
    """A save in progress."""

    job: Work
    done: Callable[[], None] | None
    state: Literal["writing", "agreeing", "decided"] = "writing"
    due: int = 0
    error: BaseException | None = None
    fatal: bool = False
    seconds: float = 0.0
    changed: threading.Condition = field(default_factory=threading.Condition)
    thread: threading.Thread | None = None


class Saver:
    """Writes one checkpoint after another. All ranks must make the same calls."""

    def __init__(self) -> None:
        self._stage = Stage()
        self._group: dist.ProcessGroup | None = None
        self._flight: _Flight | None = None
        self._boundary = 0
        self._doing: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether there is a save whose outcome was not yet returned; the same on all ranks."""
        return self._flight is not None

    def stage(self, tensors: Tensors) -> Tensors:
        """Copy this rank's part to CPU buffers, which stay valid until the next call."""
        assert self._flight is None, "the buffers are still being written from"
        return self._stage.copy(tensors)

    def release(self) -> None:
        """Free the staging buffers and destroy the process group if no save is in progress; a later save rebuilds both.

        PyTorch keeps a group's three threads and four file descriptors until it is destroyed.
        """
        self._finish_done()
        if self._flight is None:
            self._stage.release()
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._group = None

    def begin(self, job: Work, *, background: bool, done: Callable[[], None] | None = None) -> None:
        """Run a job, in the background or now; get the outcome from :meth:`poll` or :meth:`wait`. Collective.

        Args:
            job: the job; if it writes a checkpoint in the background, its tensors must be staged.
            background: return immediately.
            done: called by the same thread after the commit, once the ranks have agreed. Work such as deleting older
                checkpoints then delays only the next save. It may raise ``FencedError``, which the next save raises
                again, and nothing else.
        """
        assert self._flight is None, "a save is under way"
        self._finish_done()
        flight = _Flight(job, done)
        if self._group is None and dist.is_available() and dist.is_initialized():
            self._group = new_group(backend="gloo")
        self._flight = flight
        if not background:
            self._run(flight)
            return
        begin = same_device()

        def run() -> None:
            begin()
            self._run(flight)

        flight.thread = threading.Thread(target=run, name="disttrain-save", daemon=True)
        flight.thread.start()

    def poll(self) -> Outcome | None:
        """At a step boundary, return the outcome of a finished save: on all ranks at the same boundary."""
        flight = self._flight
        if flight is None:
            self._boundary += 1
            return None
        with flight.changed:
            self._boundary += 1
            with waiting_for(_SAVE, own=True):
                while flight.state == "agreeing":  # brief: all ranks have finished writing
                    flight.changed.wait()
            if flight.state != "decided" or self._boundary < flight.due:
                return None
        return self._take(flight)

    def wait(self, timeout_seconds: float | None = None) -> Outcome | None:
        """Wait for the save; return None if there is none or the timeout expires."""
        flight = self._flight
        if flight is None:
            self._finish_done(timeout_seconds)
            return None
        if flight.thread is not None:
            with waiting_for(_SAVE, own=True):
                flight.thread.join(timeout_seconds)
            if flight.thread.is_alive():
                return None
        return self._take(flight)

    def _finish_done(self, timeout_seconds: float | None = None) -> None:
        """Wait for ``done`` of a save whose outcome was already returned."""
        if self._doing is not None:
            with waiting_for(_SAVE, own=True):
                self._doing.join(timeout_seconds)
            self._doing = self._doing if self._doing.is_alive() else None

    def _take(self, flight: _Flight) -> Outcome:
        self._flight, self._doing = None, flight.thread
        job = flight.job
        return Outcome(job.final, job.about.global_step, flight.error, flight.fatal, flight.seconds)

    def _run(self, flight: _Flight) -> None:
        started = time.perf_counter()
        try:
            flight.job.run(self._group)
        except BaseException as error:
            flight.error = error
        flight.seconds = time.perf_counter() - started
        # An error that is not about a file may have left the ranks out of step, so no more saves are possible.
        flight.fatal = isinstance(flight.error, FencedError) or not isinstance(flight.error, DisttrainError | None)
        with flight.changed:
            at, flight.state = self._boundary, "agreeing"
        try:
            told = self._gather((at, flight.fatal))
            flight.due, flight.fatal = max(at for at, _ in told) + 1, any(fatal for _, fatal in told)
        except BaseException as error:  # a rank is gone
            flight.error, flight.fatal = flight.error or error, True
        with flight.changed:
            flight.state = "decided"
            flight.changed.notify_all()
        if flight.error is None and flight.done is not None:
            with suppress(FencedError):
                flight.done()

    def _gather(self, own: tuple[int, bool]) -> list[Any]:
        if self._group is None:
            return [own]
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, own, group=self._group)
        return told


@dataclass(frozen=True)
class SaveRequest:
    """How to save, for a strategy's ``save_checkpoint(..., storage_options=request)``.

    Attributes:
        saver: runs the save; poll it for the outcome.
        background: let training continue meanwhile.
        attempt: the attempt of this process.
        metric: the monitored metric at this step.
        done: called by the writing thread after the commit; no rank waits for it.
        finite: dotted names of tensors that may only hold finite numbers.
        records: the run folder, whose records are flushed to disk before the marker is written.
    """

    saver: Saver
    background: bool
    attempt: Attempt | None = None
    metric: Metric | None = None
    done: Callable[[], None] | None = None
    finite: frozenset[str] = frozenset()
    records: Path | None = None

    def begin(self, final: Path, *, tensors: Tensors, meta: dict[str, Any], about: About) -> None:
        """Capture the current state and write it. Collective.

        Args:
            final: a directory that does not exist, the same on every rank.
            tensors: what this rank holds.
            meta: everything else, the same on every rank.
            about: what the marker records.

        Raises:
            CheckpointError: ``meta`` holds something that could only be unpickled.
        """
        own, packed = tensors, None
        with raise_together():
            own = own_part(tensors)
            if self.background:
                own = self.saver.stage(own)
            if not is_distributed() or dist.get_rank() == 0:
                packed = pack_meta(meta)
        about = replace(about, metric=self.metric, run=self.attempt.run if self.attempt else "")
        about = replace(about, attempt=self.attempt.number if self.attempt else 0)
        job = Job(final, own, packed, about, self.attempt, self.finite, self.records)
        self.saver.begin(job, background=self.background, done=self.done)
