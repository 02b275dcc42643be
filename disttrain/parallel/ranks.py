"""Data-parallel ranks: which part of the data a rank takes.

Ranks that share the work of each layer (tensor parallelism) see the same samples. So they count as one when a global
batch is divided, micro batches are numbered and samples are counted. Otherwise each rank counts separately.
"""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
import torch.distributed as dist

from disttrain.distributed.synchronize_errors import new_group
from disttrain.parallel.config import Degrees


@dataclass(frozen=True)
class DataRanks:
    """A rank's position among the data-parallel ranks.

    Attributes:
        rank: index of the part this rank takes.
        size: number of parts.
        leads: whether this rank represents its part, if several ranks take the same one.
        group: one rank of each part, including this rank; None means all ranks.
    """

    rank: int
    size: int
    leads: bool = True
    group: dist.ProcessGroup | None = None


def data_ranks(trainer: pl.Trainer) -> DataRanks:
    """Return this rank's position from the trainer's strategy; with a foreign strategy, every rank has its own part."""
    own = getattr(trainer.strategy, "data_ranks", None)
    return own if isinstance(own, DataRanks) else DataRanks(trainer.global_rank, trainer.world_size)


def divide_ranks(degrees: Degrees, rank: int) -> DataRanks:
    """Return a rank's position on a mesh whose innermost axis is the tensor axis. Collective if ``tensor > 1``."""
    tensor = degrees.tensor
    if tensor == 1:
        return DataRanks(rank, degrees.data)
    every_part = [[part * tensor + place for part in range(degrees.data)] for place in range(tensor)]
    groups = [new_group(part) for part in every_part]  # new_group() requires every rank to create every group
    return DataRanks(rank // tensor, degrees.data, leads=rank % tensor == 0, group=groups[rank % tensor])
