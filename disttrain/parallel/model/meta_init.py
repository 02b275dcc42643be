"""``meta_init: true``: initial weights keyed by name and seed, for models built on the meta device.

The model is built without memory (``torch.device("meta")``), sharded, and only then initialized. Every module fills its
own tensors with ``reset_parameters()`` (or ``_reset_parameters()``, ``init_weights()``), with generators seeded from
(seed, module name). The values depend on no other module, no order and no layout, so they are bit-identical under DDP,
FSDP and HSDP on any number of ranks with the same type of device. Half-precision values are drawn in float32 and
rounded.

Cost: a rank holds its shards and, while a module is initialized, that module's full tensors; an initializer of the
whole model holds the whole model. Every rank draws all numbers. There is no communication, unless an initializer
accesses tensors of child modules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from disttrain.errors import ConfigError
from disttrain.parallel.model.trained_parameters import class_name
from disttrain.parallel.randomness import mix, seed_generators

_INITIALIZERS: Final = ("reset_parameters", "_reset_parameters", "init_weights")


def starts_on_meta(module: nn.Module, *, wanted: bool, fitting: bool) -> bool:
    """Return whether a module still needs memory and initial values.

    Args:
        module: the root module.
        wanted: the setting ``parallel.meta_init``.
        fitting: the weights are about to be trained, so they need initial values.

    Raises:
        ConfigError: the module's device contradicts the setting.
    """
    tensors = list(_tensors(module))
    meta = [name for name, _, _, tensor in tensors if tensor.is_meta]
    if meta and not wanted:
        raise ConfigError(
            f"{meta[0]} of {class_name(module)} is on the meta device, and parallel.meta_init is false",
            hint="set parallel.meta_init to true, or build the model on the CPU",
        )
    given = [name for name, kind, _, tensor in tensors if kind == "parameter" and not tensor.is_meta]
    if wanted and given and (meta or fitting):
        raise ConfigError(
            f"parallel.meta_init is true, and {given[0]} of {class_name(module)} is not on the meta device",
            hint='build the model under torch.device("meta"), or set parallel.meta_init to false',
        )
    return bool(meta)


def initialize(module: nn.Module, device: torch.device, *, seed: int, offload: bool = False) -> None:
    """Allocate and initialize a module on the meta device, sharded or not, in place.

    Tensors shared between modules stay shared, and get the values of the first module by name. Buffers that are not on
    the meta device keep their values. Collective if parameters are sharded; every rank must call it.

    Args:
        module: the root module; names are relative to it.
        device: the target device.
        seed: the run's seed.
        offload: keep shards on the CPU; values are still drawn on the device.

    Raises:
        ConfigError: a tensor has no initializer, or only its module's constructor could create it.
    """
    _refuse_lost_tensors(module)
    first = {id(tensor): name for name, _, _, tensor in reversed(list(_tensors(module))) if tensor.is_meta}
    to_fill = set(first.values())
    able = [name for name, inner in module.named_modules() if _initializer(inner) is not None]
    for empty in sorted(to_fill):
        if not any(by == "" or empty.startswith(f"{by}.") for by in able):
            raise _no_value(module, empty)
    _give_memory(module, device, offload=offload)
    owners: dict[int, str] = {}
    for name, _, _, tensor in list(_tensors(module)):
        owners.setdefault(id(tensor), name)
    cuda = [device] if device.type == "cuda" else []
    # Reversed, so that children precede their parents, whose initializers may change the children's values.
    for name, inner in reversed(list(module.named_modules())):
        initializer = _initializer(inner)
        if initializer is None:
            continue
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            seed_generators(mix(seed, _key(name)), device)
            to_fill -= _fill(inner, name, initializer, device, owners)
    if to_fill:
        raise _no_value(module, min(to_fill))


def _fill(
    inner: nn.Module, name: str, initializer: Callable[[], object], device: torch.device, owners: dict[int, str]
) -> set[str]:
    """Let a module initialize full copies of its tensors, and keep this rank's part; return the names filled."""
    prefix = f"{name}." if name else ""
    held = [(f"{prefix}{own}", kind, place, tensor) for own, kind, place, tensor in _tensors(inner)]
    copies: dict[int, Tensor] = {}
    for full_name, kind, (holder, key), tensor in held:
        if id(tensor) not in copies:
            copies[id(tensor)] = _copy(tensor, kind, device, blank=full_name.rpartition(".")[0] == name)
        _put(holder, kind, key, copies[id(tensor)])
    versions = {id(copy): copy._version for copy in copies.values()}
    filled = set()
    try:
        initializer()
        for full_name, kind, (holder, key), tensor in held:
            table = holder._parameters if kind == "parameter" else holder._buffers
            copy = table[key]
            if copy is None or owners.get(id(tensor)) != full_name:
                continue
            if _was_filled(copy, versions.get(id(copy))):
                filled.add(full_name)
                _take(tensor, copy)
    finally:
        for _, kind, (holder, key), tensor in held:
            _put(holder, kind, key, tensor)
    return filled


