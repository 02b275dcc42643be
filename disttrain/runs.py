"""The folder of a run: what it holds, and which checkpoint a new attempt starts from.

``run.json`` says whether the run is complete; ``checkpoints/`` holds what it can be resumed from. ``auto``
continues an interrupted run from its newest committed checkpoint and starts anew where the run is complete;
``never`` starts anew; a path names a checkpoint or a run folder. Starting anew never deletes: an older run is
renamed aside. Called on rank 0, which tells the others; costs a look at the folder.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from disttrain.checkpoint import store
from disttrain.errors import CheckpointError
from disttrain.files import write_atomically

RUN_FILE: Final = "run.json"
CHECKPOINTS: Final = "checkpoints"
COMPLETED: Final = "completed"
PREEMPTED: Final = "preempted"


@dataclass(frozen=True)
class Start:
    """Where an attempt starts.

    Attributes:
        checkpoint: the checkpoint to resume from, or None to start from scratch.
        notes: lines that tell the user what was found and decided.
        aside: where an older run was moved to, if one was.
    """

    checkpoint: Path | None
    notes: list[str] = field(default_factory=list)
    aside: Path | None = None


def choose_start(run_dir: Path, resume: str) -> Start:
    """Decide where an attempt in a run folder starts, and set an older run aside if it must.

    Args:
        run_dir: the run's folder; it need not exist.
        resume: ``auto``, ``never``, or the path of a checkpoint or of a run folder.

    Raises:
        CheckpointError: the named checkpoint does not exist or is torn.
    """
    if resume == "never":
        return _anew(run_dir, [])
    if resume != "auto":
        return _named(Path(resume))
    if read_run(run_dir).get("status") == COMPLETED:
        return _anew(run_dir, ["the run in this folder is complete"])
    return _newest(run_dir / CHECKPOINTS)


def best_checkpoint(run_dir: Path, which: str) -> Path:
    """The checkpoint that an evaluation asks for.

    Args:
        run_dir: the run's folder.
        which: ``best`` (by the monitored metric; the newest where none was kept), ``last``, or a path.

    Raises:
        CheckpointError: there is none.
    """
    start = _newest(run_dir / CHECKPOINTS) if which in ("best", "last") else _named(Path(which))
    if start.checkpoint is None:
        raise CheckpointError(
            f"run folder {run_dir} holds no committed checkpoint", mend="train first, or give --checkpoint_path PATH"
        )
    if which == "best":
        step = (read_run(run_dir).get("best") or {}).get("step")
        for entry in store.committed(run_dir / CHECKPOINTS)[0]:
            if entry.global_step == step:
                return entry.path
    return start.checkpoint


def read_run(run_dir: Path) -> dict[str, Any]:
    """A run's record; empty where there is none or it is damaged."""
    try:
        content = json.loads((run_dir / RUN_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def launch_id() -> str:
    """What the attempts that one torchrun starts have in common; empty without torchrun."""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return ""
    launcher = psutil.Process(os.getppid())
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{run_id}@{platform.node()}:{launcher.pid}:{launcher.create_time():.2f}"


def stopped_by_request(run_dir: Path) -> str:
    """Why this launch was asked to stop, if it was; torchrun restarts whatever ends with another code than 0."""
    attempts = read_run(run_dir).get("attempts") or [{}]
    mine = launch_id()
    if not mine or attempts[-1].get("launch") != mine or attempts[-1].get("status") != PREEMPTED:
        return ""
    return str(attempts[-1].get("stop_reason", PREEMPTED))


def write_run(run_dir: Path, record: dict[str, Any]) -> None:
    """Write a run's record, atomically."""
    write_atomically(run_dir / RUN_FILE, json.dumps(record, indent=2) + "\n")


def _named(path: Path) -> Start:
    if (path / CHECKPOINTS).is_dir():
        start = _newest(path / CHECKPOINTS)
        if start.checkpoint is None:
            raise CheckpointError(
                f"run folder {path} holds no committed checkpoint", mend="name another one, or use --resume never"
            )
        return start
    store.check(path)
    return Start(path, [f"resuming from {path}"])


def _newest(directory: Path) -> Start:
    found, passed_over = store.committed(directory)
    notes = [f"passed over: {reason}" for reason in passed_over]
    if not found:
        return Start(None, notes)
    return Start(found[-1].path, [*notes, f"resuming from {found[-1].path}"])


def take_back(run_dir: Path, aside: Path) -> None:
    """Undo a start that came to nothing: the older run gets its folder back."""
    shutil.rmtree(run_dir, ignore_errors=True)
    os.rename(aside, run_dir)


def _anew(run_dir: Path, notes: list[str]) -> Start:
    if not (run_dir / RUN_FILE).exists() and not (run_dir / CHECKPOINTS).exists():
        return Start(None)
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    os.rename(run_dir, aside)
    return Start(None, [*notes, f"starting anew; the older run was moved to {aside}"], aside)
