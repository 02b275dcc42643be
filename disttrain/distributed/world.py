"""This process's rank and the world size, from the launcher's environment variables.

Only this module deals with launchers (torchrun, SLURM's ``srun`` with one task per rank, or none); everything else uses
:class:`World`. If two launchers have set variables, or an older one has left some behind, contradictions are rejected
with a message that quotes both. Costs a few dictionary lookups; imports neither torch nor Lightning.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from disttrain.errors import ConfigError

_BY_HAND: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MPI: Final = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),  # MVAPICH
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
)


@dataclass(frozen=True)
class World:
    """Rank and sizes of a run.

    Attributes:
        rank: global rank, ``0 <= rank < size``.
        size: number of processes in the run.
        local_rank: rank within this node.
        local_size: number of processes on this node.
        launcher: ``"torchrun"`` (also if its variables were set by hand), ``"slurm"`` or ``"alone"``.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "alone"

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            raise ConfigError(
                f"the {self.launcher} environment is contradictory: rank {self.rank} of {self.size},"
                f" local rank {self.local_rank} of {self.local_size}",
                hint="launch with torchrun, or unset the stale RANK, WORLD_SIZE, LOCAL_RANK variables",
            )

    @property
    def num_nodes(self) -> int:
        """Number of nodes, assuming that all have as many ranks as this one."""
        if self.size % self.local_size:
            raise ConfigError(
                f"{self.size} ranks cannot be spread evenly over nodes of {self.local_size} ranks",
                hint="start the same number of ranks on every node",
            )
        return self.size // self.local_size

    @property
    def node(self) -> int:
        """Index of this node; its ranks are consecutive."""
        return self.rank // self.local_size

    def check_devices(self, num_devices: int) -> None:
        """Raise if this node has more ranks than GPUs; local rank *i* uses GPU *i*.

        Args:
            num_devices: number of GPUs this process sees.

        Raises:
            ConfigError: there are too few.
        """
        if num_devices >= self.local_size:
            return
        what = f"this node has {self.local_size} ranks, but PyTorch sees {_count(num_devices, 'GPU')}"
        if self.launcher == "slurm" and num_devices == 1:
            raise ConfigError(
                f"{what}: SLURM gives each task its own GPU",
                hint="request GPUs per node, not per task (--gpus-per-node=N, no --gpus-per-task), and give srun"
                " --gpu-bind=none: local rank i uses GPU i of the node",
            )
        raise ConfigError(
            what,
            hint="start at most one rank per GPU, or correct CUDA_VISIBLE_DEVICES; to use none:"
            " trainer.accelerator cpu",
        )


def detect_world(environ: Mapping[str, str] | None = None) -> World:
    """Return the world that the launcher's environment variables describe.

    Raises:
        ConfigError: a variable is not a number, the numbers are contradictory, SLURM distributes the tasks unevenly or
            cyclically, mpirun started several processes, or the variables of two launchers conflict.
    """
    env = os.environ if environ is None else environ
    step = _slurm_step(env)
    if "TORCHELASTIC_RUN_ID" in env or all(name in env for name in _BY_HAND):
        names = dict(zip(("rank", "size", "local_rank"), _BY_HAND, strict=True))
        local_size = _number(env, "LOCAL_WORLD_SIZE", default=_number(env, "WORLD_SIZE"))
        values = {field: _number(env, name) for field, name in names.items()}
        world = World(**values, local_size=local_size, launcher="torchrun")
        if step is not None:
            _check_mixture(env, world, step)
        return world
    if step is None:
        _check_mpi(env)
        return World()
    return step


def _check_mpi(env: Mapping[str, str]) -> None:
    """Reject several processes started by mpirun: each would be a separate run in the same folder."""
    for size_name, rank_name, local_name in _MPI:
        size = env.get(size_name, "")
        if size.isdigit() and int(size) > 1:
            rank = env.get(rank_name, "?")
            raise ConfigError(
                f"mpirun started this process as rank {rank} of {size} ({size_name}), but disttrain does not join ranks"
                " through MPI: each would be a separate run of one rank in the same folder",
                hint="start the ranks with `disttrain launch`, torchrun or srun; or have each export"
                f" RANK=${rank_name} WORLD_SIZE=${size_name} LOCAL_RANK=${local_name} LOCAL_WORLD_SIZE, MASTER_ADDR"
                f" and MASTER_PORT; or, if mpirun is not used, unset {size_name}",
            )


