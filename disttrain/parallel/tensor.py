"""Tensor parallelism by the model's own plan: neighbouring ranks share the work of each layer.

A model says how in ``tensor_plan()``: names of its modules (with ``*`` for any) to PyTorch's styles
(``torch.distributed.tensor.parallel``), as ``parallelize_module`` takes them; sequence parallelism is a style among
them. Parameters that the plan leaves out are whole on every rank. The random numbers of a micro batch are the same on
all ranks of a tensor group, so dropout on whole tensors needs nothing; where a rank holds a part of a tensor,
:class:`ShardedDropout` gives it that part of the whole tensor's mask.

Guarantee: the same samples, masks and gradients as without it, to rounding; the sums inside a layer are cut, so not
to the bit. Cost: two collectives a block and direction on the activations, by the plan.
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
    """Dropout on a rank's part of a tensor, with that part of the mask that the whole tensor would have.

    Args:
        dim: the dimension along which the ranks of a tensor group hold equal parts.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, nn.Dropout):
            raise ConfigError(
                f"tensor_plan() gives a {type(module).__name__} the style ShardedDropout",
                mend="use it for modules of the class torch.nn.Dropout",
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
        # What dropout draws for a tensor depends on its shape alone.
        mask = F.dropout(own.new_ones(shape), self._module.p, training=True)
        kept = own * mask.chunk(self._mesh.size(), dim=self._dim)[self._mesh.get_local_rank()]
        return DTensor.from_local(kept, part.device_mesh, part.placements) if isinstance(part, DTensor) else kept


def apply_tensor_plan(module: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the layers of a module over the ranks of a mesh of one axis, in place. A collective of the mesh.

    Raises:
        ConfigError: the model has no plan, or the plan does not fit it.
    """
    owner, plan = _find_plan(module)
    names = [name for name, _ in owner.named_modules() if name]
    for pattern, style in plan.items():
        found = list(_matching(pattern, owner))
        if not found:
            raise ConfigError(
                f"tensor_plan() of {type(owner).__name__} names {pattern!r}, which is no module of it",
                mend=f"correct the plan; {nearest(pattern, names)}",
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
        f"parallel.tensor is set, and {type(module).__name__} does not say how its layers are divided",
        mend="give the model a method tensor_plan() that returns names of modules to styles of"
        " torch.distributed.tensor.parallel, or set parallel.tensor to 1",
    )


def _matching(pattern: str, owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a pattern names: each of its parts matches one part of a name, as in PyTorch's own search."""
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
                mend=f"use a parallel.tensor that divides {size}, or leave {name} out of tensor_plan()",
            )
