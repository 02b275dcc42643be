"""The commands of a SLURM cluster: what they say, in values, and what they refuse, in messages.

Each call starts one process of SLURM's and waits for it; nothing is cached and nothing is retried.
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
    """A command of SLURM that failed."""


@dataclass(frozen=True)
class Queued:
    """A job as the queue shows it.

    Attributes:
        job: its number; ``N_INDEX`` in an array.
        state: such as ``RUNNING``.
        reason: why it waits, or where it runs.
        left: time left of its limit.
    """

    job: str
    state: str
    reason: str = ""
    left: str = ""


def has(command: str) -> bool:
    """Whether a command is there."""
    return shutil.which(command) is not None


def call(arguments: Sequence[str]) -> str:
    """What a command prints.

    Raises:
        SlurmError: it is missing, failed, or did not answer; the message quotes it.
    """
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise SlurmError(
            f"there is no command {arguments[0]} here", mend="run on a machine of the cluster, or use --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{arguments[0]} did not answer within {_TIMEOUT_SECONDS} s") from None
    if done.returncode:
        raise SlurmError(f"{arguments[0]} failed: {_words(done.stderr or done.stdout)}")
    # `sbatch --test-only` says where and when on standard error.
    return done.stdout or done.stderr


def check_partition(partition: str) -> None:
    """Whether the cluster has a partition.

    Raises:
        ConfigError: it has not; the message names the nearest.
    """
    known = sorted({line.strip() for line in call(["sinfo", "--noheader", "--format=%R"]).splitlines() if line})
    if missing := [name for name in partition.split(",") if name not in known]:
        raise ConfigError(
            f"the cluster has no partition {missing[0]!r}", mend=f"correct --partition; {nearest(missing[0], known)}"
        )


def check_script(script: Path) -> str:
    """Let SLURM look at a script without queueing it; what it says, such as when the job could start.

    Raises:
        ConfigError: SLURM would refuse it.
    """
    try:
        return _words(call(["sbatch", "--test-only", str(script)]))
    except SlurmError as error:
        reason = error.what.removeprefix("sbatch failed: ")
        mend = "ask for what the cluster has: `sinfo --Node --long` shows its nodes, `sinfo` the limits"
        raise ConfigError(f"SLURM refuses this job: {reason}", mend=error.mend or mend) from None


def submit(script: Path) -> str:
    """Queue a script; the job's number.

    Raises:
        SlurmError: SLURM refuses it.
    """
    return call(["sbatch", "--parsable", str(script)]).strip().split(";")[0]


def queue(jobs: Sequence[str] = ()) -> list[Queued]:
    """The user's jobs that wait, run, or ended a little while ago; or those of these numbers.

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
    """Jobs that have left the queue, from the cluster's accounting; none where it keeps no accounts."""
    if not jobs or not has("sacct"):
        return []
    try:
        text = call(["sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(jobs)])
    except SlurmError:
        return []
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 1]
    return [Queued(job, state.split()[0]) for job, state in rows if state]


def _words(text: str) -> str:
    """What a command said, on one line and without its name."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    names = ("sbatch: ", "squeue: ", "scontrol: ", "sinfo: ", "error: ")
    for name in names:
        lines = [line.removeprefix(name) for line in lines]
    return "; ".join(lines) or "it said nothing"
