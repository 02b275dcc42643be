"""What a checkpoint may hold besides tensors: plain values, and what is refused by its name and type.

Plain are None, bool, int, float, str and bytes, and lists, tuples and dictionaries of plain values and tensors: all
that can be read back without running code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from disttrain.errors import CheckpointError

_PLAIN: Final = (type(None), bool, int, float, str, bytes)


def divide(value: Any, path: str, tensors: dict[str, Tensor], where: str) -> Any:
    """A value as tagged plain values; its tensors go into ``tensors`` under the paths that lead to them.

    Args:
        value: what to save.
        path: dotted name of the value.
        tensors: receives the tensors; their memory is shared.
        where: what the value is, for messages.

    Raises:
        CheckpointError: it holds something that is neither plain nor a tensor, or two tensors have one path.
    """
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter, DTensor) or value.layout != torch.strided or value.is_quantized:
            raise _refused(where, f"{type(value).__name__} of layout {value.layout}")
        if isinstance(value, DTensor) and any(placement.is_partial() for placement in value.placements):
            raise _refused(where, "DTensor whose parts are not yet added")
        if path in tensors:
            raise CheckpointError(f"{where} has the name of another tensor, {path}", mend="give it another key")
        tensors[path] = value.detach()
        return ("tensor", value.device.type)
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in _PLAIN:
        return ("value", value)
    if type(value) is dict:
        for key in value:
            if type(key) not in _PLAIN:
                raise _refused(where, f"dict with a key of type {type(key).__name__}")
        return ("dict", [(key, divide(v, f"{path}.{key}", tensors, f"{where}[{key!r}]")) for key, v in value.items()])
    if type(value) in (list, tuple):
        return (
            type(value).__name__,
            [divide(v, f"{path}.{place}", tensors, f"{where}[{place}]") for place, v in enumerate(value)],
        )
    raise _refused(where, type(value).__name__)


def check_plain(value: Any, where: str) -> None:
    """Refuse what cannot be saved as it is, in ``meta.pt``.

    Raises:
        CheckpointError: it holds something that is neither plain nor a tensor.
    """
    for inner in _inside(value):
        if type(inner) not in (*_PLAIN, Tensor):
            raise _refused(where, type(inner).__name__)


def split_off_extra(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a module's state dict, and what ``get_extra_state()`` or a hook has added to them.

    Raises:
        CheckpointError: that is neither plain nor made of tensors.
    """
    extra = {name: v for name, v in state.items() if name.endswith("_extra_state") or not isinstance(v, Tensor)}
    for name, value in extra.items():
        check_plain(value, f"{name} of the model's state_dict()")
    return {name: value for name, value in state.items() if name not in extra}, extra


def _inside(value: Any) -> Iterator[Any]:
    if type(value) in (list, tuple):
        for inner in value:
            yield from _inside(inner)
    elif type(value) is dict:
        for key, inner in value.items():
            yield key
            yield from _inside(inner)
    else:
        yield value


def _refused(where: str, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is of type {kind}, which a checkpoint cannot hold",
        mend="keep tensors, numbers, texts, None, and lists, tuples and dictionaries of these; or convert it where the"
        " state is given and taken (state_dict() and load_state_dict(), get_extra_state() and set_extra_state())",
    )
