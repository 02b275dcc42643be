"""Requeue the current job: after a run was signalled and has saved, ask SLURM to queue its job again.

One rank asks while all ranks are alive, because SLURM does not requeue a job that has ended, even successfully. A
cancelled job stays cancelled, and a process that was replaced by a newer attempt of the same job does nothing. If
``scontrol`` is missing (as in a container) or SLURM does not answer for a minute, a note in the run folder makes the
job's script requeue it from outside; the script retries for some minutes. A run that hangs leaves the note too.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from disttrain.system.files import write_atomically

VARIABLE: Final = "DISTTRAIN_REQUEUE"
NOTE: Final = "requeue"
_TIMEOUT_SECONDS: Final = 20
_PAUSES: Final = (2.0, 5.0)
"""Seconds between attempts to query SLURM about the job; the ranks wait meanwhile."""


def job_of(environ: Mapping[str, str] | None = None) -> dict[str, str | int]:
    """Return the SLURM job of this process, for the run record; empty outside a job."""
    env = os.environ if environ is None else environ
    if not env.get("SLURM_JOB_ID"):
        return {}
    nodes = env.get("SLURM_JOB_NODELIST", env.get("SLURM_NODELIST", ""))
    return {"slurm_job": _number(env), "slurm_restart": _restarts(env), "nodes": nodes}


def is_to_be_requeued(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether the job's script wants it to be requeued after a stop."""
    env = os.environ if environ is None else environ
    return bool(env.get("SLURM_JOB_ID")) and _limit(env) > 0


def ask_to_requeue(run_dir: Path, environ: Mapping[str, str] | None = None) -> str:
    """Ask SLURM to requeue this job. Rank 0 only, after saving; SLURM may end this process immediately.

    Returns:
        A message that describes what was done.
    """
    env = os.environ if environ is None else environ
    job, restarts = _number(env), _restarts(env)
    if said := _leave_note(run_dir, env):
        return said
    try:
        shown = _shown(job)
    except FileNotFoundError:
        return f"scontrol is not installed here: the script of job {job} will requeue it"
    except (OSError, subprocess.SubprocessError) as error:
        return f"the script of job {job} will requeue it: scontrol failed: {_said(error)}"
    about = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    if about.get("JobState") != "RUNNING":
        return f"job {job} is not requeued: it is {about.get('JobState', 'gone')}"
    if about.get("Restarts") != str(restarts):
        return f"job {job} is not requeued: it was restarted without this process"
    try:
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        # scontrol itself may die by a signal here, because SLURM ends the job at once.
        if not isinstance(error, subprocess.CalledProcessError) or error.returncode >= 0:
            return f"the script of job {job} will requeue it: scontrol failed: {_said(error)}"
    return f"job {job} is requeued and will resume by itself"


def have_script_requeue(run_dir: Path, environ: Mapping[str, str] | None = None) -> str:
    """Have the job's script requeue it once all ranks have ended. One rank only; return a message for the log."""
    env = os.environ if environ is None else environ
    return _leave_note(run_dir, env) or f"the script of job {_number(env)} will requeue it"


def _leave_note(run_dir: Path, env: Mapping[str, str]) -> str:
    """Leave a note for the script; return the reason if there must or can be none."""
    job, restarts = _number(env), _restarts(env)
    if restarts >= _limit(env):
        return f"job {job} is not requeued: it has been requeued {restarts} times, the limit"
    try:
        write_atomically(run_dir / NOTE, f"{job} {restarts}\n")
    except OSError as error:
        return f"job {job} is not requeued: {run_dir / NOTE} cannot be written: {error.strerror}"
    return ""


def is_restarted_by_slurm(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether SLURM has restarted this job."""
    return _restarts(os.environ if environ is None else environ) > 0


def _restarts(env: Mapping[str, str]) -> int:
    text = env.get("SLURM_RESTART_COUNT", "0")
    return int(text) if text.isdigit() else 0


def _number(env: Mapping[str, str]) -> str:
    """Return the job's number; in an array with the index, since the last task's number means the whole array."""
    array, index = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else env.get("SLURM_JOB_ID", "")


def _limit(env: Mapping[str, str]) -> int:
    text = env.get(VARIABLE, "0")
    return int(text) if text.isdigit() else 0


def _shown(job: str) -> str:
    """Query SLURM about a job, with retries.

    Raises:
        OSError: scontrol is missing or cannot be run.
        subprocess.SubprocessError: SLURM does not answer, or does not know the job.
    """
    for pause in _PAUSES:
        try:
            return _scontrol("-o", "show", "job", job)
        except subprocess.SubprocessError as error:
            if "Invalid job id" in _said(error):
                raise
        time.sleep(pause)
    return _scontrol("-o", "show", "job", job)


def _scontrol(*arguments: str) -> str:
    done = subprocess.run(
        ["scontrol", *arguments],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=True,
        start_new_session=True,  # shields it from signals to this rank's process group
    )
    return done.stdout


def _said(error: Exception) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return " ".join(str(text).split()) or "no output"
