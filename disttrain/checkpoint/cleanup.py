"""Remove checkpoints from a folder: pruned ones, those after a rollback, and those a new start does not resume from.

Checkpoints are ordered by step, and a run resumes from the newest. So no checkpoint of a later step than the run's
current one may count: the run would resume from it, and it would compete with newly saved ones. A rollback deletes
such checkpoints. A start that skipped them as damaged, or was asked to resume from an earlier one, renames them to
``step-00000100.abandoned``; they are deleted once the run has committed a checkpoint of the same or a later step.
Copies on remote storage are deleted in both cases. Rank 0 does all of this, and checks before each change that no
newer attempt has taken over.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from disttrain.checkpoint.format.fence import Attempt, FencedError, guard
from disttrain.checkpoint.format.marker import ABANDONED, LATEST, Committed, abandoned, committed, free_path, remove
from disttrain.checkpoint.format.retention import Keep
from disttrain.checkpoint.remote.copies import Mirror
from disttrain.errors import CheckpointError
from disttrain.system.files import sync_directory, write_synced
from disttrain.system.terminal import tell


def prune(directory: Path, keep: Keep, attempt: Attempt | None, *, new: Path, step: int) -> None:
    """Delete superfluous checkpoints after a commit; log those that cannot be deleted, and retry at the next save.

    Args:
        directory: the folder.
        keep: the rules.
        attempt: the attempt of this process.
        new: the checkpoint just committed, which stays.
        step: its step.

    Raises:
        FencedError: a newer attempt has begun.
    """
    try:
        superfluous = [entry for entry in keep.superfluous(committed(directory)[0]) if entry.path != new]
        passed = [entry for entry in abandoned(directory) if entry.global_step <= step]
        for entry in (*superfluous, *passed):
            guard(directory, attempt)  # after listing, so none of these belong to a newer attempt
            remove(entry.path)
    except FencedError:
        raise
    except (OSError, CheckpointError) as error:  # the new one is safe; the next save tries again
        told = error.what if isinstance(error, CheckpointError) else error
        tell(f"an old checkpoint could not be removed: {told}")


def forget_after(directory: Path, step: int, *, attempt: Attempt | None, mirror: Mirror | None) -> None:
    """Delete checkpoints of later steps and their copies, newest first; no save may be in progress.

    Raises:
        CheckpointError: a checkpoint cannot be deleted, or a newer attempt has taken over.
    """
    if mirror is not None and attempt is not None:  # copies first: a resume takes the newest, local or remote
        mirror.forget_after(step, attempt)
    with _changing(directory):
        later = [entry for entry in committed(directory)[0] if entry.global_step > step]
        guard(directory, attempt)
        for entry in reversed(later):
            remove(entry.path)
        if later:
            _point(directory, attempt)


def leave_behind(
    directory: Path,
    step: int,
    *,
    start: Path | None = None,
    faulty: Collection[Path] = (),
    attempt: Attempt | None = None,
    mirror: Mirror | None = None,
) -> str:
    """Abandon checkpoints that a starting run does not resume from: faulty ones, and those newer than its start.

    Args:
        directory: the folder.
        step: the run's current step.
        start: the checkpoint that it was loaded from, in this folder or another one.
        faulty: checkpoints found damaged.
        attempt: the attempt of this process.
        mirror: remote copies; those of later steps are deleted.

    Returns:
        What was abandoned, in one line; empty if nothing was.

    Raises:
        CheckpointError: a checkpoint cannot be renamed or deleted, or a newer attempt has taken over.
    """
    copies = mirror.forget_after(step, attempt) if mirror is not None and attempt is not None else []
    with _changing(directory):
        left = _not_gone_on_from(committed(directory)[0], step, start, faulty)
        moved = []
        for entry in reversed(left):
            guard(directory, attempt)
            aside = free_path(directory, f"{entry.path.name}{ABANDONED}")
            os.rename(entry.path, aside)
            moved.append(aside.name)
        if left:
            sync_directory(directory)
            _point(directory, attempt)
    told = [f"renamed to {', '.join(sorted(moved))}"] if moved else []
    told += [f"deleted the copies {', '.join(copies)}"] if copies else []
    return f"the run continues from step {step}; later checkpoints were abandoned: {'; '.join(told)}" if told else ""


def _not_gone_on_from(
    found: list[Committed], step: int, start: Path | None, faulty: Collection[Path]
) -> list[Committed]:
    """Return the entries of ``found`` (oldest first) that are faulty or would be resumed instead of ``start``."""
    bad = {path.resolve() for path in faulty}
    index = next((i for i, entry in enumerate(found) if start is not None and _same(entry.path, start)), None)
    left = []
    for i, entry in enumerate(found):
        rival = start is not None and entry.global_step == step and (index is None or i > index)
        if entry.global_step > step or rival or entry.path.resolve() in bad:
            left.append(entry)
    return left


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _point(directory: Path, attempt: Attempt | None) -> None:
    """Point ``LATEST`` at the newest remaining checkpoint."""
    found = committed(directory)[0]
    if not found:
        (directory / LATEST).unlink(missing_ok=True)
        return
    label, check = attempt.label if attempt else "", partial(guard, directory, attempt)
    write_synced(directory / LATEST, f"{found[-1].path.name}\n", label=label, check=check)
    sync_directory(directory)


@contextmanager
def _changing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint folder {directory} cannot be modified: {error.strerror}",
            hint="make the folder writable, and restart the run",
        ) from error
