"""Save what was submitted in the run folder: script, configuration, and the state of the code.

``submit/`` in a run folder holds ``job.sbatch``, ``config.yaml``, ``git.json`` (commit, branch, changed files),
``changes.diff`` if the working folder had any, and ``job.json``. The job trains with this configuration. The code is
not copied; the record shows later whether it was still the same.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from disttrain.errors import ConfigError
from disttrain.slurm.job import Job
from disttrain.slurm.render import SUBMIT, Script
from disttrain.system.files import make_folder, write_atomically
from disttrain.system.reading import as_text, conform, read_record
from disttrain.system.terminal import redacted

SCRIPT: Final = "job.sbatch"
JOB: Final = "job.json"
_TIMEOUT_SECONDS: Final = 30


def git_state(folder: Path) -> tuple[dict[str, Any], str]:
    """Return commit, branch and changed files of a working folder, and the diff; empty outside a repository."""
    commit = _git(folder, "rev-parse", "HEAD").strip()
    if not commit:
        return {}, ""
    state = {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD").strip(),
        "changed": _git(folder, "status", "--porcelain").splitlines(),
    }
    return state, _git(folder, "diff", "HEAD")


def write_snapshot(script: Script, *, config: str, text: str, arguments: list[str]) -> Path:
    """Save what is being submitted; return the script's path.

    Raises:
        ConfigError: the run folder cannot be written.
    """
    folder = script.run_dir / SUBMIT
    state, changes = git_state(script.folder)
    try:
        make_folder(folder)
        # URLs may contain passwords: the job needs them in these files, but records for readers are redacted.
        write_atomically(script.config, config, mode=0o600)
        write_atomically(folder / SCRIPT, text, mode=0o600)
        told = {**state, "submitted_with": [redacted(word) for word in arguments]}
        write_atomically(folder / "git.json", json.dumps(told, indent=2) + "\n")
        (folder / "changes.diff").unlink(missing_ok=True)
        if changes:
            write_atomically(folder / "changes.diff", changes, mode=0o600)
    except OSError as error:
        raise ConfigError(
            f"run folder {script.run_dir} cannot be written: {error.strerror}",
            hint="set trainer.run_dir to a writable folder: --set trainer.run_dir=FOLDER",
        ) from None
    return folder / SCRIPT


def write_job(script: Script, job: Job, number: str) -> None:
    """Record the job number that SLURM assigned."""
    content = {"job": number, "submitted": time.time(), "output": script.output_of(job), **asdict(job)}
    write_atomically(script.run_dir / SUBMIT / JOB, json.dumps(content, indent=2) + "\n")


def read_job(run_dir: Path) -> dict[str, Any]:
    """Return the record of a run's submission; empty if there is none."""
    return conform(read_record(run_dir / SUBMIT / JOB), {"job": as_text, "array": as_text, "output": as_text})


def _git(folder: Path, *arguments: str) -> str:
    git = shutil.which("git")
    if git is None:
        return ""
    try:
        done = subprocess.run(
            [git, *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
