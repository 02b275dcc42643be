"""Scale and clip gradients, plain or sharded, identically in all layouts.

A gradient is a plain tensor (DDP: the same on every rank) or a DTensor (FSDP: each rank holds a shard). Either way the
norm is that of the whole gradient: squares are summed locally in float64, then over the mesh for sharded gradients.
:func:`ordered_gradient_norm` is bit-identical in every layout. Nothing here synchronizes with the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from disttrain.distributed.collectives import all_gather_single
from disttrain.distributed.synchronize_errors import is_distributed
from disttrain.errors import ConfigError

_ROWS_ELEMENTS: Final = {"cpu": 2**18, "cuda": 2**24}  # elements squared at a time; does not affect the result


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return this rank's parts of the gradients, as plain tensors that share their memory."""
    grads = [gradient for gradient in map(_gradient, parameters) if gradient is not None]
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in grads]


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return a parameter's gradient; for a sparse one, its coalesced rows."""
    grad = parameter.grad
    if grad is None or isinstance(grad, DTensor) or not grad.is_sparse:
        return grad
    if not grad.is_coalesced():  # duplicate rows still have to be summed
        parameter.grad = grad = grad.coalesce()
    return grad._values()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients in place by a scalar tensor, without reading it on the host."""
    grads = local_gradients(parameters)
    if grads:
        # Offloaded gradients are on the CPU. Copying the factor there synchronizes, which offloading does anyway.
        for kind in {(grad.dtype, grad.device): None for grad in grads}:
            _scale_alike([grad for grad in grads if (grad.dtype, grad.device) == kind], factor)


def _scale_alike(grads: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors of one dtype and device; for half precision, compute in float32 and round only the product."""
    dtype, device = grads[0].dtype, grads[0].device
    if dtype.itemsize >= 4:
        torch._foreach_mul_(grads, factor.to(device, dtype))
        return
    # A 0-d factor would first be rounded to the gradients' dtype; a 1-d one takes part in type promotion.
    wide = factor.to(device, torch.float32).view(1)
    torch._foreach_mul_([grad if grad.ndim else grad.view(1) for grad in grads], [wide] * len(grads))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the Euclidean norm of the whole gradient, the same on every rank. float64 scalar on the device.

    Collective over the mesh of the sharded gradients, if any.
    """
    replicated: list[Tensor] = []
    sharded: dict[object, tuple[DTensor, list[Tensor]]] = {}
    for parameter in parameters:
        grad = _gradient(parameter)
        if isinstance(grad, DTensor):
            sharded.setdefault((grad.device_mesh, grad.placements), (grad, []))[1].append(grad.to_local())
        elif grad is not None:
            replicated.append(grad)
    parts = [_square_sum(replicated)] if replicated else []
    for example, tensors in sharded.values():
        total = _square_sum(tensors)
        for axis, placement in enumerate(example.placements):
            if not placement.is_replicate():  # is_shard() is false for _StridedShard
                dist.all_reduce(total, group=example.device_mesh.get_group(axis))
        parts.append(total)
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(parts).sum().sqrt()


def ordered_gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of the whole gradient, bit-identical however it is sharded. float64 scalar on the device.

    Rows (dimension 0) are the unit of sharding: each rank sums the squares of its own rows, the row sums are gathered,
    and all ranks add them in one order. Every addition is elementwise between two tensors, so no kernel chooses an
    order. A replicated gradient is treated as if it were sharded, which divides the work. Cost: two to three passes
    over a rank's share in float64, and a gather of 8 bytes per row of all parameters. Collective.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if any(grad.is_sparse for grad in grads):
        raise ConfigError("parallel.reduction is tree, and a gradient is sparse", hint="set parallel.reduction to fast")
    rows = _gathered_rows(grads) if grads else []
    if not rows:
        return torch.zeros((), dtype=torch.float64)
    return _pairwise_sum(torch.cat(rows)).sqrt()


def norm_of(strategy: object) -> Callable[[Iterable[nn.Parameter]], Tensor]:
    """Return the norm function that matches a strategy's reduction: with ``tree``, the layout-independent one."""
    return ordered_gradient_norm if adds_in_tree(strategy) else gradient_norm


def adds_in_tree(strategy: object) -> bool:
    """Return whether a strategy (possibly Lightning's) uses ``reduction: tree``."""
    return bool(getattr(strategy, "reduction", "fast") == "tree")


