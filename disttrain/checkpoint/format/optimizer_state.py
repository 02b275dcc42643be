"""Convert optimizer state to tensors and plain values keyed by parameter name, and back.

All state is saved under parameter names, so that it loads into any layout: tensors next to the model's
(``optimizer0.layer.weight.exp_avg``), everything else in ``meta.pt``. Only the optimizer's own ``state_dict()`` is
read; no dummy step is taken to create missing state. So saving has no side effects, and a parameter without state
(frozen, or never given a gradient) still has none after loading.

The plain values are a list of entries ``(kind, name, values)``. Kind ``parameter`` is the state of a parameter,
``other`` is state under any other key, ``top`` is what the optimizer adds next to ``state`` and ``param_groups``.
Values are ``("value", v)`` for None, bool, int, float, str and bytes; ``("tensor", device)`` for a tensor, which is
stored under its path, with its device type (missing in older checkpoints); and ``("list", [...])``,
``("tuple", [...])`` and ``("dict", [(key, ...), ...])`` of these. Keys of a parameter's state that hold tensors are
not listed; they are in the index of tensors, as in formats 1 and 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from disttrain.checkpoint.format.contents import DEEPEST, and_more, plain_contents
from disttrain.checkpoint.format.groups import parameters_by_name
from disttrain.errors import CheckpointError
from disttrain.parallel.model.trained_parameters import class_name

EXECUTION: Final = ("fused", "foreach", "capturable", "differentiable")
"""Settings that select a kernel, not a result: this run's are used, never the checkpoint's."""
_LABELS: Final = ("name", "param_names")
NOT_COMPARED: Final = frozenset(EXECUTION) | frozenset(_LABELS)
"""Settings that a resume takes from the current run."""
_PLAIN: Final = (type(None), bool, int, float, str, bytes)
_OTHER: Final = "~"  # in practice no parameter name starts with it; a clash is rejected


def named_state(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return an optimizer's ``state_dict()`` keyed by parameter names instead of numbers. Nothing is copied.

    Raises:
        CheckpointError: it holds a parameter that is not in the module, or state of one that is in none of its groups.
    """
    names, kind = _names(module), type(optimizer).__name__
    numbered: dict[int, str] = {}
    try:
        found = optimizer.state_dict()
    except KeyError:
        raise CheckpointError(
            f"{kind} holds state for a parameter that is in none of its parameter groups",
            hint="when you remove a parameter from its group, also delete its entry in optimizer.state",
        ) from None
    if not {"state", "param_groups"} <= found.keys():
        raise CheckpointError(
            f"state_dict() of {kind} lacks 'state' or 'param_groups'",
            hint="extend the dict that torch.optim.Optimizer returns",
        )
    groups = []
    for group, held in zip(found["param_groups"], optimizer.param_groups, strict=True):
        for number, parameter in zip(group["params"], held["params"], strict=True):
            if id(parameter) not in names:
                raise CheckpointError(
                    f"{kind} holds a parameter of shape {tuple(parameter.shape)} that does not belong to"
                    f" {class_name(module)}",
                    hint="register it in the module, so that it is saved, moved and reduced like the others",
                )
            numbered[number] = names[id(parameter)]
        groups.append({**group, "params": [numbered[number] for number in group["params"]]})
    state = {numbered.get(key, key): value for key, value in found["state"].items()}
    return {**found, "state": state, "param_groups": groups}


