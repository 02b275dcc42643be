"""Apply FSDP2 to a module from outside: first to its blocks, then to the module itself.

The blocks are given by the model's own ``shard_units()`` if it has one. Otherwise they are the large children of its
``ModuleList`` and ``Sequential`` containers; a child without a ``forward``, such as a nested list, is replaced by its
children. The module keeps its class name and parameter names, so the same module runs under DDP, FSDP or alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from disttrain.errors import ConfigError
from disttrain.lightning.internals import set_device

_MIN_UNIT_PARAMETERS: Final = 500_000


def shard_units(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model that are gathered and freed as units, in forward order."""
    for module in model.modules():
        declared = getattr(module, "shard_units", None)
        if callable(declared):
            return list(declared())
    containers = (m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential))
    found: list[nn.Module] = []
    for container in containers:
        for child in _runnable_children(container):
            inside = any(child is inner for unit in found for inner in unit.modules())
            if not inside and sum(p.numel() for p in child.parameters()) >= _MIN_UNIT_PARAMETERS:
                found.append(child)
    return found


def no_blocks(what: str, module: nn.Module, setting: str) -> ConfigError:
    """Return the error for a module without blocks.

    Args:
        what: the setting that needs blocks, with its value.
        module: the module.
        setting: name of the setting to set to none.
    """
    return ConfigError(
        f"{what}, but {type(module).__name__} has no blocks: no child of a ModuleList or Sequential has"
        f" {_MIN_UNIT_PARAMETERS:,} parameters or more",
        hint=f"give the model a shard_units() method that returns its blocks, or set {setting} to none",
    )


def _runs(module: nn.Module) -> bool:
    """Return whether a module has a forward pass, around which its parameters can be gathered and freed."""
    return getattr(module.forward, "__func__", module.forward) is not nn.Module.forward


def _runnable_children(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module's children, replacing those without a forward pass by their own children."""
    for child in module.children():
        yield from (child,) if _runs(child) else _runnable_children(child)


def _check(module: nn.Module, units: list[nn.Module]) -> None:
    """Reject what FSDP2 cannot shard."""
    for unit in units:
        if not _runs(unit):
            raise ConfigError(
                f"shard_units() in {type(module).__name__} returns a {type(unit).__name__}, which has no forward(),"
                " so FSDP cannot gather its parameters",
                hint="return the modules that it holds",
            )
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:
            raise ConfigError(
                f"parameter {name} is a single number, shape (), which FSDP cannot shard",
                hint="give it the shape (1,), such as nn.Parameter(torch.ones(1)), or set parallel.strategy to ddp",
            )


def shard_module(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool,
    forward_methods: Iterable[str],
    offload: OffloadPolicy | None = None,
    precision: MixedPrecisionPolicy | None = None,
) -> None:
    """Shard a module's parameters over a mesh, in place; skip a module that is already sharded.

    Args:
        module: the module.
        mesh: the data-parallel ranks: one axis to shard over, or a replicate axis and a shard axis.
        reshard_after_forward: free gathered parameters after the forward pass.
        forward_methods: methods besides ``forward`` that run the module.
        offload: where shards live between uses; by default on the device.
        precision: dtypes of gathered parameters and reduced gradients; by default unchanged.

    Raises:
        ConfigError: a unit has no forward pass, or a parameter is 0-dimensional.
    """
    if isinstance(module, FSDPModule):
        return
    units = shard_units(module)
    _check(module, units)
    policy, types = offload or OffloadPolicy(), precision or MixedPrecisionPolicy()
    for unit in (*units, module):
        fully_shard(
            unit, mesh=mesh, reshard_after_forward=reshard_after_forward, offload_policy=policy, mp_policy=types
        )
    for name in forward_methods:
        register_fsdp_forward_method(module, name)
    if dist.get_backend(mesh.get_group(mesh.ndim - 1)) == "gloo":
        # gloo lacks the PREMUL_SUM reduction that FSDP2 averages with; sum first and divide afterwards instead.
        for inner in module.modules():
            if isinstance(inner, FSDPModule):
                inner.set_force_sum_reduction_for_comms(True)


def move_all_but_shards(module: nn.Module, device: torch.device) -> None:
    """Move buffers and modules without parameters (such as metrics) to a device; parameters stay where they are."""
    for inner in module.modules():
        if next(inner.parameters(), None) is None:
            inner.to(device)
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                inner._buffers[name] = buffer.to(device)
        if isinstance(inner, pl.LightningModule):
            set_device(inner, device)  # what LightningModule.device returns


def without_tensor(mesh: DeviceMesh) -> DeviceMesh:
    """Return the mesh axes along which the data is divided."""
    names = mesh.mesh_dim_names or ()
    if "tensor" not in names:
        return mesh
    return mesh["replicate", "shard"] if "replicate" in names else mesh["shard"]
