"""Convert everything in a checkpoint besides tensors to plain values, which load without unpickling.

Two rules. State that a resume restores (``state_dict()``, ``on_save_checkpoint()``) is converted only if the result
compares equal: NumPy scalars become Python numbers, subclasses of plain types become the base type. Hyper-parameters
are a record that is never loaded, so any plain form will do: a path becomes a string, an Enum its value, a dataclass
or Namespace a dictionary, a class, function or module its name, a NumPy array a list (or a tensor if it has more than
a thousand elements). Anything else is rejected with its dotted name and type. No tensor is copied.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import inspect
import types
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from pathlib import PurePath
from typing import Any, Final

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from disttrain.checkpoint.format.reader import Tensors, leaves
from disttrain.errors import CheckpointError
from disttrain.parallel.model.trained_parameters import class_name

_HYPER_PARAMETERS: Final = ("hyper_parameters", "datamodule_hyper_parameters")
_HYPER_PARAMETER_TYPES: Final = ("hparams_type", "datamodule_hparams_type")
"""OmegaConf class names; dropped, because their contents are stored as dictionaries."""
_BASE: Final = "lightning.pytorch.callbacks.callback"
_SHOWN: Final = 5
_LONGEST_LIST: Final = 1000
DEEPEST: Final = 64
_AS_THEY_ARE: Final = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_BASES: Final[tuple[tuple[type, Callable[[Any], Any]], ...]] = (
    (bool, bool),
    (int, int.__int__),
    (float, float.__float__),
    (str, str.__str__),
    (bytes, lambda value: bytes(memoryview(value))),
)
_TEXTS: Final = (
    *(PurePath, uuid.UUID, decimal.Decimal, fractions.Fraction, range, slice),
    *(datetime.date, datetime.time, datetime.timedelta, np.dtype, np.datetime64, np.timedelta64),
)


def plain_contents(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the checkpoint dictionary that Lightning assembled to plain values.

    Raises:
        CheckpointError: some entries have no plain form; the message lists up to five.
    """
    faults: list[tuple[str, str]] = []
    found = {
        name: _plain(value, name, faults, lenient=name in _HYPER_PARAMETERS)
        for name, value in contents.items()
        if name not in _HYPER_PARAMETER_TYPES
    }
    if faults:
        shown = ", ".join(f"{name} (of type {kind})" for name, kind in faults[:_SHOWN])
        hints = []
        if any(name.startswith(_HYPER_PARAMETERS) for name, _ in faults):
            hints.append("exclude them with save_hyperparameters(ignore=[...])")
        if any(not name.startswith(_HYPER_PARAMETERS) for name, _ in faults):
            hints.append(
                "keep plain values and tensors in state_dict() and on_save_checkpoint(), and convert them back"
            )
        raise CheckpointError(
            f"a checkpoint cannot store {shown}{and_more(faults, _SHOWN)}: loading it would need unpickling",
            hint="; ".join(hints),
        )
    return found


