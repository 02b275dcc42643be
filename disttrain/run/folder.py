"""The run folder, and the choice of the checkpoint that a new attempt starts from.

``run.json`` records whether the run is complete; ``checkpoints/`` holds what it can resume from. ``auto`` resumes from
the newest committed, sound checkpoint (for a complete run that is its end, with no steps left). ``never`` starts a new
run. A path names a checkpoint or a run folder. Starting a new run never deletes an older one, but renames it. Ranks
restarted by a launcher resume from what their launch has saved, whatever option it was given. All checkpoints in a
folder belong to one run; another run's are an error unless named explicitly. Rank 0 decides; to verify checksums, each
rank reads a share of the files. ``auto`` also fetches newer copies from remote storage.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

import psutil
import torch.distributed

from disttrain.checkpoint.format import reader, verification
from disttrain.checkpoint.format.fence import Attempt, run_of
from disttrain.checkpoint.format.marker import ABANDONED
from disttrain.checkpoint.format.retention import best_of
from disttrain.checkpoint.format.writer import from_lead
from disttrain.checkpoint.remote.copies import Mirror, Stored, another_run, begin
from disttrain.checkpoint.remote.uploads import fetch
from disttrain.data.remote.ranges import is_remote, shown
from disttrain.distributed.exit_codes import VARIABLE
from disttrain.distributed.synchronize_errors import is_distributed, raise_together
from disttrain.errors import CheckpointError
from disttrain.slurm.requeue import is_restarted_by_slurm, job_of
from disttrain.system.files import release, sync_directory, to_json, write_atomically
from disttrain.system.reading import RUN_FILE, read_run

CHECKPOINTS: Final = "checkpoints"
COMPLETED: Final = "completed"
PREEMPTED: Final = "preempted"
_SKIPPED: Final = "skipped: "
_begun: Final[dict[Path, None]] = {}
"""Run folders in which this process has begun an attempt, the latest last; its next start there is not a restart."""


@dataclass(frozen=True)
class Start:
    """Where an attempt starts.

    Attributes:
        checkpoint: the checkpoint to resume from, or None to start from scratch.
        notes: lines that tell the user what was found and decided.
        aside: the new path of an older run, if one was renamed.
        attempt: this attempt, if it has already begun in the checkpoint folder.
        faulty: checkpoints found damaged.
        resume: the ``resume`` option.
    """

    checkpoint: Path | None
    notes: list[str] = field(default_factory=list)
    aside: Path | None = None
    attempt: Attempt | None = None
    faulty: tuple[Path, ...] = ()
    resume: str = "auto"


def find_start(
    run_dir: Path, resume: str, *, checksums: bool = True, mirror: Mirror | None = None, best: int = 1
) -> Start:
    """Decide on all ranks where an attempt in a run folder starts, and verify the checkpoint. Collective.

    Args:
        run_dir: the run folder; it need not exist.
        resume: ``auto``, ``never``, or the path of a checkpoint or run folder.
        checksums: verify the files' checksums; their sizes are always checked.
        mirror: copies on remote storage, which ``auto`` fetches if they are newer.
        best: how many of the best copies to fetch along with the newest.

    Raises:
        CheckpointError: the named checkpoint does not exist or is torn, ``auto`` finds another run's, or the copies
            cannot be reached. Ranks other than 0 raise a ``RankError``.
    """
    release(run_dir)
    lead = not is_distributed() or torch.distributed.get_rank() == 0
    faulty: dict[Path, str] = {}
    unfit: dict[str, str] = {}  # copies already fetched (empty) or found damaged (why)
    attempt: Attempt | None = None
    notes: list[str] = []
    restart: Restart | None = None
    while True:
        start, copies = Start(None), list[Stored]()  # until rank 0 has looked
        with raise_together():
            if lead:
                if attempt is None:
                    restart = restart_of(run_dir)
                    attempt, notes = _take_over(run_dir, resume, mirror, restart)
                start = _choose(run_dir, resume, faulty, restart)
                if mirror is not None and attempt is not None:
                    copies, passed_over = _newer(mirror, start, run_dir / CHECKPOINTS, unfit, best)
                    notes += passed_over
                start = replace(start, notes=[*notes, *start.notes], attempt=attempt, resume=resume)
        agreed, wanted = cast(tuple[Start, list[Stored]], from_lead((start, copies)))
        for copy in wanted:
            assert mirror is not None
            assert agreed.attempt is not None
            fault = fetch(mirror, copy, run_dir / CHECKPOINTS, agreed.attempt)
            unfit[copy.name] = fault
            notes.append(f"{_SKIPPED}{fault}" if fault else f"fetched {mirror.url}/{copy.name}")
        if wanted:
            continue
        agreed = replace(agreed, faulty=tuple(faulty))
        if agreed.checkpoint is None:
            return agreed
        if not checksums:
            verification.trust(agreed.checkpoint)
            return agreed
        fault = verification.fault_together(agreed.checkpoint)
        if not fault:
            return agreed
        faulty[agreed.checkpoint] = fault


def _take_over(
    run_dir: Path, resume: str, mirror: Mirror | None, restart: Restart | None
) -> tuple[Attempt | None, list[str]]:
    """Begin an attempt if this start may resume from the folder or mirror; also return notes on what was cleared."""
    owner = mirror.owner() if mirror is not None else {}
    goes_on = restart is not None or resume == "auto"
    if mirror is not None and owner and not goes_on and resume in ("auto", "never"):
        raise another_run(mirror, str(owner["run"]), "")  # before anything is moved
    if not goes_on or not (owner or _has_checkpoints(run_dir)):
        return None, []
    before = _choose(run_dir, resume, {}, restart).notes  # raises for another run's folder, which stays untouched
    # From here on, no earlier attempt can commit or prune while we look.
    attempt, cleared = begin(run_dir / CHECKPOINTS, mirror, run=_recorded_id(run_dir), adopt=True)
    after = _choose(run_dir, resume, {}, restart).notes
    local = [note for note in before if note not in after and note.startswith(_SKIPPED)]
    return attempt, [*local, *(f"{_SKIPPED}{reason}" for reason in cleared)]


def _choose(run_dir: Path, resume: str, faulty: Mapping[Path, str], restart: Restart | None) -> Start:
    """Choose the start; a restart resumes from what this launch has saved. Rank 0 only."""
    if restart is None:
        return choose_start(run_dir, resume, faulty=faulty)
    start = _newest(run_dir / CHECKPOINTS, faulty)
    if resume in ("auto", "never"):
        if start.checkpoint is not None:
            _check_owner(run_dir, start.checkpoint)
    elif start.checkpoint is None or (
        # Nothing was saved since, unless a rollback deleted the named checkpoint and went back further.
        reader.check(start.checkpoint).global_step < restart.from_step and Path(resume).exists()
    ):
        return choose_start(run_dir, resume, faulty=faulty)
    note = [] if resume == "auto" else [f"restarted by {restart.by}, so --resume {resume} is treated as auto"]
    return replace(start, notes=[*note, *start.notes])


def _newer(
    mirror: Mirror, start: Start, directory: Path, unfit: Mapping[str, str], best: int
) -> tuple[list[Stored], list[str]]:
    """Return the copies to fetch (the one to resume from first; none if the local one is as new), and notes."""
    found, passed_over = mirror.committed()
    notes = [] if unfit else [f"{_SKIPPED}{reason}" for reason in passed_over]
    here = reader.check(start.checkpoint).global_step if start.checkpoint is not None else -1
    sound = [copy for copy in found if not unfit.get(copy.name)]
    newest = sound[-1] if sound else None
    if newest is None or newest.name in unfit or newest.entry.global_step <= here:
        return [], notes
    rated = best_of([copy.entry for copy in sound], best)
    also = [
        copy
        for copy in sound
        if copy is not newest
        and copy.name not in unfit
        and any(copy.entry is entry for entry in rated)
        and not (directory / copy.entry.path / reader.MARKER).exists()
    ]
    return [newest, *also], notes


def choose_start(run_dir: Path, resume: str, *, faulty: Mapping[Path, str] | None = None) -> Start:
    """Decide where an attempt in a run folder starts, renaming an older run if necessary. Rank 0 only.

    Args:
        run_dir: the run folder; it need not exist.
        resume: ``auto``, ``never``, or the path of a checkpoint or run folder.
        faulty: checkpoints not to use, and why.

    Raises:
        CheckpointError: the named checkpoint does not exist, is torn or faulty, or ``auto`` finds another run's.
    """
    faulty = faulty or {}
    if resume == "never":
        return _start_over(run_dir, [])
    if is_remote(resume):
        raise CheckpointError(
            f"--resume {shown(resume)} is a URL",
            hint="set checkpoint.mirror.url to its folder, and use --resume auto with a new run_dir",
        )
    if resume != "auto":
        return _named(Path(resume), faulty)
    start = _newest(run_dir / CHECKPOINTS, faulty)
    complete = ["the run in this folder is complete"] if read_run(run_dir).get("status") == COMPLETED else []
    if start.checkpoint is not None:
        _check_owner(run_dir, start.checkpoint)
    elif complete:
        return _start_over(run_dir, complete)
    return replace(start, notes=[*complete, *start.notes])


def best_checkpoint(run_dir: Path, which: str, *, tell: Callable[[str], object] = lambda text: None) -> Path:
    """Return the checkpoint to evaluate.

    Args:
        run_dir: the run folder.
        which: ``best`` (by the metric in the markers; the newest if none has one), ``last``, or a path.
        tell: called with a message if ``best`` falls back to the newest.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    start = _newest(run_dir / CHECKPOINTS, {}) if which in ("best", "last") else _named(Path(which), {})
    if start.checkpoint is None:
        raise CheckpointError(
            f"run folder {run_dir} holds no committed checkpoint", hint="train first, or give --checkpoint_path PATH"
        )
    if which != "best":
        return start.checkpoint
    found = reader.committed(run_dir / CHECKPOINTS)[0]
    if rated := best_of(found, 1):
        return rated[0].path
    step = read_run(run_dir).get("best", {}).get("step")  # markers of format 1 have no metric
    for entry in found:
        if entry.global_step == step:
            return entry.path
    tell(f"no checkpoint in {run_dir} holds a monitored metric: using the newest as the best")
    return start.checkpoint


