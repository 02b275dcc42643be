"""Gradients that travel between ranks in another type than their own: ``reduce_dtype``.

Micro batches are added in the gradients' own precision; each rank rounds its sum once, the ranks' sums are added in
bfloat16 by the communication library, and the result is widened again. Half the bytes of float32; about two decimal
digits of the sum over the ranks, fewer with many ranks. Copies of a sharded model (HSDP) round within a copy alone;
the sum over copies is taken in the gradients' own precision. The other way round, gradients that are bfloat16
(``bf16-true``) are added over the ranks in float32 unless ``reduce_dtype`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.nn.parallel import DistributedDataParallel

from disttrain.distributed.collectives import reduce_scatter_single

_NARROW: Final = torch.bfloat16


def install_wide_hook(model: DistributedDataParallel) -> None:
    """Let DDP average its bfloat16 buckets in float32, and round once."""

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        buffer = bucket.buffer()
        wide = buffer.float().div_(dist.get_world_size())
        work = dist.all_reduce(wide, async_op=True)
        return work.get_future().then(lambda _: buffer.copy_(wide))

    model.register_comm_hook(None, hook)


def install_narrow_hook(model: DistributedDataParallel) -> None:
    """Let DDP average its buckets in bfloat16."""

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        buffer = bucket.buffer()
        narrow = (buffer / dist.get_world_size()).to(_NARROW)
        work = dist.all_reduce(narrow, async_op=True)
        return work.get_future().then(lambda _: buffer.copy_(narrow))

    model.register_comm_hook(None, hook)


class NarrowReduceScatter(ReduceScatter):
    """FSDP2's reduce-scatter in bfloat16, between buffers of the gradients' own type."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for FSDP2's copies."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Called by FSDP2 in the backward pass of the last micro batch, by the ranks of a group in one order."""
        narrow = torch.empty_like(output_tensor, dtype=_NARROW)
        reduce_scatter_single(narrow, input_tensor.to(_NARROW), op=op, group=group)
        output_tensor.copy_(narrow)
