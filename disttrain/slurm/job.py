"""Describe a job for SLURM and check it before it is queued. Pure decisions over frozen dataclasses.

Both styles start the same ranks: ``srun`` starts one task per rank; ``torchrun`` starts one task per node, whose
torchrun starts that node's ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from disttrain.errors import ConfigError
from disttrain.parallel.config import BatchPlan, ParallelConfig
from disttrain.system.durations import parse_duration

Style = Literal["srun", "torchrun"]
STYLES: Final[tuple[Style, ...]] = ("srun", "torchrun")
_ARRAY: Final = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_SLURM_TIME: Final = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class Job:
    """A job of several nodes with the same number of ranks each.

    Attributes:
        name: the job's name.
        nodes: number of nodes.
        gpus_per_node: GPUs per node, with one rank each; 0 on a cluster without GPUs.
        tasks_per_node: ranks per node if there are no GPUs; otherwise None or the number of GPUs.
        style: what starts the ranks of a node.
        time: limit, in SLURM's notation (``1-00:00:00``) or disttrain's (``23h50m``); None for the partition's.
        partition: where to run; None for the site's or the cluster's default.
        array: indices of a job array, such as ``0-3`` or ``0-9%2``.
        requeue: whether the job resumes by itself after a preemption, the time limit, or a node failure.
        max_requeues: how often it does.
        signal_seconds: how long before the time limit the ranks are signalled.
    """

    name: str
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int | None = None
    style: Style = "srun"
    time: str | None = None
    partition: str | None = None
    array: str | None = None
    requeue: bool = False
    max_requeues: int = 50
    signal_seconds: int = 120

    def __post_init__(self) -> None:
        for name, value, least in (
            ("nodes", self.nodes, 1),
            ("gpus-per-node", self.gpus_per_node, 0),
            ("tasks-per-node", self.tasks_per_node, 1),
            ("max-requeues", self.max_requeues, 1),
            ("signal-seconds", self.signal_seconds, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"--{name} is {value}", hint=f"use at least {least}")
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ConfigError(
                f"--tasks-per-node is {self.tasks_per_node} and --gpus-per-node is {self.gpus_per_node},"
                " but each rank uses exactly one GPU",
                hint="omit --tasks-per-node, or --gpus-per-node on a cluster without GPUs",
            )
        if not self.gpus_per_node and self.tasks_per_node is None:
            raise ConfigError(
                "the number of ranks per node is not set",
                hint="give --gpus-per-node K, or --tasks-per-node K on a cluster without GPUs",
            )
        if self.style not in STYLES:
            raise ConfigError(f"--style is {self.style!r}", hint=f"use {' or '.join(STYLES)}")
        if self.array is not None and not _ARRAY.fullmatch(self.array):
            raise ConfigError(f"--array is {self.array!r}", hint="write indices such as 0-3, 1,5,7 or 0-9%2")
        limit = self.limit_seconds
        if self.requeue and limit is not None and limit <= self.signal_seconds:
            raise ConfigError(
                f"--time is {limit} s, so a signal {self.signal_seconds} s before its end would stop the ranks at once",
                hint="raise --time, or lower --signal-seconds",
            )

    @property
    def ranks_per_node(self) -> int:
        """Ranks per node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def num_ranks(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_per_node

    @property
    def limit_seconds(self) -> int | None:
        """The time limit in seconds; None for the partition's.

        Raises:
            ConfigError: it cannot be parsed.
        """
        return None if self.time is None else _seconds(self.time)

    @property
    def first_index(self) -> int | None:
        """The first index of an array; None without an array."""
        return None if self.array is None else self._ranges[0][0]

    def has_index(self, index: int) -> bool:
        """Return whether the array has an index."""
        return any(index in one for one in self._ranges)

    @property
    def _ranges(self) -> list[range]:
        found = []
        for part in (self.array or "").partition("%")[0].split(","):
            first, last, step = re.fullmatch(r"(\d*)(?:-(\d+))?(?::(\d+))?", part).groups()  # type: ignore[union-attr]
            if first:
                found.append(range(int(first), int(last or first) + 1, int(step or 1) or 1))
        return found

    def without(self, indices: Sequence[int]) -> str:
        """Return the array in SLURM's notation without some of its indices; empty if none is left."""
        left = sorted({index for one in self._ranges for index in one} - set(indices))
        spans: list[list[int]] = []
        for index in left:
            if spans and spans[-1][-1] == index - 1:
                spans[-1] = [spans[-1][0], index]
            else:
                spans.append([index])
        return ",".join("-".join(map(str, span)) for span in spans)


def slurm_time(seconds: int) -> str:
    """Format a duration in SLURM's notation, ``D-HH:MM:SS``."""
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    clock = f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def check_ranks(
    job: Job, parallel: ParallelConfig, global_batch_size: int, micro_batch_size: int | Literal["auto"]
) -> str:
    """Check that a configuration can be trained on the ranks of a job.

    Returns:
        A description of the layout.

    Raises:
        ConfigError: the ranks do not fit the degrees or the global batch; the message lists what does.
    """
    ranks = job.num_ranks
    here = f"{job.nodes} node{'s' * (job.nodes > 1)} x {job.ranks_per_node} rank{'s' * (job.ranks_per_node > 1)}"
    try:
        degrees = parallel.degrees(ranks)
        size = 1 if micro_batch_size == "auto" else micro_batch_size
        plan = BatchPlan(global_batch_size, size, degrees.data)
    except ConfigError as error:
        raise ConfigError(
            f"the configuration does not fit {here}: {error.what}", hint=f"{error.hint}; or change --nodes"
        ) from None
    if micro_batch_size == "auto":
        return f"{here}, {plan.rank_batch_size} samples per rank and step"
    return f"{here}, {plan.accumulation} x {micro_batch_size} samples per rank and step"


def _seconds(text: str) -> int:
    if re.search("[dhms]", text):
        seconds = math.ceil(parse_duration(text, "--time"))
    else:
        match = _SLURM_TIME.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"--time is {text!r}", hint="write 3h50m, or in SLURM's notation: MM, HH:MM:SS or D-HH:MM:SS"
            )
        days, *parts = (None if part is None else int(part) for part in match.groups())
        first, second, third = parts[0] or 0, parts[1], parts[2]
        if days is not None:  # D-HH[:MM[:SS]]
            seconds = days * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
        elif third is not None:  # HH:MM:SS
            seconds = first * 3600 + (second or 0) * 60 + third
        else:  # MM[:SS]
            seconds = first * 60 + (second or 0)
    if seconds <= 0:
        raise ConfigError(f"--time is {text!r}, which is not positive", hint="use a positive duration, such as 3h50m")
    return seconds
