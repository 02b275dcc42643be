"""Which part of the data a rank takes.

Ranks that share the work of each layer (tensor parallelism) see the same samples, so they are one where a global
batch is cut, where micro batches are numbered and where samples are counted. Every other rank stands for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
import torch.distributed as dist

from disttrain.parallel.agree import new_group
from disttrain.parallel.config import Degrees


@dataclass(frozen=True)
class DataRanks:
    """A rank's place among those that divide the data.

    Attributes:
        rank: number of the part that this rank takes.
        size: parts.
        leads: whether this rank speaks for its part, where several take the same one.
        group: one rank of each part, this rank among them; None stands for all ranks.
    """

    rank: int
    size: int
    leads: bool = True
    group: dist.ProcessGroup | None = None


def data_ranks(trainer: pl.Trainer) -> DataRanks:
    """This rank's place, as the trainer's strategy says; with a strategy of another library, every rank has its own."""
    own = getattr(trainer.strategy, "data_ranks", None)
    return own if isinstance(own, DataRanks) else DataRanks(trainer.global_rank, trainer.world_size)


def divide_ranks(degrees: Degrees, rank: int) -> DataRanks:
    """A rank's place on a mesh whose innermost axis is the tensor axis. A collective where that is longer than one."""
    tensor = degrees.tensor
    if tensor == 1:
        return DataRanks(rank, degrees.data)
    every_part = [[part * tensor + place for part in range(degrees.data)] for place in range(tensor)]
    groups = [new_group(part) for part in every_part]  # every rank makes all of them
    return DataRanks(rank // tensor, degrees.data, leads=rank % tensor == 0, group=groups[rank % tensor])
