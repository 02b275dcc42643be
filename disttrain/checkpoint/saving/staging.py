"""Select the part of a checkpoint that a rank writes, and copy it to CPU memory for a background thread.

Tensors replicated on every rank are divided among the ranks before copying, by a fixed rule without communication. Of
a sharded tensor each rank writes its own shard. So each rank needs CPU memory for its share of the state, which is
kept for the next save (pinned if the state is on a GPU), and training waits only for the copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from disttrain.checkpoint.format.reader import Tensors, leaves
from disttrain.distributed.synchronize_errors import is_distributed


def own_part(tensors: Tensors) -> Tensors:
    """Return the tensors this rank writes: its shards, and its share of replicated tensors. Nothing is copied."""
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
    """CPU buffers that hold the state of one step."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Tensors) -> Tensors:
        """Copy tensors to this stage's buffers, overwriting those returned by an earlier call.

        The copies are complete on return, so the originals may change.
        """
        devices: set[torch.device] = set()
        copies = self._copy(tensors, "", devices)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def release(self) -> None:
        """Free the buffers."""
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
                # The format only needs its placement on the mesh; no collective runs on the copy.
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
