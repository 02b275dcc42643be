"""Run SLURM commands: parse their output into values and turn their failures into errors.

Each call starts one SLURM process and waits for it; nothing is cached or retried.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from disttrain.errors import ConfigError, DisttrainError, nearest

_TIMEOUT_SECONDS = 60


class SlurmError(DisttrainError):
    """A SLURM command failed."""


@dataclass(frozen=True)
class Queued:
    """A job, as listed by the queue.

    Attributes:
        job: its number; ``N_INDEX`` in an array.
        state: such as ``RUNNING``.
        reason: why it is pending, or where it runs.
        left: time left of its limit.
    """

    job: str
    state: str
    reason: str = ""
    left: str = ""


def has(command: str) -> bool:
    """Return whether a command is available."""
    return shutil.which(command) is not None


def call(arguments: Sequence[str]) -> str:
    """Run a command and return its output.

    Raises:
        SlurmError: it is missing, failed, or timed out; the message quotes it.
    """
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise SlurmError(
            f"{arguments[0]} is not installed here", hint="run on a machine of the cluster, or use --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{arguments[0]} did not answer within {_TIMEOUT_SECONDS} s") from None
    if done.returncode:
        raise SlurmError(f"{arguments[0]} failed: {_words(done.stderr or done.stdout)}")
    # `sbatch --test-only` prints its result to stderr.
    return done.stdout or done.stderr


def check_partition(partition: str) -> None:
    """Check that the cluster has a partition.

    Raises:
        ConfigError: it does not exist; the message suggests the nearest name.
    """
    known = sorted({line.strip() for line in call(["sinfo", "--noheader", "--format=%R"]).splitlines() if line})
    if missing := [name for name in partition.split(",") if name not in known]:
        raise ConfigError(
            f"the cluster has no partition {missing[0]!r}", hint=f"correct --partition; {nearest(missing[0], known)}"
        )


def check_script(script: Path) -> str:
    """Have SLURM test a script without queueing it; return its message, such as when the job could start.

    Raises:
        ConfigError: SLURM would reject it.
    """
    try:
        return _words(call(["sbatch", "--test-only", str(script)]))
    except SlurmError as error:
        reason = error.what.removeprefix("sbatch failed: ")
        hint = "request what the cluster has: `sinfo --Node --long` lists its nodes, `sinfo` the limits"
        raise ConfigError(f"SLURM refuses this job: {reason}", hint=error.hint or hint) from None


def submit(script: Path) -> str:
    """Queue a script; return the job's number.

    Raises:
        SlurmError: SLURM rejects it.
    """
    return call(["sbatch", "--parsable", str(script)]).strip().split(";")[0]


def queue(jobs: Sequence[str] = ()) -> list[Queued]:
    """Return the user's pending, running and recently ended jobs, or those with the given numbers.

    Raises:
        SlurmError: the controller does not answer.
    """
    chosen = ["--jobs", ",".join(jobs)] if jobs else ["--me"]
    try:
        text = call(["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%R|%L", *chosen])
    except SlurmError as error:
        if jobs and "Invalid job id" in error.what:
            return []
        raise
    rows = [line.strip().split("|", 3) for line in text.splitlines() if line.count("|") >= 3]
    return [Queued(*row) for row in rows]


def ended(jobs: Sequence[str]) -> list[Queued]:
    """Return jobs that have left the queue, from the cluster's accounting; empty if it keeps none."""
    if not jobs or not has("sacct"):
        return []
    try:
        text = call(["sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(jobs)])
    except SlurmError:
        return []
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 1]
    return [Queued(job, state.split()[0]) for job, state in rows if state]


def _words(text: str) -> str:
    """Return a command's output on one line, without the command's name."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    names = ("sbatch: ", "squeue: ", "scontrol: ", "sinfo: ", "error: ")
    for name in names:
        lines = [line.removeprefix(name) for line in lines]
    return "; ".join(lines) or "no output"