def split_off_extra(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a module's state dict into tensors and extra state (from ``get_extra_state()`` or a hook).

    Raises:
        CheckpointError: the extra state has no plain form.
    """
    extra = {name: v for name, v in state.items() if name.endswith("_extra_state") or not isinstance(v, Tensor)}
    return {name: value for name, value in state.items() if name not in extra}, plain_contents(extra)


def check_tensors(tensors: Tensors) -> None:
    """Reject tensors that a checkpoint cannot store.

    Raises:
        CheckpointError: a tensor is sparse, nested, quantized or on the meta device.
    """
    for name, tensor in leaves(tensors):
        kind = str(tensor.layout).removeprefix("torch.") if tensor.layout != torch.strided else ""
        kind = kind or ("quantized" if tensor.is_quantized else "meta" if tensor.is_meta else "")
        if kind or tensor.is_nested:
            raise CheckpointError(
                f"a checkpoint cannot store {name}, a {kind or 'nested'} tensor",
                hint="register it with persistent=False if it can be rebuilt, or make it a dense tensor",
            )


def check_hooks(given: Mapping[str, Any], saved: Mapping[str, Any], *, partly: bool, suspects: Iterable[str]) -> None:
    """Reject hooks that replace or add weights: the change would be saved but never loaded.

    Args:
        given: the model's weights by name.
        saved: the weights after all ``on_save_checkpoint`` hooks have run.
        partly: the module can resume without some weights (``strict_loading = False``).
        suspects: the modules and callbacks with such a hook.

    Raises:
        CheckpointError: weights were added, replaced, or removed from a module that needs all of them.
    """
    who = " or ".join(suspects) or "a hook"
    added = [name for name in saved if name not in given]
    replaced = [name for name in saved if name in given and saved[name] is not given[name]]
    if added or replaced:
        name = (replaced or added)[0]
        raise CheckpointError(
            f"on_save_checkpoint() of {who} {'replaces' if replaced else 'adds'} {name} in the checkpoint's state_dict,"
            " which a resume would not undo",
            hint="store extra tensors under another key of the checkpoint, and convert weights after training; for"
            " averaged weights use disttrain.EMA",
        )
    removed = [name for name in given if name not in saved]
    if removed and not partly:
        raise CheckpointError(
            f"on_save_checkpoint() of {who} removes {removed[0]}{and_more(removed)} from the checkpoint's state_dict:"
            " it could not be resumed from",
            hint="set strict_loading = False if the module restores these weights itself",
        )


def savers(module: pl.LightningModule, callbacks: Iterable[Any]) -> list[str]:
    """Return the class names of the module and callbacks that override ``on_save_checkpoint``."""
    own = type(module).on_save_checkpoint is not pl.LightningModule.on_save_checkpoint
    named = [class_name(module)] if own else []
    for callback in callbacks:
        hook = inspect.getattr_static(type(callback), "on_save_checkpoint", None)
        # disttrain's own callbacks only touch their own state.
        if hook is not None and not getattr(hook, "__module__", "").startswith(("disttrain.", _BASE)):
            named.append(type(callback).__name__)
    return named


def _plain(value: Any, name: str, faults: list[tuple[str, str]], *, lenient: bool, outer: tuple[int, ...] = ()) -> Any:
    if type(value) in _AS_THEY_ARE:
        return value
    if len(outer) > DEEPEST or id(value) in outer:
        faults.append((name, f"{_kind(value)}, nested in itself or too deep"))
        return None
    inner = functools.partial(_plain, faults=faults, lenient=lenient, outer=(*outer, id(value)))
    if isinstance(value, Tensor):
        if not isinstance(value, DTensor) and value.layout == torch.strided:
            return value.detach() if type(value) in (Tensor, nn.Parameter) else value.detach().as_subclass(Tensor)
    elif isinstance(value, dict):
        made = {}
        for key, entry in value.items():
            at = f"{name}.{_shown(key)}"
            made[_hashable(key, inner(key, at), at, faults)] = inner(entry, at)
        return type(value)(made) if type(value) in (collections.OrderedDict, collections.Counter) else made
    elif isinstance(value, list | tuple | set | frozenset):
        if lenient and hasattr(value, "_asdict"):
            return inner(value._asdict(), name)
        kind = next(base for base in (list, tuple, set, frozenset) if isinstance(value, base))
        entries = [inner(v, f"{name}.{place}") for place, v in enumerate(value)]
        if kind in (list, tuple):
            return kind(entries)
        return {_hashable(*both, f"{name}.{at}", faults) for at, both in enumerate(zip(value, entries, strict=True))}
    elif isinstance(value, np.generic) and not isinstance(
        value.item(), np.generic | datetime.date | datetime.timedelta
    ):
        return inner(value.item(), name)
    elif (base := next((make for kind, make in _BASES if isinstance(value, kind)), None)) is not None:
        return base(value)
    elif lenient:
        for described in _described(value):
            return inner(described, name)
    faults.append((name, _kind(value)))
    return None


def _hashable(value: Any, plain: Any, name: str, faults: list[tuple[str, str]]) -> Any:
    """Return ``plain`` if it is hashable: as a key or set member, a frozenset cannot become a set."""
    try:
        hash(plain)
    except TypeError:
        faults.append((name, f"{_kind(value)}, used as a key or in a set"))
        return None
    return plain


def _described(value: Any) -> Iterator[Any]:
    """Yield a plain form of a value that is only recorded, if it has one."""
    if isinstance(value, _TEXTS):
        yield str(value)
    elif isinstance(value, enum.Enum):
        yield value.value if isinstance(value.value, bool | int | float | str) else value.name
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    elif isinstance(value, Namespace | types.SimpleNamespace):
        yield vars(value)
    elif isinstance(value, Mapping):  # including OmegaConf's
        yield dict(value.items())
    elif isinstance(value, collections.deque):
        yield list(value)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufcUS":
        if value.size > _LONGEST_LIST and value.dtype.kind in "biufc":
            with suppress(TypeError):  # PyTorch lacks this dtype
                yield torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))  # accepts any strides; writable
        yield value.tolist()
    elif isinstance(value, functools.partial):
        yield {"function": value.func, "arguments": value.args, "keywords": value.keywords}
    elif isinstance(value, type | types.FunctionType | types.BuiltinFunctionType) and "<" not in value.__qualname__:
        yield f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, nn.Module):  # its parameters are saved with the weights
        yield f"{type(value).__module__}.{type(value).__qualname__}"
    elif type(value).__module__.startswith("omegaconf.") and hasattr(value, "__iter__"):
        yield list(value)


def _kind(value: Any) -> str:
    kind = type(value)
    if isinstance(value, Tensor):
        return f"{kind.__name__}, sharded" if isinstance(value, DTensor) else f"{kind.__name__}, {value.layout}"
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _shown(key: Any) -> str:
    return key if isinstance(key, str) else repr(key)[:80]


def and_more(found: Sized, shown: int = 1) -> str:
    """Return ' and N more' if a message shows only the first ``shown`` entries."""
    return f" and {len(found) - shown} more" if len(found) > shown else ""
