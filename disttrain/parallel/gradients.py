"""Scaling and clipping gradients, plain or sharded, with one norm for all layouts.

A gradient may be a plain tensor (DDP: the same on every rank) or a DTensor (FSDP: each rank holds a part).
The norm is taken over the whole gradient either way: squares are summed locally in float64, then over the
mesh of the sharded ones. :func:`ordered_gradient_norm` gives the same bits for every layout. Nothing here waits
for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from disttrain.parallel.agree import is_distributed
from disttrain.parallel.collectives import all_gather_single

_ROWS_ELEMENTS: Final = {"cpu": 2**18, "cuda": 2**24}  # squared at a time; changes no bit


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The parts of the gradients that this rank holds, as plain tensors that share their memory."""
    return [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients in place by a scalar tensor, without reading it on the host."""
    grads = local_gradients(parameters)
    if grads:
        # Offloaded gradients are on the CPU; reading the factor there waits for the device, as offloading does anyway.
        kinds = {(grad.dtype, grad.device): factor.to(grad.device, grad.dtype) for grad in grads}
        for kind, scalar in kinds.items():
            torch._foreach_mul_([grad for grad in grads if (grad.dtype, grad.device) == kind], scalar)


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


def ordered_gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of the whole gradient, with the same bits however it is sharded. float64 scalar on the device.

    Rows (dimension 0) are the unit of sharding: a rank squares and adds its own rows, the sums of all rows are
    gathered, and all ranks add them in one order. Every addition is of two tensors, so no kernel chooses an order.
    A replicated gradient is treated as if it were sharded, which divides the work. Cost: two to three passes over
    a rank's share in float64; 8 bytes a row of all parameters are gathered. A collective.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    rows = _gathered_rows(grads) if grads else []
    if not rows:
        return torch.zeros((), dtype=torch.float64)
    return _pairwise_sum(torch.cat(rows)).sqrt()


def clip_gradient_norm(parameters: Iterable[nn.Parameter], max_norm: float, *, ordered: bool = False) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``.

    Args:
        parameters: whose gradients to scale.
        max_norm: the bound.
        ordered: take the norm by :func:`ordered_gradient_norm`.

    Returns:
        The norm before clipping, float64 scalar on the device.
    """
    parameters = list(parameters)
    norm = ordered_gradient_norm(parameters) if ordered else gradient_norm(parameters)
    # Where the norm is within bounds the factor is exactly 1, so that clipping changes no bit.
    scale_gradients(parameters, torch.where(norm <= max_norm, 1.0, max_norm / norm))
    return norm


def _square_sum(tensors: list[Tensor]) -> Tensor:
    # Accumulated in float64, the sum does not depend on how a gradient is sharded, but for its last bits.
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square().sum()


def _gathered_rows(grads: list[Tensor]) -> list[Tensor]:
    """The sum of squares of each row of each gradient, in float64, on every rank. A collective."""
    found: list[Tensor] = [torch.empty(0)] * len(grads)
    by_group: dict[dist.ProcessGroup | None, list[int]] = {}
    for place, grad in enumerate(grads):
        by_group.setdefault(_sharding_group(grad), []).append(place)
    for group, places in by_group.items():
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        counts = [_num_rows(grads[place]) for place in places]
        shares = [-(-count // size) for count in counts]  # as torch.chunk deals rows
        own = [_own_rows(grads[place], rank, share) for place, share in zip(places, shares, strict=True)]
        flat = torch.cat(own)
        if group is not None:
            gathered = flat.new_empty(size * flat.numel())
            all_gather_single(gathered, flat, group=group)
            flat = gathered
        parts = torch.split(flat.view(size, -1), shares, dim=1)
        for place, count, part in zip(places, counts, parts, strict=True):
            found[place] = part.reshape(-1)[:count]
    return found


def _sharding_group(grad: Tensor) -> dist.ProcessGroup | None:
    """The ranks over which the rows of a gradient are, or may be, divided."""
    if not isinstance(grad, DTensor):
        return dist.group.WORLD if is_distributed() else None
    sharded = [axis for axis, placement in enumerate(grad.placements) if placement.is_shard()]
    if len(sharded) != 1 or not grad.placements[sharded[0]].is_shard(0):
        raise NotImplementedError(f"the ordered norm needs gradients sharded by rows, not {grad.placements}")
    return grad.device_mesh.get_group(sharded[0])


def _num_rows(grad: Tensor) -> int:
    return grad.shape[0] if grad.ndim else 1


def _own_rows(grad: Tensor, rank: int, share: int) -> Tensor:
    """Sums of squares of this rank's rows, padded with zeros to its share. float64, shape (share,)."""
    if isinstance(grad, DTensor):
        local = grad.to_local()
    else:
        local = grad.reshape(_num_rows(grad), -1)[rank * share : (rank + 1) * share]
    out = torch.zeros(share, dtype=torch.float64, device=local.device)
    if local.numel():
        rows = local.reshape(local.shape[0], -1)
        step = max(1, _ROWS_ELEMENTS.get(local.device.type, 2**24) // rows.shape[1])
        for first in range(0, rows.shape[0], step):
            squares = rows[first : first + step].to(torch.float64, copy=True)
            out[first : first + squares.shape[0]] = _pairwise_sum(squares.mul_(squares))
    return out


def _pairwise_sum(values: Tensor) -> Tensor:
    """Sums over the last dimension, the upper half added to the lower until one is left. Overwrites its input."""
    width = values.shape[-1]
    while width > 1:
        half = (width + 1) // 2
        values[..., : width - half] += values[..., half:width]
        width = half
    return values[..., 0]