def _slurm_step(env: Mapping[str, str]) -> World | None:
    """Return the world of the tasks of one ``srun``, if it started this process and several tasks."""
    # `salloc` and `sbatch` set SLURM_NTASKS too; only a task started by srun has SLURM_PROCID and a step id.
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env:
        return None
    # A step may be smaller than its job.
    size = _number(env, "SLURM_STEP_NUM_TASKS", default=_number(env, "SLURM_NTASKS", default=1))
    if size == 1:
        return None
    nodes = _number(env, "SLURM_STEP_NUM_NODES", default=_number(env, "SLURM_NNODES", default=1))
    spread = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", ""))
    counts = {int(count) for count in re.findall(r"(?:^|,)(\d+)", spread)}  # as in 2(x3),1
    if len(counts) > 1 or (nodes < size and size % nodes):
        raise ConfigError(
            f"srun spreads {size} tasks unevenly over {nodes} nodes ({spread or 'not the same number on each'})",
            hint="give --nodes=N --ntasks-per-node=K, and no conflicting --ntasks",
        )
    rank, local_rank = _number(env, "SLURM_PROCID"), _number(env, "SLURM_LOCALID")
    world = World(rank, size, local_rank, size // nodes, launcher="slurm")
    dealt = env.get("SLURM_DISTRIBUTION", "").partition(":")[0] in ("cyclic", "plane", "arbitrary")
    if 1 < nodes < size and (dealt or rank % world.local_size != local_rank):
        raise ConfigError(
            f"srun gave task {rank} position {local_rank} on its node: tasks are distributed to the nodes in turn",
            hint="give srun --distribution=block: the ranks of a node must be consecutive",
        )
    return world


def _check_mixture(env: Mapping[str, str], world: World, step: World) -> None:
    """Reject torchrun variables that conflict with those of the surrounding srun."""
    if "TORCHELASTIC_RUN_ID" not in env:
        if (world.rank, world.size, world.local_rank) == (step.rank, step.size, step.local_rank):
            return  # a script that derives them from SLURM's
        raise ConfigError(
            f"srun started this process as task {step.rank} of {step.size}, but RANK, WORLD_SIZE and LOCAL_RANK say"
            f" rank {world.rank} of {world.size}, local rank {world.local_rank}",
            hint="unset RANK WORLD_SIZE LOCAL_RANK before srun: they are left over from another launcher or a script",
        )
    if step.local_size > 1:
        raise ConfigError(
            f"torchrun runs inside srun with {step.local_size} tasks per node: each of them started its own ranks,"
            f" and this is rank {world.rank} of {world.size} in task {step.rank} of {step.size}",
            hint="give srun --ntasks-per-node=1 if torchrun starts the ranks, or drop torchrun and let srun start"
            " one task per rank; if torchrun is not used, unset its TORCHELASTIC_RUN_ID, RANK, ... before srun",
        )
    # --standalone uses a random UUID as run id. A restarted elastic job may legitimately be down to one node.
    own_name = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", env["TORCHELASTIC_RUN_ID"]) is not None
    first = _number(env, "TORCHELASTIC_RESTART_COUNT", default=0) == 0
    if own_name and first and _number(env, "GROUP_WORLD_SIZE", default=2) == 1:
        raise ConfigError(
            f"srun started torchrun on {step.size} nodes, but each torchrun uses only its own node:"
            f" {step.size} separate runs of {_count(world.size, 'rank')}",
            hint=f"give torchrun --nnodes {step.size}, --rdzv-backend c10d and --rdzv-endpoint with the first node's"
            " name, not --standalone",
        )


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(str(text))
    except ValueError:
        raise ConfigError(
            f"environment variable {name} is {text!r}, not a number",
            hint=f"unset {name} or launch with torchrun",
        ) from None
