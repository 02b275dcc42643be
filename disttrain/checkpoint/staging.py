"""What a rank writes of a checkpoint, and its copy in CPU memory from which a background thread writes.

Tensors that every rank holds whole are divided over the ranks before anything is copied, by one rule and without
a word between them; of a sharded tensor each rank has its part. So the copy costs each rank its share of the
state in CPU memory, kept for the next save (pinned, where the state is on a GPU), and training waits for nothing
but the copying.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from disttrain.checkpoint.store import Tensors, leaves
from disttrain.parallel.agree import is_distributed


def own_part(tensors: Tensors) -> Tensors:
    """The tensors that this rank writes: its shards, and its share of what all ranks hold. Nothing is copied."""
    if not is_distributed():
        return tensors
    whole = {name: tensor.nbytes for name, tensor in leaves(tensors) if not isinstance(tensor, DTensor)}
    rank, loads, others = dist.get_rank(), [0] * dist.get_world_size(), set()
    for name in sorted(whole, key=lambda name: (-whole[name], name)):
        least = loads.index(min(loads))
        loads[least] += max(1, whole[name])
        if least != rank:
            others.add(name)
    return _without(tensors, others)


class Stage:
    """Buffers in CPU memory that hold the state of one step."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Tensors) -> Tensors:
        """The same tensors in buffers of this stage; what an earlier call gave is written over.

        On return the copies are complete, whatever happens to the originals.
        """
        devices: set[torch.device] = set()
        copies = self._copy(tensors, "", devices)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def release(self) -> None:
        """Give the memory back."""
        self._buffers.clear()

    def _copy(self, tensors: Tensors, prefix: str, devices: set[torch.device]) -> Tensors:
        copies: dict[str, Any] = {}
        for name, value in tensors.items():
            if isinstance(value, dict):
                copies[name] = self._copy(value, f"{prefix}{name}.", devices)
                continue
            local = (value.to_local() if isinstance(value, DTensor) else value).detach()
            buffer = self._buffer(f"{prefix}{name}", local)
            buffer.copy_(local, non_blocking=local.is_cuda)
            if local.is_cuda:
                devices.add(local.device)
            copies[name] = buffer
            if isinstance(value, DTensor):
                # Its place on the mesh is all that the format asks for; no collective runs on the copy.
                copies[name] = DTensor(buffer, value._spec, requires_grad=False)  # type: ignore[no-untyped-call]
        return copies

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[name] = buffer
        return buffer


def _without(tensors: Tensors, others: set[str], prefix: str = "") -> Tensors:
    kept: Tensors = {}
    for name, value in tensors.items():
        if isinstance(value, dict):
            inner = _without(value, others, f"{prefix}{name}.")
            if inner:
                kept[name] = inner
        elif f"{prefix}{name}" not in others:
            kept[name] = value
    return kept
