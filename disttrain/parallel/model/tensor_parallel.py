"""Tensor parallelism by the model's own plan: consecutive ranks share the work of each layer.

A model defines the plan in ``tensor_plan()``: a mapping from module names (with ``*`` as a wildcard) to PyTorch's
styles (``torch.distributed.tensor.parallel``), as ``parallelize_module`` takes it; one of the styles is sequence
parallelism. Parameters outside the plan are replicated. All ranks of a tensor group draw the same random numbers for a
micro batch, so dropout on whole tensors needs nothing special. If a rank holds a part of a tensor,
:class:`ShardedDropout` applies that part of the whole tensor's mask.

Guarantee: the same samples, masks and gradients as without it, up to rounding; not bit-identical, since sums inside a
layer are split. Cost: two collectives on the activations per block and direction, depending on the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from disttrain.errors import ConfigError, nearest

Plan = dict[str, ParallelStyle]


class ShardedDropout(ParallelStyle):
    """Dropout on a rank's part of a tensor, with the matching part of the whole tensor's mask.

    Args:
        dim: the dimension along which the ranks of a tensor group hold equal parts.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, nn.Dropout):
            raise ConfigError(
                f"tensor_plan() gives the style ShardedDropout to a {type(module).__name__}",
                hint="use it only for torch.nn.Dropout modules",
            )
        module.forward = _SharedMask(module, self.dim, device_mesh)  # type: ignore[method-assign, assignment]
        return module


class _SharedMask:
    """The forward pass of a dropout layer on a part of a tensor."""

    def __init__(self, module: nn.Dropout, dim: int, mesh: DeviceMesh) -> None:
        self._module, self._dim, self._mesh = module, dim, mesh

    def __call__(self, part: Tensor) -> Tensor:
        if not self._module.training or self._module.p == 0:
            return part
        own = part.to_local() if isinstance(part, DTensor) else part
        shape = list(own.shape)
        shape[self._dim] *= self._mesh.size()
        # For a given generator state, dropout's mask depends only on the tensor's shape.
        mask = F.dropout(own.new_ones(shape), self._module.p, training=True)
        kept = own * mask.chunk(self._mesh.size(), dim=self._dim)[self._mesh.get_local_rank()]
        return DTensor.from_local(kept, part.device_mesh, part.placements) if isinstance(part, DTensor) else kept


def apply_tensor_plan(module: nn.Module, mesh: DeviceMesh) -> None:
    """Parallelize a module's layers over a one-dimensional mesh, in place. Collective over the mesh.

    Raises:
        ConfigError: the model has no plan, or the plan does not fit it.
    """
    owner, plan = _find_plan(module)
    names = [name for name, _ in owner.named_modules() if name]
    for pattern, style in plan.items():
        found = list(_matching(pattern, owner))
        if not found:
            raise ConfigError(
                f"tensor_plan() of {type(owner).__name__} names {pattern!r}, which matches no module of it",
                hint=f"correct the plan; {nearest(pattern, names)}",
            )
        for name, inner in found:
            _check_size(name, inner, style, mesh.size())
    parallelize_module(owner, mesh, plan)


def _find_plan(module: nn.Module) -> tuple[nn.Module, Plan]:
    for inner in module.modules():
        declared: Any = getattr(inner, "tensor_plan", None)
        if callable(declared):
            return inner, dict(declared())
    raise ConfigError(
        f"parallel.tensor is set, but {type(module).__name__} does not say how to divide its layers",
        hint="give the model a tensor_plan() method that maps module names to styles of"
        " torch.distributed.tensor.parallel, or set parallel.tensor to 1",
    )


def _matching(pattern: str, owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that a pattern matches, part by part, as PyTorch's own search does."""
    tokens = pattern.split(".") if pattern else []
    for name, inner in owner.named_modules():
        parts = name.split(".") if name else []
        if len(parts) == len(tokens) and all(map(fnmatch, parts, tokens)):
            yield name, inner


def _check_size(name: str, module: nn.Module, style: ParallelStyle, degree: int) -> None:
    if not isinstance(module, nn.Linear):
        return
    for kind, what in ((ColwiseParallel, "out_features"), (RowwiseParallel, "in_features")):
        size = getattr(module, what)
        if isinstance(style, kind) and size % degree:
            raise ConfigError(
                f"parallel.tensor {degree} does not divide {what} {size} of {name}",
                hint=f"use a parallel.tensor that divides {size}, or remove {name} from tensor_plan()",
            )
