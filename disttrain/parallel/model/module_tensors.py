"""Broadcast a user module's tensors between ranks, whatever their dtype and layout.

gloo and NCCL support a dozen dtypes, and gloo sends the memory behind a view as if it were contiguous. Here every
tensor is sent as the bytes of a contiguous copy, many per broadcast, and written back through its own strides: exact
for every dtype. Tensors that no strategy can train are rejected by name. Cost: a copy of at most one bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from disttrain.distributed.synchronize_errors import is_distributed
from disttrain.errors import ConfigError
from disttrain.parallel.model.fsdp_internals import fsdp_modules, trained_parameters

_BUCKET_BYTES: Final = 32 * 2**20
_SENT_BY_DDP: Final = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
}
"""Dtypes that both gloo and NCCL can broadcast."""


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Broadcast rank 0's values. Collective over all ranks, which pass tensors of the same dtypes and shapes."""
    if is_distributed():
        for bucket in _buckets(tensors):
            _broadcast(bucket)


def check_types(module: nn.Module, *, sharded: bool) -> None:
    """Reject parameters that cannot be trained on several ranks, before PyTorch fails in the middle of a step.

    Args:
        module: the root module.
        sharded: whether FSDP is used.

    Raises:
        ConfigError: a trained parameter is complex, or a parameter's dtype or layout cannot be sharded.
    """
    for name, parameter in module.named_parameters():
        kind = str(parameter.dtype).removeprefix("torch.")
        if parameter.is_complex() and (sharded or parameter.requires_grad):
            raise ConfigError(
                f"parameter {name} is {kind}: its gradient cannot be summed over ranks, nor its norm taken",
                hint="keep it as a real tensor of shape (..., 2), and use torch.view_as_complex(...) in forward()",
            )
        if sharded and not parameter.is_floating_point():
            raise ConfigError(
                f"parameter {name} is {kind}, which FSDP cannot shard",
                hint="register it as a buffer, since it is not trained, or set parallel.strategy to ddp",
            )


def check_units(module: nn.Module) -> None:
    """Reject FSDP units that mix dtypes of trained parameters, since FSDP reduces a unit's gradients together.

    Raises:
        ConfigError: a unit mixes dtypes.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for unit in fsdp_modules(module):
        trained = [record.sharded_param for record in trained_parameters(unit)]
        other = next((each for each in trained if each.dtype != trained[0].dtype), None)
        if other is not None:
            one, two = (f"{names[id(each)]} ({str(each.dtype)[6:]})" for each in (trained[0], other))
            raise ConfigError(
                f"parameters {one} and {two} are in one FSDP unit, where all must have the same type",
                hint="convert one of them, define units in the model's shard_units(), or set parallel.strategy to ddp",
            )


def settle_layout(module: nn.Module, *, sharded: bool) -> None:
    """Make tensors contiguous in place if they otherwise cannot be filled or sharded.

    A buffer whose elements share memory (``expand``) cannot be written by a broadcast or a checkpoint. FSDP only shards
    contiguous parameters, so ``channels_last`` ones are converted.
    """
    made: dict[int, Tensor] = {}
    for inner in module.modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None and not isinstance(buffer, DTensor) and _overlaps(buffer):
                inner._buffers[name] = made.setdefault(id(buffer), buffer.contiguous())
    for parameter in module.parameters() if sharded else ():
        if not isinstance(parameter, DTensor) and not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def odd_names(module: nn.Module) -> list[str]:
    """Return the names of parameters and buffers that DDP cannot broadcast."""
    named = (*module.named_parameters(), *module.named_buffers())
    return [name for name, tensor in named if tensor.dtype not in _SENT_BY_DDP]


def leave_out_of_ddp(module: nn.Module, names: Sequence[str]) -> None:
    """Make DDP ignore some parameters and buffers (none of them trained); call before DDP is constructed."""
    ignored = [*getattr(module, "_ddp_params_and_buffers_to_ignore", ()), *names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)  # type: ignore[no-untyped-call]


def send_with_forward(model: DistributedDataParallel, names: Sequence[str]) -> None:
    """Broadcast what DDP ignores: everything now, and buffers whenever DDP broadcasts its own, before a forward."""
    held = dict((*model.module.named_parameters(), *model.module.named_buffers()))
    broadcast_tensors(held[name] for name in names)
    buffers = [name for name in names if not isinstance(held[name], nn.Parameter)]

    def send(ddp: nn.Module, arguments: object) -> None:
        if model.require_forward_param_sync and torch.is_grad_enabled():
            now = dict(model.module.named_buffers())  # a module may replace them
            broadcast_tensors(now[name] for name in buffers)

    if buffers:
        model.register_forward_pre_hook(send)


@torch.no_grad()
def _broadcast(bucket: list[Tensor]) -> None:
    sent = torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in bucket])
    dist.broadcast(sent, src=0)
    if dist.get_rank() == 0:
        return
    for tensor, part in zip(bucket, torch.split(sent, [_num_bytes(tensor) for tensor in bucket]), strict=True):
        # A part may start at any byte offset; viewing it as another dtype requires alignment, hence the clone.
        tensor.detach().copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield groups of tensors on one device, each as large as fits a bucket."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if isinstance(tensor, DTensor) or not tensor.numel():
            continue
        full = sum(map(_num_bytes, bucket)) + _num_bytes(tensor) > _BUCKET_BYTES
        if bucket and (full or bucket[0].device != tensor.device):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _overlaps(tensor: Tensor) -> bool:
    """Return whether two elements may share memory, judging by the strides."""
    if tensor.layout != torch.strided or not tensor.numel():
        return False
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False