def launch_id() -> str:
    """Return an id shared by all attempts that one torchrun or ``disttrain launch`` starts; empty without either."""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return ""
    launcher = launcher_process()
    run_id = "" if VARIABLE in os.environ else os.environ.get("TORCHELASTIC_RUN_ID", "")  # launch may rerun torchrun
    return f"{run_id}@{platform.node()}:{launcher.pid}:{launcher.create_time():.2f}"


def launcher_process() -> psutil.Process:
    """Return the process that outlives restarts: torchrun, or the ``disttrain launch`` that started it."""
    torchrun = psutil.Process(os.getppid())
    above = torchrun.parent() if VARIABLE in os.environ else None
    return above or torchrun


def stopped_by_request(run_dir: Path) -> str:
    """Return why this launch was asked to stop, if it was: torchrun restarts any rank with a nonzero exit code."""
    attempts = _attempts(run_dir)
    mine = launch_id()
    if not mine or not attempts or attempts[-1].get("launch") != mine or attempts[-1].get("status") != PREEMPTED:
        return ""
    return str(attempts[-1].get("stop_reason", PREEMPTED))


@dataclass(frozen=True)
class Restart:
    """Earlier attempts at a run by the same launcher as this one.

    Attributes:
        by: name of the launcher.
        from_step: the step that the first of them started from.
    """

    by: str
    from_step: int