def clip_gradient_norm(parameters: Iterable[nn.Parameter], max_norm: float, *, ordered: bool = False) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``.

    Args:
        parameters: parameters whose gradients to scale.
        max_norm: the bound.
        ordered: use :func:`ordered_gradient_norm`.

    Returns:
        The norm before clipping, float64 scalar on the device.
    """
    parameters = list(parameters)
    norm = ordered_gradient_norm(parameters) if ordered else gradient_norm(parameters)
    # Within the bound the factor is exactly 1, so clipping does not change a bit.
    scale_gradients(parameters, torch.where(norm <= max_norm, 1.0, max_norm / norm))
    return norm


def clip_gradient_value(parameters: Iterable[nn.Parameter], bound: float, *, ordered: bool = False) -> Tensor:
    """Clamp every element of all gradients to ``[-bound, bound]``; NaN stays.

    Args:
        parameters: parameters whose gradients to clip.
        bound: the largest absolute value.
        ordered: use :func:`ordered_gradient_norm`.

    Returns:
        The norm before clipping, float64 scalar on the device.
    """
    parameters = list(parameters)
    norm = ordered_gradient_norm(parameters) if ordered else gradient_norm(parameters)
    grads = local_gradients(parameters)
    for dtype in {grad.dtype for grad in grads}:
        alike = [grad for grad in grads if grad.dtype == dtype]
        torch._foreach_clamp_min_(alike, -bound)
        torch._foreach_clamp_max_(alike, bound)
    return norm


def _square_sum(tensors: list[Tensor]) -> Tensor:
    # Accumulated in float64, the sum depends on the sharding only in its last bits.
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square().sum()


class _Layout(NamedTuple):
    """How a gradient is sharded: its rows over one group, and before that the whole over a tensor group."""

    rows: dist.ProcessGroup | None
    tensor: dist.ProcessGroup | None


def _gathered_rows(grads: list[Tensor]) -> list[Tensor]:
    """Return each gradient's sums of squares per row, in float64, on every rank. Collective.

    For a gradient sharded over a tensor group, rows are those of each part, one part after the other.
    """
    found: list[Tensor] = [torch.empty(0)] * len(grads)
    by_layout: dict[_Layout, list[int]] = {}
    for place, grad in enumerate(grads):
        by_layout.setdefault(_layout(grad), []).append(place)
    for layout, places in by_layout.items():
        rank, size = _place_in(layout.rows)
        counts = [_num_rows(grads[place]) for place in places]
        shares = [-(-count // size) for count in counts]  # rows per rank, as torch.chunk divides them
        own = [_own_rows(grads[place], rank, share) for place, share in zip(places, shares, strict=True)]
        parts = torch.split(_gathered(torch.cat(own), layout.rows), shares, dim=1)
        rows = [part.reshape(-1)[:count] for count, part in zip(counts, parts, strict=True)]
        if layout.tensor is not None:
            every_part = _gathered(torch.cat(rows), layout.tensor)
            rows = [part.reshape(-1) for part in torch.split(every_part, counts, dim=1)]
        for place, values in zip(places, rows, strict=True):
            found[place] = values
    return found


def _gathered(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather a vector from every rank of a group, shape (ranks, elements). Collective over the group."""
    size = _place_in(group)[1]
    if size == 1:
        return own.view(1, -1)
    gathered = own.new_empty(size * own.numel())
    all_gather_single(gathered, own, group=group)
    return gathered.view(size, -1)


def _place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _layout(grad: Tensor) -> _Layout:
    """Return the groups over which a gradient's rows are sharded or, if replicated, may be divided."""
    if not isinstance(grad, DTensor):
        return _Layout(dist.group.WORLD if is_distributed() else None, None)
    names = grad.device_mesh.mesh_dim_names or ()
    divided = [axis for axis, placement in enumerate(grad.placements) if not placement.is_replicate()]
    tensor = [axis for axis in divided if names and names[axis] == "tensor"]
    rows = [axis for axis in divided if axis not in tensor]
    if len(rows) != 1 or getattr(grad.placements[rows[0]], "dim", None) != 0:
        raise NotImplementedError(f"the ordered norm needs gradients sharded by rows, not {grad.placements}")
    group = grad.device_mesh.get_group
    return _Layout(group(rows[0]), group(tensor[0]) if tensor else None)


def _num_rows(grad: Tensor) -> int:
    """Return the number of rows over the group that shards them; with a tensor group, of the largest part."""
    rows = grad.shape[0] if grad.ndim else 1
    if isinstance(grad, DTensor):
        for placement, name in zip(grad.placements, grad.device_mesh.mesh_dim_names or (), strict=False):
            if name == "tensor" and placement.is_shard(0):
                rows = -(-rows // grad.device_mesh[name].size())
    return rows


def _own_rows(grad: Tensor, rank: int, share: int) -> Tensor:
    """Return sums of squares of this rank's rows, zero-padded to its share. float64, shape (share,)."""
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
    """Sum over the last dimension by repeatedly adding the upper half to the lower. Overwrites its input."""
    width = values.shape[-1]
    while width > 1:
        half = (width + 1) // 2
        values[..., : width - half] += values[..., half:width]
        width = half
    return values[..., 0]
