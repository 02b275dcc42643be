"""What leaves a folder of checkpoints: what no rule keeps, what a rollback forgets, what a start does not go on from.

Checkpoints are ranked by their steps, and the newest is resumed. So nothing of a later step than the one that a run
stands at may count: it would be resumed instead, and would take the place of what is saved from then on. A rollback
deletes it. A start, which may have passed it over as damaged, or was told to go on from an earlier one, gives it
another name, ``step-00000100.abandoned``; that goes once the run has committed a checkpoint of this step or a later
one. Copies on remote storage are deleted in both cases. All of it is rank 0's work, and it looks before each step
whether another attempt has taken over.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from disttrain.checkpoint.fence import Attempt, FencedError, guard
from disttrain.checkpoint.marker import ABANDONED, LATEST, Committed, abandoned, committed, free_path, remove
from disttrain.checkpoint.mirror import Mirror
from disttrain.checkpoint.prune import Keep
from disttrain.errors import CheckpointError
from disttrain.files import sync_directory, write_synced
from disttrain.terminal import tell


def prune(directory: Path, keep: Keep, attempt: Attempt | None, *, new: Path, step: int) -> None:
    """Delete what need not be kept once a checkpoint is committed; what cannot be deleted is said, and waits.

    Args:
        directory: the folder.
        keep: the rules.
        attempt: who asks.
        new: the checkpoint that was committed, which stays.
        step: its step.

    Raises:
        FencedError: a newer attempt has begun.
    """
    try:
        superfluous = [entry for entry in keep.superfluous(committed(directory)[0]) if entry.path != new]
        passed = [entry for entry in abandoned(directory) if entry.global_step <= step]
        for entry in (*superfluous, *passed):
            guard(directory, attempt)  # after the look: nothing of a newer attempt's is among them
            remove(entry.path)
    except FencedError:
        raise
    except (OSError, CheckpointError) as error:  # the new one is safe; the next save tries again
        told = error.what if isinstance(error, CheckpointError) else error
        tell(f"an old checkpoint could not be removed: {told}")


def forget_after(directory: Path, step: int, *, attempt: Attempt | None, mirror: Mirror | None) -> None:
    """Delete the checkpoints of later steps, and their copies, newest first; no save may be under way.

    Raises:
        CheckpointError: one cannot be deleted, or a newer attempt has taken over.
    """
    if mirror is not None and attempt is not None:  # first: a resume takes the newest, wherever it is
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
    """Set aside what a run that begins to train does not go on from: what is later than its start, or faulty.

    Args:
        directory: the folder.
        step: the step that the run stands at.
        start: the checkpoint that it was loaded from, in this folder or another one.
        faulty: checkpoints that were found damaged.
        attempt: who asks.
        mirror: the copies, of which later ones are deleted.

    Returns:
        what was set aside, in one line; an empty text where nothing was.

    Raises:
        CheckpointError: one cannot be renamed or deleted, or a newer attempt has taken over.
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
    told = [f"set aside as {', '.join(sorted(moved))}"] if moved else []
    told += [f"deleted the copies {', '.join(copies)}"] if copies else []
    return f"the run goes on from step {step}, not from what is later: {'; '.join(told)}" if told else ""


def _not_gone_on_from(
    found: list[Committed], step: int, start: Path | None, faulty: Collection[Path]
) -> list[Committed]:
    """Those of ``found``, oldest first, that are faulty or would be taken instead of the start."""
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
    """Have ``LATEST`` name the newest that is left."""
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
            f"the folder of checkpoints {directory} cannot be changed: {error.strerror}",
            mend="make the folder writable, and start the run again",
        ) from error