def restart_of(run_dir: Path) -> Restart | None:
    """Return whether this torchrun or SLURM job has trained here before and was restarted. Rank 0 only."""
    if run_dir.resolve() in _begun:
        return None
    launch, job = launch_id(), job_of().get("slurm_job") if is_restarted_by_slurm() else None
    first, by = None, ""
    for attempt in reversed(_attempts(run_dir)):
        if launch and attempt.get("launch") == launch:
            by = by or "torchrun"
        elif job is not None and attempt.get("slurm_job") == job:
            by = by or "SLURM"
        else:
            break
        if attempt.get("to_step") is None or attempt["to_step"] != attempt.get("from_step"):  # it did train
            first = attempt
    return Restart(by, int(first.get("from_step") or 0)) if first is not None else None


def finished_by_this_job(run_dir: Path) -> bool:
    """Return whether the torchrun or SLURM job that restarted this process had already completed the run."""
    if run_dir.resolve() in _begun or read_run(run_dir).get("status") != COMPLETED:
        return False
    last = (_attempts(run_dir) or [{}])[-1]
    launch = launch_id()
    by_slurm = is_restarted_by_slurm() and last.get("slurm_job") == job_of().get("slurm_job")
    return by_slurm or bool(launch and last.get("launch") == launch)


def note_begun(run_dir: Path) -> None:
    """Record that this process trains in a run folder: its later starts there are not restarts."""
    _begun.pop(run_dir.resolve(), None)
    _begun[run_dir.resolve()] = None


