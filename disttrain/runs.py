"""The folder of a run: what it holds, and which checkpoint a new attempt starts from.

``run.json`` says whether the run is complete; ``checkpoints/`` holds what it can be resumed from. ``auto`` continues
a run from its newest committed and sound checkpoint, which of a complete one is its end, with no step left; ``never``
starts a new run; a path names a checkpoint or a run folder. Starting a new run never deletes: an older one is renamed.
Ranks that a launcher starts again resume from what their launch has saved, whatever it was told to begin with. A
folder's checkpoints are those of one run: another run's are an error, unless they are named. Rank 0 decides; all ranks
read a share of the checkpoint's files to compare checksums. ``auto`` fetches copies on remote storage that are newer.
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

from disttrain.checkpoint import store, verify
from disttrain.checkpoint.fence import Attempt, run_of
from disttrain.checkpoint.marker import ABANDONED
from disttrain.checkpoint.mirror import Mirror, Stored, another_run, begin
from disttrain.checkpoint.mirroring import fetch
from disttrain.checkpoint.prune import best_of
from disttrain.checkpoint.write import from_lead
from disttrain.data.remote import is_remote, shown
from disttrain.endings import VARIABLE
from disttrain.errors import CheckpointError
from disttrain.files import release, sync_directory, to_json, write_atomically
from disttrain.parallel.agree import is_distributed, raise_together
from disttrain.reading import RUN_FILE, read_run
from disttrain.slurm.requeue import is_restarted_by_slurm, job_of

CHECKPOINTS: Final = "checkpoints"
COMPLETED: Final = "completed"
PREEMPTED: Final = "preempted"
_PASSED_OVER: Final = "passed over: "
_begun: Final[dict[Path, None]] = {}
"""The run folders in which this process has begun an attempt, the last one last: what it starts there next is no
restart."""


@dataclass(frozen=True)
class Start:
    """Where an attempt starts.

    Attributes:
        checkpoint: the checkpoint to resume from, or None to start from scratch.
        notes: lines that tell the user what was found and decided.
        aside: where an older run was moved to, if one was.
        attempt: this attempt, where it has begun in the folder of checkpoints already.
        faulty: checkpoints that were found damaged.
        resume: what was asked for.
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
    """Decide where an attempt in a run folder starts, on all ranks, and read the checkpoint once. A collective.

    Args:
        run_dir: the run's folder; it need not exist.
        resume: ``auto``, ``never``, or the path of a checkpoint or of a run folder.
        checksums: compare the checkpoint's files with their checksums; by their sizes they are judged anyway.
        mirror: copies on remote storage, which ``auto`` fetches where they are newer.
        best: how many of the best copies to fetch with it.

    Raises:
        CheckpointError: the named checkpoint does not exist or is torn, ``auto`` meets another run's, or copies cannot
            be reached. Ranks other than 0 raise a ``RankError``.
    """
    release(run_dir)
    lead = not is_distributed() or torch.distributed.get_rank() == 0
    faulty: dict[Path, str] = {}
    unfit: dict[str, str] = {}  # copies that were fetched, or found damaged
    attempt: Attempt | None = None
    notes: list[str] = []
    restart: Restart | None = None
    while True:
        start, copies = Start(None), list[Stored]()  # rank 0's, once it has looked
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
            notes.append(f"{_PASSED_OVER}{fault}" if fault else f"fetched {mirror.url}/{copy.name}")
        if wanted:
            continue
        agreed = replace(agreed, faulty=tuple(faulty))
        if agreed.checkpoint is None:
            return agreed
        if not checksums:
            verify.trust(agreed.checkpoint)
            return agreed
        fault = verify.fault_together(agreed.checkpoint)
        if not fault:
            return agreed
        faulty[agreed.checkpoint] = fault


def _take_over(
    run_dir: Path, resume: str, mirror: Mirror | None, restart: Restart | None
) -> tuple[Attempt | None, list[str]]:
    """Begin an attempt if this start may go on with what is here or in a mirror; and what was cleared away."""
    owner = mirror.owner() if mirror is not None else {}
    goes_on = restart is not None or resume == "auto"
    if mirror is not None and owner and not goes_on and resume in ("auto", "never"):
        raise another_run(mirror, str(owner["run"]), "")  # before anything is moved
    if not goes_on or not (owner or _has_checkpoints(run_dir)):
        return None, []
    before = _choose(run_dir, resume, {}, restart).notes  # a folder of another run's is left alone
    # From here on no earlier attempt can commit, or prune, what is being looked at.
    attempt, cleared = begin(run_dir / CHECKPOINTS, mirror, run=_recorded_id(run_dir), adopt=True)
    after = _choose(run_dir, resume, {}, restart).notes
    local = [note for note in before if note not in after and note.startswith(_PASSED_OVER)]
    return attempt, [*local, *(f"{_PASSED_OVER}{reason}" for reason in cleared)]