def split(state: dict[str, Any], where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a named state into tensors by dotted name, and plain values for :class:`Filling`.

    Args:
        state: what :func:`named_state` returned.
        where: how messages name it: ``optimizer 0 (AdamW)``.

    Raises:
        CheckpointError: it holds something that is neither a tensor nor plain.
    """
    tensors: dict[str, Tensor] = {}
    entries: list[tuple[str, Any, Any]] = []
    members = {name for group in state["param_groups"] for name in group["params"]}
    for key, held in state["state"].items():
        if key not in members or not isinstance(held, dict):
            path = f"{_OTHER}{len(entries)}"
            entries.append(("other", key, divide(held, path, tensors, f"{where}, state {key!r}")))
            continue
        odd = []
        for name, value in held.items():
            taken = divide(value, f"{key}.{name}", tensors, f"{where}, state {name!r} of {key}")
            if taken[0] != "tensor" or not isinstance(name, str):
                odd.append((name, taken))
        if odd:
            entries.append(("parameter", key, odd))
    for key, value in state.items():
        if key not in ("state", "param_groups"):
            entries.append(("top", key, divide(value, f"{_OTHER}top.{key}", tensors, f"{where}, {key!r}")))
    groups = {f"{where}, parameter group {place}": group for place, group in enumerate(state["param_groups"])}
    return tensors, {"entries": entries, "param_groups": list(plain_contents(groups).values())}


def divide(value: Any, path: str, tensors: dict[str, Tensor], where: str, depth: int = 0) -> Any:
    """Convert a value to tagged plain values, and move its tensors to ``tensors`` under their paths.

    Args:
        value: what to save.
        path: dotted name of the value.
        tensors: receives the tensors; their memory is shared.
        where: how messages name the value.
        depth: nesting depth.

    Raises:
        CheckpointError: it holds something that is neither plain nor a tensor, or two tensors have the same path.
    """
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter, DTensor) or value.layout != torch.strided or value.is_quantized:
            raise _refused(where, f"{type(value).__name__} of layout {value.layout}")
        if isinstance(value, DTensor) and any(placement.is_partial() for placement in value.placements):
            raise _refused(where, "DTensor with pending partial sums")
        if path in tensors:
            raise CheckpointError(f"{where} has the same name as another tensor, {path}", hint="give it another key")
        tensors[path] = value.detach()
        return ("tensor", value.device.type)
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in _PLAIN:
        return ("value", value)
    if depth > DEEPEST:
        raise _refused(where, f"{type(value).__name__}, nested in itself or too deep")
    if type(value) is dict:
        for key in value:
            if type(key) not in _PLAIN:
                raise _refused(where, f"dict with a key of type {type(key).__name__}")
        return (
            "dict",
            [(key, divide(v, f"{path}.{key}", tensors, f"{where}[{key!r}]", depth + 1)) for key, v in value.items()],
        )
    if type(value) in (list, tuple):
        return (
            type(value).__name__,
            [divide(v, f"{path}.{place}", tensors, f"{where}[{place}]", depth + 1) for place, v in enumerate(value)],
        )
    raise _refused(where, type(value).__name__)


class Filling:
    """Fill an optimizer from a checkpoint: read into :attr:`tensors`, then call :meth:`finish`.

    Args:
        optimizer: the optimizer to fill; it is not stepped.
        module: the module whose parameters it holds.
        index: shape and dtype of this optimizer's tensors in the checkpoint, by name.
        kept: dtypes of the model's tensors in the checkpoint, by parameter name.
        entries: the checkpoint's entries; none in formats 1 and 2.
        groups: its parameter groups, as returned by :func:`agreed_groups`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        module: nn.Module,
        *,
        index: Mapping[str, tuple[torch.Size, torch.dtype]],
        kept: Mapping[str, torch.dtype],
        entries: Iterable[tuple[str, Any, Any]],
        groups: list[dict[str, Any]],
    ) -> None:
        self._optimizer, self._index, self._groups, self._kept = optimizer, index, groups, kept
        self.tensors: dict[str, Tensor] = {}
        names = _names(module)
        self._aliases = {alias: names[id(parameter)] for alias, parameter in parameters_by_name(module)}
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._parameters = {names[id(parameter)]: parameter for parameter in held}
        self._state: dict[Any, Any] = {}
        self._top: dict[Any, Any] = {}
        odd = {
            (self._aliases.get(name, name), key)
            for kind, name, keys in entries
            if kind == "parameter"
            for key, _ in keys
        }
        for path in index:
            name, key = self._owner(path)
            if name is not None and not any(
                (name, key.rsplit(".", cut)[0]) in odd for cut in range(key.count(".") + 1)
            ):
                self._state.setdefault(name, {})[key] = self._tensor(path, name, key)
        for place, (kind, name, values) in enumerate(entries):
            if kind == "parameter":
                owner = self._aliases.get(name, name)
                into = self._state.setdefault(owner, {})
                into |= {key: self._made(value, f"{name}.{key}", owner) for key, value in values}
            elif kind == "top":
                self._top[name] = self._made(values, f"{_OTHER}top.{name}", None)
            else:
                self._state[name] = self._made(values, f"{_OTHER}{place}", None)

    def finish(self) -> None:
        """Load what was read into the optimizer."""
        numbers = {name: number for number, name in enumerate(self._parameters)}
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in self._groups]
        state = {numbers.get(name, name): value for name, value in self._state.items()}
        self._optimizer.load_state_dict({**self._top, "state": state, "param_groups": groups})
        for name, parameter in self._parameters.items():
            if name in self._state and parameter in self._optimizer.state:
                same = self._kept.get(name) == parameter.dtype
                now = self._optimizer.state[parameter]
                for key, value in self._state[name].items():
                    if key in now and key != "step":
                        now[key] = _as_saved(value, now[key], same)

    def _owner(self, path: str) -> tuple[str | None, str]:
        """Return the parameter that a tensor belongs to, and its key in the parameter's state."""
        name = path
        while "." in name:
            name = name.rpartition(".")[0]
            if (owner := self._aliases.get(name)) in self._parameters:
                return owner, path[len(name) + 1 :]
        return None, path

    def _made(self, value: Any, path: str, name: str | None) -> Any:
        kind, *content = value
        if kind == "tensor":
            return self._tensor(path, name, "", *content)
        if kind == "value":
            return content[0]
        if kind == "dict":
            return {key: self._made(inner, f"{path}.{key}", name) for key, inner in content[0]}
        made = [self._made(inner, f"{path}.{place}", name) for place, inner in enumerate(content[0])]
        return tuple(made) if kind == "tuple" else made

    def _tensor(self, path: str, name: str | None, key: str, device: str = "cpu") -> Tensor:
        """Allocate a tensor to read into: sharded like the parameter if the shapes match, otherwise whole.

        PyTorch moves per-parameter state to the parameter's device, but no other state.
        """
        if path not in self._index:
            raise CheckpointError(
                f"the checkpoint lacks the optimizer tensor {path}", hint="resume from another checkpoint"
            )
        shape, dtype = self._index[path]
        parameter = self._parameters.get(name) if name is not None else None
        made = self._optimizer.state.get(parameter, {}).get(key) if parameter is not None and key else None
        alike = parameter is not None and parameter.shape == shape and key != "step"
        if not (
            isinstance(made, Tensor)
            and (made.shape, made.dtype) == (shape, dtype)
            and isinstance(made, DTensor) == (alike and isinstance(parameter, DTensor))
        ):  # otherwise reuse the existing tensor: a rollback then needs no extra memory
            at = next((each.device for each in self._parameters.values() if name is None and device != "cpu"), None)
            made = torch.empty_like(parameter, dtype=dtype) if alike else torch.empty(shape, dtype=dtype, device=at)  # type: ignore[arg-type]
        self.tensors[path] = made = made.detach()
        return made


