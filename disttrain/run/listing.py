"""List the runs under a folder and their jobs: state, step, last checkpoint. Reads small files; does not import torch.

A run's state is that of its job while SLURM knows the job, otherwise the one in the run's record. If the record says
``running`` but the job is gone, the run is ``lost``: it was killed, and rerunning the same command resumes it.
Unreadable folders are skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from disttrain.checkpoint.format.marker import committed
from disttrain.errors import DataError
from disttrain.run.metrics_file import FILE_NAME, read_rows
from disttrain.slurm.commands import Queued
from disttrain.slurm.render import SUBMIT
from disttrain.slurm.snapshot import JOB, read_job
from disttrain.system.reading import RUN_FILE, read_run

_DEPTH: Final = 4
_OVER: Final = ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


@dataclass(frozen=True)
class Row:
    """A run, as listed by ``disttrain jobs``.

    Attributes:
        run: its folder.
        job: number of its SLURM job; empty without one.
        state: of the job while SLURM knows it, else of the run.
        attempts: how often it was started.
        step: last step that was logged or saved; None before the first.
        checkpoint: step of the newest committed checkpoint.
        checkpoint_age_seconds: how long ago that was committed.
        note: why it is pending, where it runs, or why it stopped.
    """

    run: str
    job: str
    state: str
    attempts: int
    step: int | None
    checkpoint: int | None
    checkpoint_age_seconds: float | None
    note: str


def find_runs(roots: Sequence[Path], *, skipped: Callable[[Path, OSError], None] | None = None) -> list[Path]:
    """Return the run folders at or below some folders, sorted, including runs that were submitted but have not started.

    Args:
        roots: the folders to search.
        skipped: called for each folder that cannot be read.
    """
    found: set[Path] = set()

    def look(folder: Path, depth: int) -> None:
        try:
            if (folder / RUN_FILE).exists() or (folder / SUBMIT / JOB).exists():
                found.add(folder)
            children = [child for child in folder.iterdir() if child.is_dir()] if depth else []
        except OSError as error:
            if skipped is not None:
                skipped(folder, error)
            return
        for child in children:
            own = child.name in (SUBMIT, "checkpoints", "tensorboard", "report", "hangs")
            if not own and not child.name.startswith("."):
                look(child, depth - 1)

    for root in roots:
        if root.is_dir():
            look(root, _DEPTH)
    return sorted(found)


def rows_of(run_dir: Path, queued: Mapping[str, Queued]) -> list[Row]:
    """Return a run's row; for the folder of a job array, the rows of its runs that have not started."""
    submitted, record = read_job(run_dir), read_run(run_dir)
    number = str(submitted.get("job", ""))
    if submitted.get("array") and not record:
        waiting = {name: one for name, one in queued.items() if name.startswith(f"{number}_")}
        begun = {name for name in waiting if (run_dir / name.partition("_")[2] / RUN_FILE).exists()}
        return [
            Row(
                str(run_dir / name.partition("_")[2]),
                name,
                one.state.lower(),
                0,
                None,
                None,
                None,
                one.reason.strip("()"),
            )
            for name, one in sorted(waiting.items())
            if name not in begun
        ]
    attempts = record.get("attempts", [])
    job = attempts[-1].get("slurm_job", "") if attempts else ""
    if not job or (number and number != job and "_" not in job):
        job = number  # submitted again since
    state, note = _state(record, queued.get(job), known=bool(job))
    number_of = len(attempts) + (record.get("attempts_left_out") or 0)
    steps = [one["to_step"] for one in attempts if one.get("to_step") is not None]
    found = committed(run_dir / "checkpoints")[0]
    newest = found[-1] if found else None
    steps += [newest.global_step] if newest else []
    steps += [_logged(run_dir)]
    age = None if newest is None or newest.about.time is None else max(0.0, time.time() - newest.about.time)
    step = max(steps) if max(steps) >= 0 else None
    return [Row(str(run_dir), job, state, number_of, step, newest.global_step if newest else None, age, note)]


def _state(record: Mapping[str, Any], job: Queued | None, *, known: bool) -> tuple[str, str]:
    """Return state and note of a run."""
    own, reason = record.get("status", ""), record.get("stop_reason", "")
    if job is not None and job.state not in _OVER and not job.state.startswith("CANCELLED"):
        return job.state.lower(), job.reason.strip("()")
    if own == "running":
        if job is not None and not job.state.startswith("COMPLETED"):
            return job.state.split()[0].lower(), "killed"
        return ("lost", "killed: its job is gone" if job is None else "killed") if known else ("running", "")
    if job is not None and own != "completed" and not job.state.startswith("COMPLETED"):
        return job.state.lower(), reason
    return own or (job.state.lower() if job is not None else "gone"), reason


def _logged(run_dir: Path) -> int:
    try:
        return max((row.step for row in read_rows(run_dir / FILE_NAME)), default=-1)
    except (DataError, OSError):
        return -1