def _choose(run_dir: Path, resume: str, faulty: Mapping[Path, str], restart: Restart | None) -> Start:
    """Where an attempt starts that may be a restart: then with what this launch has saved. Rank 0 only."""
    if restart is None:
        return choose_start(run_dir, resume, faulty=faulty)
    start = _newest(run_dir / CHECKPOINTS, faulty)
    if resume in ("auto", "never"):
        if start.checkpoint is not None:
            _check_owner(run_dir, start.checkpoint)
    elif start.checkpoint is None or (
        # Nothing was saved since; only a rollback may have deleted what was named, and gone further back.
        store.check(start.checkpoint).global_step < restart.from_step and Path(resume).exists()
    ):
        return choose_start(run_dir, resume, faulty=faulty)
    note = [] if resume == "auto" else [f"started again by {restart.by}, so --resume {resume} is taken as auto"]
    return replace(start, notes=[*note, *start.notes])


def _newer(
    mirror: Mirror, start: Start, directory: Path, unfit: Mapping[str, str], best: int
) -> tuple[list[Stored], list[str]]:
    """The copies to fetch, the one to resume from first: none where what is here is as new; and notes."""
    found, passed_over = mirror.committed()
    notes = [] if unfit else [f"{_PASSED_OVER}{reason}" for reason in passed_over]
    here = store.check(start.checkpoint).global_step if start.checkpoint is not None else -1
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
        and not (directory / copy.entry.path / store.MARKER).exists()
    ]
    return [newest, *also], notes


def choose_start(run_dir: Path, resume: str, *, faulty: Mapping[Path, str] | None = None) -> Start:
    """Decide where an attempt in a run folder starts, and set an older run aside if it must. Rank 0 only.

    Args:
        run_dir: the run's folder; it need not exist.
        resume: ``auto``, ``never``, or the path of a checkpoint or of a run folder.
        faulty: checkpoints that are not to be taken, and why.

    Raises:
        CheckpointError: the named checkpoint does not exist, is torn or faulty, or ``auto`` meets another run's.
    """
    faulty = faulty or {}
    if resume == "never":
        return _anew(run_dir, [])
    if is_remote(resume):
        raise CheckpointError(
            f"--resume {shown(resume)} is a URL",
            mend="name its folder in checkpoint.mirror.url, and use --resume auto with a run_dir that is not there yet",
        )
    if resume != "auto":
        return _named(Path(resume), faulty)
    start = _newest(run_dir / CHECKPOINTS, faulty)
    complete = ["the run in this folder is complete"] if read_run(run_dir).get("status") == COMPLETED else []
    if start.checkpoint is not None:
        _check_owner(run_dir, start.checkpoint)
    elif complete:
        return _anew(run_dir, complete)
    return replace(start, notes=[*complete, *start.notes])


def best_checkpoint(run_dir: Path, which: str, *, tell: Callable[[str], object] = lambda text: None) -> Path:
    """The checkpoint that an evaluation asks for.

    Args:
        run_dir: the run's folder.
        which: ``best``, by the metric that the markers hold, the newest where none holds one; ``last``; or a path.
        tell: told where ``best`` is the newest for want of a metric.

    Raises:
        CheckpointError: there is none.
    """
    start = _newest(run_dir / CHECKPOINTS, {}) if which in ("best", "last") else _named(Path(which), {})
    if start.checkpoint is None:
        raise CheckpointError(
            f"run folder {run_dir} holds no committed checkpoint", mend="train first, or give --checkpoint_path PATH"
        )
    if which != "best":
        return start.checkpoint
    found = store.committed(run_dir / CHECKPOINTS)[0]
    if rated := best_of(found, 1):
        return rated[0].path
    step = read_run(run_dir).get("best", {}).get("step")  # checkpoints of format 1 hold no metric
    for entry in found:
        if entry.global_step == step:
            return entry.path
    tell(f"no checkpoint in {run_dir} holds a monitored metric: the newest is taken as the best")
    return start.checkpoint


def launch_id() -> str:
    """What the attempts that one torchrun, or one ``disttrain launch``, starts have in common; empty without."""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return ""
    launcher = launcher_process()
    run_id = "" if VARIABLE in os.environ else os.environ.get("TORCHELASTIC_RUN_ID", "")  # launch makes some torchruns
    return f"{run_id}@{platform.node()}:{launcher.pid}:{launcher.create_time():.2f}"


def launcher_process() -> psutil.Process:
    """What has started this rank, the first time too: torchrun, or the ``disttrain launch`` that has started that."""
    torchrun = psutil.Process(os.getppid())
    above = torchrun.parent() if VARIABLE in os.environ else None
    return above or torchrun


