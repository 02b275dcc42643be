"""Copy committed checkpoints to remote storage in the background, and fetch them back, on all ranks.

A thread on each rank uploads its share of a checkpoint's files. Once all are uploaded, rank 0 writes the marker, then
prunes older copies by the same rules as locally. This is another :class:`~disttrain.checkpoint.saving.saver.Saver`, so
training never waits and all ranks receive the outcome at the same step. One copy is made at a time. Checkpoints that
are committed meanwhile are queued: the newest is copied next, then those that are to be kept; the rest are dropped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch.distributed as dist

from disttrain.checkpoint.format import verification
from disttrain.checkpoint.format.fence import Attempt, guard
from disttrain.checkpoint.format.marker import MARKER, TEMPORARY, About, Committed, check, committed, free_path
from disttrain.checkpoint.format.retention import Keep
from disttrain.checkpoint.format.writer import file_errors, from_lead
from disttrain.checkpoint.remote.copies import Mirror, Stored, local_name
from disttrain.checkpoint.saving.saver import Outcome, Saver
from disttrain.distributed.synchronize_errors import gather, is_distributed, raise_together
from disttrain.errors import CheckpointError
from disttrain.system.files import open_directory, sync_directory, write_synced


@dataclass(frozen=True)
class Upload:
    """A checkpoint to copy.

    Attributes:
        final: its directory, which stays in place while it is copied.
        about: what its marker records.
        mirror: the destination.
        attempt: the attempt of this process.
        keep: which copies to keep afterwards.
    """

    final: Path
    about: About
    mirror: Mirror
    attempt: Attempt
    keep: Keep

    def run(self, group: dist.ProcessGroup | None = None) -> None:
        """Upload and commit. Collective over the group (default: all ranks).

        Raises:
            FencedError: a newer attempt has begun. Other ranks raise a ``RankError``.
            CheckpointError: a file cannot be read or an object cannot be written. Older copies are untouched. Ranks
                that did not fail raise a ``RankError``.
        """
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        name = f"{self.final.name}.{self.attempt.label}"
        with raise_together(group), _reading(self.final):
            if rank == 0:
                self.mirror.guard(self.attempt)
            for file in verification.share(check(self.final).files, rank, ranks):
                self.mirror.upload(name, self.final / file)
        with raise_together(group), _reading(self.final):
            if rank == 0:
                marker = (self.final / MARKER).read_bytes()
                self.mirror.guard(self.attempt)
                self.mirror.commit(name, marker)
                self.mirror.prune(self.keep, attempt=self.attempt, after=name)


class Mirroring:
    """Copies one checkpoint after another. All ranks must make the same calls."""

    def __init__(self, mirror: Mirror, attempt: Attempt) -> None:
        self._mirror, self._attempt = mirror, attempt
        self._saver = Saver()
        self._waiting: list[Committed] = []
        self._under_way: Committed | None = None
        self._keep = Keep()

    @property
    def needed(self) -> list[str]:
        """Names of local directories still to be copied."""
        return [entry.path.name for entry in (*self._waiting, *filter(None, [self._under_way]))]

    def offer(self, path: Path, global_step: int, keep: Keep) -> None:
        """Copy a committed checkpoint, now or once the current copy is done. Collective.

        Args:
            path: its directory.
            global_step: its step.
            keep: which copies and queued checkpoints to keep.
        """
        self._waiting.append(Committed(path, global_step))
        self._keep = Keep(1, keep.best, keep.every_steps)
        gone = self._keep.superfluous(self._waiting)
        self._waiting = [entry for entry in self._waiting if entry not in gone]
        self._keep = keep
        if not self._saver.busy:
            self._next()

    def release(self) -> None:
        """Destroy the process group of the copies, once none is in progress."""
        self._saver.release()

    def poll(self) -> Outcome | None:
        """At a step boundary, return the outcome of a finished copy (on all ranks at once), and start the next one."""
        return self._take(self._saver.poll())

    def wait(self, timeout_seconds: float | None = None, *, last: bool = False) -> Outcome | None:
        """Wait for the current copy; return None if there is none or the timeout expires.

        Args:
            timeout_seconds: the timeout.
            last: start no further copy; other ranks may not be making this call.
        """
        return self._take(self._saver.wait(timeout_seconds), last=last)

    def _take(self, outcome: Outcome | None, *, last: bool = False) -> Outcome | None:
        if outcome is None:
            return None
        entry, self._under_way = self._under_way, None
        if outcome.error is None and not last:
            self._next()
        elif entry is not None:  # retry after the next one, if it is still worth keeping by then
            self._waiting = sorted([*self._waiting, entry], key=lambda waiting: waiting.global_step)
        return outcome

    def _next(self) -> None:
        if self._waiting:
            self._under_way = entry = self._waiting.pop()  # the newest first, since a run resumes from it
            about = About(entry.global_step)
            self._saver.begin(Upload(entry.path, about, self._mirror, self._attempt, self._keep), background=True)


def fetch(mirror: Mirror, stored: Stored, directory: Path, attempt: Attempt) -> str:
    """Fetch a copy into the local checkpoint folder; return what is wrong with it if it is damaged. Collective.

    Raises:
        CheckpointError: it cannot be read or written. Ranks that did not fail raise a ``RankError``.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    final = Path(from_lead(str(free_path(directory, local_name(stored.name)))))
    temporary = final.with_name(f"{final.name}.{attempt.label}{TEMPORARY}")
    with raise_together(), file_errors(temporary):
        if rank == 0:
            free = shutil.disk_usage(directory).free
            if free < stored.entry.num_bytes:
                raise CheckpointError(
                    f"{mirror.url}/{stored.name} takes {stored.entry.num_bytes:,} bytes, but only {free:,} are free for"
                    f" {directory}",
                    hint="free space, or move trainer.run_dir",
                )
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
    fault = ""
    try:
        with raise_together(), file_errors(temporary):
            for file in verification.share(stored.entry.files, rank, ranks):
                fault = fault or mirror.fault(stored, file, temporary)
        fault = next(filter(None, gather(fault)), "")
        with raise_together(), file_errors(temporary):
            if rank == 0 and not fault:
                _publish(temporary, final, stored, attempt)
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    if not fault:
        verification.trust(final)
    return fault


def _publish(temporary: Path, final: Path, stored: Stored, attempt: Attempt) -> None:
    with open_directory(temporary) as opened:
        os.fsync(opened)
        guard(final.parent, attempt)
        os.rename(temporary, final)
        sync_directory(final.parent)
        write_synced(Path(MARKER), stored.marker.decode(), within=opened)
        os.fsync(opened)


def loaded_from(
    directory: Path, start: str | Path | None, step: int, mirror: Mirror | None
) -> tuple[Path | None, bool]:
    """Return the checkpoint of this step in this folder that the run was loaded from, and whether it needs copying.

    Collective.
    """
    found: tuple[Path | None, bool] = (None, False)
    with raise_together():
        path = directory / Path(start).name if start else directory
        # The step differs if a rollback has gone further back; not committed if this start has abandoned it.
        here = start and path.resolve() == Path(start).resolve() and (not is_distributed() or dist.get_rank() == 0)
        if here and any(entry.path == path and entry.global_step == step for entry in committed(directory)[0]):
            found = path, mirror is not None and all(copy.entry.global_step != step for copy in mirror.committed()[0])
    return cast(tuple[Path | None, bool], from_lead(found))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Reraise a local file error with the name of the checkpoint."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot copy checkpoint {path}: {error.strerror or error}", hint="check the run folder's disk"
        ) from error