def restore_groups(optimizer: Optimizer, module: nn.Module, saved: list[dict[str, Any]]) -> None:
    """Add the parameter groups that a callback or hook had added by the time of the checkpoint."""
    by_name = dict(parameters_by_name(module))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for group in saved[len(optimizer.param_groups) :]:
        parameters = [by_name.get(name) for name in group["params"]]
        if any(parameter is None or id(parameter) in held for parameter in parameters):
            return  # a different arrangement; agreed_groups() rejects it with a clear message
        settings = {name: value for name, value in group.items() if name not in EXECUTION}
        optimizer.add_param_group({**settings, "params": parameters})
        warnings.warn(
            f"the checkpoint's parameter group with {group['params'][0] if group['params'] else 'no parameter'}"
            f" ({len(parameters)} parameters) was added to {type(optimizer).__name__}, which was built without it",
            stacklevel=4,
        )


def with_first_names(module: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rename the parameters of saved groups to their first names: a shared one may be saved under another."""
    names, by_name = _names(module), dict(parameters_by_name(module))
    first = {alias: names[id(parameter)] for alias, parameter in by_name.items()}
    return [{**group, "params": [first.get(name, name) for name in group["params"]]} for group in groups]


def agreed_groups(
    path: Path, kind: str, saved: list[dict[str, Any]], now: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the parameter groups to load: the checkpoint's settings, with this run's names and kernel choices.

    Args:
        path: the checkpoint, for the message.
        kind: class name of the optimizer, for the message.
        saved: the checkpoint's parameter groups; ``params`` are names.
        now: this run's parameter groups.

    Raises:
        CheckpointError: the settings differ, or a parameter is in a different group.
    """
    hint = "use the model and optimizer that it was made with, or start over with --resume never"
    # Group names were added together with configurable groups; older checkpoints have none.
    if len(saved) != len(now) or any(
        set(was) - NOT_COMPARED != set(is_) - NOT_COMPARED for was, is_ in zip(saved, now, strict=False)
    ):
        raise CheckpointError(
            f"checkpoint {path} holds optimizer state with settings or parameter groups that differ from"
            f" this run's {kind}",
            hint=hint,
        )
    for number, (was, is_) in enumerate(zip(saved, now, strict=True)):
        moved = sorted(set(was["params"]) ^ set(is_["params"]))
        if moved:
            raise CheckpointError(
                f"checkpoint {path} has different parameters in the optimizer's parameter group"
                f" {is_.get('name', number)!r}: {moved[0]}{and_more(moved)} moved",
                hint=hint,
            )
    return [_agreed(was, is_) for was, is_ in zip(saved, now, strict=True)]


def _agreed(was: dict[str, Any], is_: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint's settings in this run's form: Python numbers or one-element tensors."""
    group: dict[str, Any] = {"params": is_["params"]}
    for name, value in is_.items():
        if name in NOT_COMPARED or name == "params":
            group[name] = value
        elif isinstance(value, Tensor) and not isinstance(was[name], Tensor):
            group[name] = torch.full_like(value, was[name])
        elif isinstance(was[name], Tensor) and not isinstance(value, Tensor):
            group[name] = was[name].item()
        else:
            group[name] = was[name].to(value.device) if isinstance(value, Tensor) else was[name]
    return group


def _names(module: nn.Module) -> dict[int, str]:
    """Map each parameter's ``id()`` to its first name."""
    return {id(parameter): name for name, parameter in reversed(list(parameters_by_name(module)))}


def _as_saved(saved: Any, loaded: Any, same_type: bool) -> Any:
    """Undo what ``load_state_dict`` changes: it casts tensors to the parameter's dtype, and breaks strings."""
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        changed = same_type and saved.dtype != loaded.dtype and saved.shape == loaded.shape
        return saved.to(loaded.device) if changed else loaded
    if isinstance(saved, dict) and isinstance(loaded, dict) and saved.keys() == loaded.keys():
        return {key: _as_saved(value, loaded[key], same_type) for key, value in saved.items()}
    if isinstance(saved, list | tuple) and type(loaded) is type(saved) and len(saved) == len(loaded):
        return type(saved)(_as_saved(*both, same_type) for both in zip(saved, loaded, strict=True))
    return saved if isinstance(saved, str | bytes) else loaded


def _refused(where: str, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is of type {kind}, which a checkpoint cannot store",
        hint="use tensors, numbers, strings, None, and lists, tuples and dicts of these; or convert it in state_dict()"
        " and load_state_dict(), or in get_extra_state() and set_extra_state()",
    )
