"""Reduce gradients in a different dtype from their own: ``reduce_dtype``.

Micro batches are added in the gradients' own precision. With ``bf16``, each rank rounds its sum once, the communication
library adds the ranks' sums in bfloat16, and the result is widened again. This halves the bytes of float32 and keeps
about two decimal digits of the sum, fewer with many ranks. With HSDP, only the reduction within a copy of the model is
rounded; the sum over copies uses the gradients' own precision. Conversely, bfloat16 gradients (``bf16-true``) are
reduced in float32 unless ``reduce_dtype`` is ``bf16``.
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
    """Make DDP average its bfloat16 buckets in float32 and round once."""

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        buffer = bucket.buffer()
        wide = buffer.float().div_(dist.get_world_size())
        work = dist.all_reduce(wide, async_op=True)
        return work.get_future().then(lambda _: buffer.copy_(wide))

    model.register_comm_hook(None, hook)


def install_narrow_hook(model: DistributedDataParallel) -> None:
    """Make DDP average its buckets in bfloat16."""

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        buffer = bucket.buffer()
        narrow = (buffer / dist.get_world_size()).to(_NARROW)
        work = dist.all_reduce(narrow, async_op=True)
        return work.get_future().then(lambda _: buffer.copy_(narrow))

    model.register_comm_hook(None, hook)


class NarrowReduceScatter(ReduceScatter):
    """Custom FSDP2 reduce-scatter in bfloat16, with input and output in the gradients' own dtype."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a buffer for FSDP2's copies."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Reduce; FSDP2 calls this in the last micro batch's backward pass, in the same order on a group's ranks."""
        narrow = torch.empty_like(output_tensor, dtype=_NARROW)
        reduce_scatter_single(narrow, input_tensor.to(_NARROW), op=op, group=group)
        output_tensor.copy_(narrow)