def stopped_by_request(run_dir: Path) -> str:
    """Why this launch was asked to stop, if it was; torchrun restarts whatever ends with another code than 0."""
    attempts = _attempts(run_dir)
    mine = launch_id()
    if not mine or not attempts or attempts[-1].get("launch") != mine or attempts[-1].get("status") != PREEMPTED:
        return ""
    return str(attempts[-1].get("stop_reason", PREEMPTED))


@dataclass(frozen=True)
class Restart:
    """Earlier attempts at a run by what has started this process, too.

    Attributes:
        by: what that is.
        from_step: the step that the first of them started from.
    """

    by: str
    from_step: int


def restart_of(run_dir: Path) -> Restart | None:
    """Whether this torchrun, or this SLURM job, has trained here before and was started again. Rank 0 only."""
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
    """Whether the torchrun or SLURM job that has started this process again has completed the run before."""
    if run_dir.resolve() in _begun or read_run(run_dir).get("status") != COMPLETED:
        return False
    last = (_attempts(run_dir) or [{}])[-1]
    launch = launch_id()
    by_slurm = is_restarted_by_slurm() and last.get("slurm_job") == job_of().get("slurm_job")
    return by_slurm or bool(launch and last.get("launch") == launch)


def note_begun(run_dir: Path) -> None:
    """This process trains in a run folder: what it starts there later is no restart."""
    _begun.pop(run_dir.resolve(), None)
    _begun[run_dir.resolve()] = None


def last_begun() -> Path | None:
    """The run folder in which this process has trained last; None if it has not."""
    return next(reversed(_begun), None)


def _attempts(run_dir: Path) -> list[dict[str, Any]]:
    return list(read_run(run_dir).get("attempts", []))


def write_run(run_dir: Path, record: dict[str, Any]) -> None:
    """Write a run's record, atomically."""
    write_atomically(run_dir / RUN_FILE, to_json(record, indent=2) + "\n")


def _has_checkpoints(run_dir: Path) -> bool:
    try:
        return (run_dir / CHECKPOINTS).is_dir()
    except OSError:  # who may not look there is told when the folder is read
        return True


def _recorded_id(run_dir: Path) -> str:
    return str(read_run(run_dir).get("id") or "")


def _check_owner(run_dir: Path, checkpoint: Path) -> None:
    """Refuse to go on, unasked, from a checkpoint that some other run has made."""
    owner = store.check(checkpoint).about.run
    ours, recorded = run_of(run_dir / CHECKPOINTS), _recorded_id(run_dir)
    if ours and recorded and ours != recorded:
        raise CheckpointError(
            f"{run_dir / RUN_FILE} is the record of run {recorded}, the checkpoints beside it are those of run {ours}",
            mend="put back what belongs together, or name the checkpoint: --resume PATH",
        )
    if owner and owner != (ours or recorded):
        raise CheckpointError(
            f"checkpoint {checkpoint} was made by run {owner}, this folder is that of"
            f" {f'run {ours or recorded}' if ours or recorded else 'a run that is not known'}",
            mend=f"move it out of the folder; or, to go on from it all the same, --resume {checkpoint}",
        )


def _named(path: Path, faulty: Mapping[Path, str]) -> Start:
    if (path / CHECKPOINTS).is_dir():
        start = _newest(path / CHECKPOINTS, faulty)
        if start.checkpoint is None:
            raise CheckpointError(
                f"run folder {path} holds no committed checkpoint", mend="name another one, or use --resume never"
            )
        return start
    if ABANDONED in path.name and path.is_dir():
        raise CheckpointError(
            f"checkpoint {path} was set aside, as its run did not go on from it",
            mend=f"rename it to {path.name.partition(ABANDONED)[0]}, and name it so or use --resume auto",
        )
    store.check(path)
    if path in faulty:
        raise CheckpointError(faulty[path], mend="resume from an earlier one")
    return Start(path, [f"resuming from {path}"])


def _newest(directory: Path, faulty: Mapping[Path, str]) -> Start:
    found, passed_over = store.committed(directory)
    found = [entry for entry in found if entry.path not in faulty]
    notes = [f"{_PASSED_OVER}{reason}" for reason in (*passed_over, *faulty.values())]
    if not found:
        return Start(None, notes)
    return Start(found[-1].path, [*notes, f"resuming from {found[-1].path}"])


def take_back(run_dir: Path, aside: Path) -> None:
    """Undo a start that came to nothing: the older run gets its folder back."""
    shutil.rmtree(run_dir, ignore_errors=True)
    os.rename(aside, run_dir)
    sync_directory(run_dir.parent)


def _anew(run_dir: Path, notes: list[str]) -> Start:
    if not (run_dir / RUN_FILE).exists() and not any(path.is_dir() for path in (run_dir / CHECKPOINTS).glob("*")):
        return Start(None)
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    os.rename(run_dir, aside)
    sync_directory(run_dir.parent)
    return Start(None, [*notes, f"starting anew; the older run was moved to {aside}"], aside)
