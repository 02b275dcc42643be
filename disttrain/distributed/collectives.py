"""Collectives whose names differ between supported PyTorch versions."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def all_gather_single(
    output: Tensor, own: Tensor, *, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    """Gather one tensor per rank into one, in rank order. Collective over the group (default: all ranks)."""
    # PyTorch 2.13 deprecates the older name with a warning.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(output, own, group=group, async_op=async_op)
    return work


def reduce_scatter_single(output: Tensor, parts: Tensor, *, op: Any, group: dist.ProcessGroup) -> None:
    """Reduce one tensor per rank, and leave each rank its part of the result. Collective over the group."""
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce(output, parts, op=op, group=group)
