"""Scaling and clipping gradients, plain or sharded, with one norm for all layouts.

A gradient may be a plain tensor (DDP: the same on every rank) or a DTensor (FSDP: each rank holds a part).
The norm is taken over the whole gradient either way: squares are summed locally in float64, then over the
mesh of the sharded ones. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The parts of the gradients that this rank holds, as plain tensors that share their memory."""
    return [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients in place by a scalar tensor, without reading it on the host."""
    grads = local_gradients(parameters)
    if grads:
        by_dtype = {grad.dtype: factor.to(grad.dtype) for grad in grads}
        for dtype, scalar in by_dtype.items():
            torch._foreach_mul_([grad for grad in grads if grad.dtype == dtype], scalar)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The Euclidean norm of the whole gradient, the same on every rank. float64 scalar on the device.

    A collective over the mesh of the sharded gradients, if there are any.
    """
    replicated: list[Tensor] = []
    sharded: dict[object, tuple[DTensor, list[Tensor]]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor):
            sharded.setdefault(grad.device_mesh, (grad, []))[1].append(grad.to_local())
        elif grad is not None:
            replicated.append(grad)
    parts = [_square_sum(replicated)] if replicated else []
    for example, tensors in sharded.values():
        total = _square_sum(tensors)
        for axis, placement in enumerate(example.placements):
            if placement.is_shard():
                dist.all_reduce(total, group=example.device_mesh.get_group(axis))
        parts.append(total)
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(parts).sum().sqrt()


def clip_gradient_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``.

    Returns:
        The norm before clipping, float64 scalar on the device.
    """
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    # Where the norm is within bounds the factor is exactly 1, so that clipping changes no bit.
    scale_gradients(parameters, torch.where(norm <= max_norm, 1.0, max_norm / norm))
    return norm


def _square_sum(tensors: list[Tensor]) -> Tensor:
    # Accumulated in float64, the sum does not depend on how a gradient is sharded, but for its last bits.
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square().sum()