def _copy(tensor: Tensor, kind: str, device: torch.device, *, blank: bool) -> Tensor:
    """Return a tensor's full value; with ``blank``, a copy marked as not yet filled (NaN)."""
    wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
    if blank:
        copy = torch.empty(tensor.shape, dtype=wide, device=device)
        if wide.is_floating_point or wide.is_complex:
            copy.fill_(torch.nan)
    else:
        there = tensor.detach().to(device)
        full = there.full_tensor() if isinstance(there, DTensor) else there
        copy = full.to(wide, copy=True)
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if kind == "parameter" else copy


def _was_filled(copy: Tensor, version: int | None) -> bool:
    if copy.is_floating_point() or copy.is_complex():
        return not bool(torch.isnan(copy).any())
    return copy._version != version


def _take(tensor: Tensor, full: Tensor) -> None:
    """Copy this rank's part of a full value."""
    full = full.detach().to(tensor.dtype)
    if isinstance(tensor, DTensor):
        own = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.to_local().copy_(own.to_local())
    else:
        tensor.copy_(full)


def _give_memory(module: nn.Module, device: torch.device, *, offload: bool) -> None:
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        # FSDP2 hooks _apply to register the new tensors. They are swapped in place, so shared ones stay shared.

        def give(tensor: Tensor) -> Tensor:
            place = torch.device("cpu") if offload and isinstance(tensor, DTensor) else device
            return torch.empty_like(tensor, device=place) if tensor.is_meta else tensor.to(place)

        module._apply(give)  # type: ignore[no-untyped-call]
        return
    made: dict[int, Tensor] = {}
    for _, kind, (holder, key), tensor in list(_tensors(module)):
        if id(tensor) not in made:
            new = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
            made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if kind == "parameter" else new
        _put(holder, kind, key, made[id(tensor)])


def _tensors(module: nn.Module) -> Iterator[tuple[str, str, tuple[nn.Module, str], Tensor]]:
    """Yield name, kind, location and tensor of all parameters and buffers; shared ones more than once."""
    for name, inner in module.named_modules():
        for kind, table in (("parameter", inner._parameters), ("buffer", inner._buffers)):
            for key, tensor in list(table.items()):
                if tensor is not None:
                    yield f"{name}.{key}" if name else key, kind, (inner, key), tensor


def _put(holder: nn.Module, kind: str, key: str, tensor: Tensor) -> None:
    table: dict[str, Tensor] = holder._parameters if kind == "parameter" else holder._buffers  # type: ignore[assignment]
    table[key] = tensor


def _initializer(module: nn.Module) -> Callable[[], object] | None:
    for name in _INITIALIZERS:
        found = getattr(module, name, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    return None


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _refuse_lost_tensors(module: nn.Module) -> None:
    """Reject meta tensors that are neither parameters nor buffers: their values are lost."""
    for name, inner in module.named_modules():
        for key, value in vars(inner).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ConfigError(
                    f"parallel.meta_init is true, and {f'{name}.' if name else ''}{key} of {class_name(module)} is a"
                    " tensor on the meta device that is neither a parameter nor a buffer: its value is lost",
                    hint='build it with device="cpu", or later, as Task.build_metrics does for metrics',
                )


def leave_meta(module: nn.Module) -> None:
    """Allocate memory for a module that was never initialized, so that teardown after an error can move it."""
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        module.to_empty(device="cpu")


def _no_value(module: nn.Module, tensor: str) -> ConfigError:
    kind = type(module.get_submodule(tensor.rpartition(".")[0])).__name__
    return ConfigError(
        f"parallel.meta_init is true, but nothing initializes {tensor} of {class_name(module)}",
        hint=f"give {kind} a reset_parameters() method that fills all of its parameters and buffers (a buffer"
        ' built with device="cpu" keeps its value), or set meta_init to false',
    )