def last_begun() -> Path | None:
    """Return the run folder in which this process last trained, or None."""
    return next(reversed(_begun), None)


def _attempts(run_dir: Path) -> list[dict[str, Any]]:
    return list(read_run(run_dir).get("attempts", []))


def write_run(run_dir: Path, record: dict[str, Any]) -> None:
    """Write a run's record atomically."""
    write_atomically(run_dir / RUN_FILE, to_json(record, indent=2) + "\n")


def _has_checkpoints(run_dir: Path) -> bool:
    try:
        return (run_dir / CHECKPOINTS).is_dir()
    except OSError:  # missing permissions are reported when the folder is read
        return True


def _recorded_id(run_dir: Path) -> str:
    return str(read_run(run_dir).get("id") or "")


def _check_owner(run_dir: Path, checkpoint: Path) -> None:
    """Raise if a checkpoint was made by another run: resuming from it must be requested explicitly."""
    owner = reader.check(checkpoint).about.run
    ours, recorded = run_of(run_dir / CHECKPOINTS), _recorded_id(run_dir)
    if ours and recorded and ours != recorded:
        raise CheckpointError(
            f"{run_dir / RUN_FILE} is the record of run {recorded}, but the checkpoints beside it are from run {ours}",
            hint="restore the files that belong together, or name the checkpoint: --resume PATH",
        )
    if owner and owner != (ours or recorded):
        raise CheckpointError(
            f"checkpoint {checkpoint} was made by run {owner}, but this folder belongs to"
            f" {f'run {ours or recorded}' if ours or recorded else 'an unknown run'}",
            hint=f"move it out of the folder; or, to resume from it anyway, --resume {checkpoint}",
        )


def _named(path: Path, faulty: Mapping[Path, str]) -> Start:
    if (path / CHECKPOINTS).is_dir():
        start = _newest(path / CHECKPOINTS, faulty)
        if start.checkpoint is None:
            raise CheckpointError(
                f"run folder {path} holds no committed checkpoint", hint="use another one, or --resume never"
            )
        return start
    if ABANDONED in path.name and path.is_dir():
        raise CheckpointError(
            f"checkpoint {path} was abandoned: its run continued from an earlier one",
            hint=f"rename it to {path.name.partition(ABANDONED)[0]}, then resume from that name or with --resume auto",
        )
    reader.check(path)
    if path in faulty:
        raise CheckpointError(faulty[path], hint="resume from an earlier one")
    return Start(path, [f"resuming from {path}"])


def _newest(directory: Path, faulty: Mapping[Path, str]) -> Start:
    found, passed_over = reader.committed(directory)
    found = [entry for entry in found if entry.path not in faulty]
    notes = [f"{_SKIPPED}{reason}" for reason in (*passed_over, *faulty.values())]
    if not found:
        return Start(None, notes)
    return Start(found[-1].path, [*notes, f"resuming from {found[-1].path}"])


def take_back(run_dir: Path, aside: Path) -> None:
    """Undo a start that came to nothing: give the older run its folder back."""
    shutil.rmtree(run_dir, ignore_errors=True)
    os.rename(aside, run_dir)
    sync_directory(run_dir.parent)


def _start_over(run_dir: Path, notes: list[str]) -> Start:
    if not (run_dir / RUN_FILE).exists() and not any(path.is_dir() for path in (run_dir / CHECKPOINTS).glob("*")):
        return Start(None)
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    os.rename(run_dir, aside)
    sync_directory(run_dir.parent)
    return Start(None, [*notes, f"starting over; the older run was moved to {aside}"], aside)
