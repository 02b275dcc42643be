"""Roll back to a checkpoint such that a kill at any moment does not change the result.

The order of the steps makes it safe. First, wait for the save in progress. Delete the checkpoints of later steps,
newest first: a run killed meanwhile resumes from what is left, repeats the same steps up to the same streak, and
decides the same. Write the record of the rollback, ``skipped/rollbacks.json``, and sync it to disk: from then on, a
killed run resumes from the chosen checkpoint with this record. Only then does the attempt end, and the next one resumes
from that checkpoint in the same process (:mod:`disttrain.run.attempts`). Cost: a resume, without starting processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import lightning.pytorch as pl

from disttrain.callbacks.checkpointing.callback import Checkpointing
from disttrain.callbacks.update_guard.streak import Rollback, Streak, targets
from disttrain.checkpoint.format import reader, verification
from disttrain.checkpoint.format.writer import from_lead
from disttrain.distributed.synchronize_errors import raise_together
from disttrain.errors import CheckpointError
from disttrain.system.files import make_folder, sync_directory, write_synced
from disttrain.system.reading import read_json

FILE: Final = "rollbacks.json"


def read_rollbacks(folder: Path) -> list[Rollback]:
    """Return the recorded rollbacks of a run; none if there is no record. Rank 0 only.

    Args:
        folder: ``<run_dir>/skipped``.

    Raises:
        CheckpointError: the record is damaged.
    """
    try:
        content = read_json(folder / FILE)
        return [Rollback(**entry) for entry in content["rollbacks"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / FILE}, which says what batches are to be left out, cannot be read: {error}",
            hint="restore it, or move it away to go on with what the checkpoint says",
        ) from None


def write_rollbacks(folder: Path, rollbacks: list[Rollback]) -> None:
    """Write the record and sync it to disk. Rank 0 only.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        make_folder(folder)
        content = {"format": 1, "rollbacks": [each.as_dict() for each in rollbacks]}
        write_synced(folder / FILE, json.dumps(content, indent=1) + "\n")
        sync_directory(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder / FILE} cannot be written: {error.strerror}", hint="make room, or the folder writable"
        ) from error


def find_target(
    trainer: pl.Trainer, checkpoints: Checkpointing, streak: Streak, *, margin: int
) -> reader.Committed | None:
    """Return the checkpoint to roll back to, verified by all ranks, or None if there is none. Collective."""
    faulty: set[Path] = set()
    while True:
        chosen: reader.Committed | None = None
        with raise_together():
            if trainer.is_global_zero:
                chosen = _choose(checkpoints, streak, margin, faulty)
        chosen = from_lead(chosen)
        if chosen is None:
            return None
        if not checkpoints.verify_checksums:
            verification.trust(chosen.path)
        if not verification.fault_together(chosen.path):
            return chosen
        faulty.add(chosen.path)


def _choose(checkpoints: Checkpointing, streak: Streak, margin: int, faulty: set[Path]) -> reader.Committed | None:
    """Return the preferred target that is not faulty. Rank 0 only."""
    assert checkpoints.directory is not None, "the callback is not set up"
    own = checkpoints.attempt.run if checkpoints.attempt is not None else ""
    found = [entry for entry in reader.committed(checkpoints.directory)[0] if entry.about.run in ("", own)]
    candidates = [entry for entry in targets(found, first=streak.first, margin=margin) if entry.path not in faulty]
    # Best checkpoints listed in an older one may have been replaced and deleted since.
    newest = max(candidates, key=lambda entry: entry.global_step, default=None)
    return next((entry for entry in candidates if entry is newest or checkpoints.has_best_of(entry.path)), None)
