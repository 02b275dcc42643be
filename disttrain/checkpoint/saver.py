"""Saving in the background: a thread of each rank writes while training goes on.

One save is under way at a time; whoever asks for the next one waits for it first. The threads have a process group
of their own (gloo), so that their collectives never meet those of training. When a save has ended, the threads
agree on the step boundary at which its outcome is told: the first that no rank has passed. So success and failure
come to all ranks at the same step, without any collective in training. Cost in a step: a look at a lock.

    rank 0, training   | step 41 | step 42 | step 43 -> told    (asks at every boundary)
    rank 0, thread     ... writes, commits, "I am at 41" ----+
    rank 1, thread     ... writes          "I am at 42" ----+-> told at 43
    rank 1, training      | step 42 | step 43 -> told
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

from disttrain.checkpoint.fence import Attempt, FencedError
from disttrain.checkpoint.marker import About, Metric
from disttrain.checkpoint.staging import Stage, own_part
from disttrain.checkpoint.store import Tensors
from disttrain.checkpoint.write import Job, pack_meta
from disttrain.data.device import same_device
from disttrain.errors import DisttrainError
from disttrain.parallel.agree import is_distributed, new_group, raise_together


class Work(Protocol):
    """What is done for a checkpoint: it is written, or copied elsewhere."""

    @property
    def final(self) -> Path:
        """The checkpoint's directory."""

    @property
    def about(self) -> About:
        """What its marker says."""

    def run(self, group: dist.ProcessGroup | None = None) -> None:
        """Do it. A collective of the group; a user's error comes to all ranks."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended; on all ranks well, or on all ranks not.

    Attributes:
        path: the checkpoint.
        global_step: its step.
        error: this rank's error, None where it was committed.
        fatal: the run may not go on: it is fenced off, or a rank is gone. The same on all ranks.
        seconds: from its begin to its end.
    """

    path: Path
    global_step: int
    error: BaseException | None
    fatal: bool
    seconds: float


@dataclass
class _Flight:
    """A save that is under way."""

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
    """Writes one checkpoint after another. All ranks call every method alike."""

    def __init__(self) -> None:
        self._stage = Stage()
        self._group: dist.ProcessGroup | None = None
        self._flight: _Flight | None = None
        self._boundary = 0
        self._doing: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way whose outcome was not told yet; the same on all ranks."""
        return self._flight is not None

    def stage(self, tensors: Tensors) -> Tensors:
        """Copy this rank's part to CPU memory, where it stays until the next call."""
        assert self._flight is None, "the buffers are still being written from"
        return self._stage.copy(tensors)

    def release(self) -> None:
        """Give the memory of the copies back, and end the group, once nothing is under way; a later save makes it anew.

        PyTorch keeps a group, with three threads and four descriptors, until it is destroyed.
        """
        self._finish_done()
        if self._flight is None:
            self._stage.release()
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._group = None

    def begin(self, job: Work, *, background: bool, done: Callable[[], None] | None = None) -> None:
        """Write a checkpoint, in the background or now; :meth:`wait` or :meth:`poll` tell how it ended. A collective.

        Args:
            job: what to do; in the background, a checkpoint's tensors are staged ones.
            background: return at once.
            done: called after the commit, by the same thread, once the ranks have agreed: what it does, such as
                deleting older checkpoints, holds up none of them but for the next save. It must not fail, but for
                being fenced off, which the next save finds out.
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
        """At a step boundary: how the save ended, once all ranks know; at the same boundary on all of them."""
        flight = self._flight
        if flight is None:
            self._boundary += 1
            return None
        with flight.changed:
            self._boundary += 1
            while flight.state == "agreeing":  # a moment: all ranks have written
                flight.changed.wait()
            if flight.state != "decided" or self._boundary < flight.due:
                return None
        return self._take(flight)

    def wait(self, timeout_seconds: float | None = None) -> Outcome | None:
        """Wait for the save; None where there is none, or where it takes longer than the limit."""
        flight = self._flight
        if flight is None:
            self._finish_done(timeout_seconds)
            return None
        if flight.thread is not None:
            flight.thread.join(timeout_seconds)
            if flight.thread.is_alive():
                return None
        return self._take(flight)

    def _finish_done(self, timeout_seconds: float | None = None) -> None:
        """Wait for what is done after the commit of a save whose outcome was told."""
        if self._doing is not None:
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
        # What is no error of a file's may have left the ranks apart: nothing more is said then.
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
        saver: writes it; its outcome is to be asked for.
        background: let training go on meanwhile.
        attempt: who may publish it.
        metric: the monitored metric of this step.
        done: called by the writing thread after the commit, on which no rank waits.
        finite: dotted names of tensors that must hold finite numbers alone.
        records: the run's folder, whose records are on disk before the marker is.
    """

    saver: Saver
    background: bool
    attempt: Attempt | None = None
    metric: Metric | None = None
    done: Callable[[], None] | None = None
    finite: frozenset[str] = frozenset()
    records: Path | None = None

    def begin(self, final: Path, *, tensors: Tensors, meta: dict[str, Any], about: About) -> None:
        """Take the state as it is now, and write it. A collective.

        Args:
            final: a directory that does not exist, the same on every rank.
            tensors: what this rank holds.
            meta: everything else, the same on every rank.
            about: what the marker says.

        Raises:
            CheckpointError: ``meta`` holds what could only be unpickled.
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
