"""Who this process is among its peers, read from the environment that the launcher set.

One place knows the launchers (torchrun, SLURM's ``srun`` with a task a rank, or none); everything else asks
for a :class:`World`. Reading it costs a few dictionary look-ups and imports neither torch nor lightning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from disttrain.errors import ConfigError


@dataclass(frozen=True)
class World:
    """Rank and sizes of a run.

    Attributes:
        rank: this process among all, ``0 <= rank < size``.
        size: number of processes in the run.
        local_rank: this process among those of its node.
        local_size: number of processes on this node.
        launcher: ``"torchrun"``, ``"slurm"`` or ``"alone"``.
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
                mend="launch with torchrun, or unset the stale RANK, WORLD_SIZE, LOCAL_RANK variables",
            )

    @property
    def num_nodes(self) -> int:
        """Number of nodes, all with as many ranks as this one."""
        if self.size % self.local_size:
            raise ConfigError(
                f"{self.size} ranks cannot be spread evenly over nodes of {self.local_size} ranks",
                mend="start the same number of ranks on every node",
            )
        return self.size // self.local_size


def detect_world(environ: Mapping[str, str] | None = None) -> World:
    """The world that the launcher's environment variables describe.

    Raises:
        ConfigError: a variable that is set holds no number, or the numbers contradict each other.
    """
    env = os.environ if environ is None else environ
    if "TORCHELASTIC_RUN_ID" in env or ("RANK" in env and "WORLD_SIZE" in env and "LOCAL_RANK" in env):
        names = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
        local_size = _number(env, "LOCAL_WORLD_SIZE", default=_number(env, "WORLD_SIZE"))
        values = {field: _number(env, name) for field, name in names.items()}
        return World(**values, local_size=local_size, launcher="torchrun")
    # `salloc` and `sbatch` set SLURM_NTASKS too; only a task that srun started has a SLURM_PROCID and a step.
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and _number(env, "SLURM_NTASKS", default=1) > 1:
        size = _number(env, "SLURM_NTASKS")
        nodes = _number(env, "SLURM_NNODES", default=1)
        return World(
            rank=_number(env, "SLURM_PROCID"),
            size=size,
            local_rank=_number(env, "SLURM_LOCALID"),
            local_size=size // nodes,
            launcher="slurm",
        )
    return World()


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(str(text))
    except ValueError:
        raise ConfigError(
            f"environment variable {name} is {text!r}, not a number",
            mend=f"unset {name} or launch with torchrun",
        ) from None
