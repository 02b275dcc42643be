"""Remove a module's outputs for padding, keeping those for real samples.

The last micro batches of an evaluation are padded so that all ranks run the same number of forward passes; real
samples come first. A ``Task`` trims its own outputs. For any other module, each value is cut along its first
dimension. A value that cannot be cut unambiguously is rejected at the first micro batch. Costs nothing unless a micro
batch holds padding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from disttrain.data.loader.batches import COUNT, WEIGHT
from disttrain.errors import ConfigError
from disttrain.parallel.model.trained_parameters import class_name


class Rows(NamedTuple):
    """Row counts of a micro batch.

    Attributes:
        size: all rows, padding included.
        real: rows of real samples, which come first.
    """

    size: int
    real: int


class _UnclearError(Exception):
    """Raised for a value that cannot be cut; the message describes it."""


def rows_of(batch: Any) -> Rows | None:
    """Return the row counts of a disttrain micro batch; None for any other batch."""
    if isinstance(batch, Mapping) and COUNT in batch and WEIGHT in batch:
        return Rows(len(batch[WEIGHT]), int(batch[COUNT]))
    return None


def real_outputs(outputs: Any, rows: Rows | None, module: nn.Module, *, check: bool = False) -> Any:
    """Return a module's outputs for the real samples of a micro batch.

    Args:
        outputs: a tensor, an array or a list with one row per sample, or dictionaries, tuples, lists or dataclasses of
            these; None is returned unchanged.
        rows: row counts of the micro batch; None if it is not one of disttrain's.
        module: the module that returned them, for the message.
        check: also check outputs of a micro batch without padding, since a later one will have some.

    Raises:
        ConfigError: a value has neither one row per sample of the micro batch nor one per real sample.
    """
    if rows is None or (rows.real == rows.size and not check):
        return outputs
    try:
        cut = _cut(outputs, rows)
    except _UnclearError as unclear:
        raise ConfigError(
            f"predict_step of {class_name(module)} returned {unclear} for a micro batch of {rows.size}, so the"
            " padding of the last micro batches cannot be removed",
            hint='return one row per sample, or slice by batch["__count__"] in predict_step',
        ) from None
    return outputs if rows.real == rows.size else cut


def real_rows(value: Any, rows: Rows) -> Any:
    """Like :func:`real_outputs`, but leave values that do not match the micro batch unchanged.

    A list with one item per sample is cut; a tuple is treated as a collection of values.
    """
    if isinstance(value, Tensor | np.ndarray | list):
        length = len(value) if isinstance(value, list) or value.ndim else -1
        return value[: rows.real] if length == rows.size else value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(real_rows(item, rows) for item in value)
    return _each(value, lambda item: real_rows(item, rows), value)


def _each(value: Any, cut: Callable[[Any], Any], default: Any = None) -> Any:
    """Apply ``cut`` to the items of a dataclass, mapping or named tuple; return the default for other types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: cut(getattr(value, name)) for name in fields})
    if isinstance(value, dict) and type(value) is not dict:
        found = copy.copy(value)
        for name in found:
            found[name] = cut(found[name])
        return found
    if isinstance(value, Mapping):
        return {name: cut(item) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(cut, value))
    return default


def _cut(value: Any, rows: Rows) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor | np.ndarray):
        length = value.shape[0] if value.ndim else -1
        if length not in rows:
            kind = "a tensor" if isinstance(value, Tensor) else "an array"
            raise _UnclearError(f"{kind} of shape {tuple(value.shape)}")
        return value[: rows.real]
    found = _each(value, lambda item: _cut(item, rows))
    if found is not None:
        return found
    if isinstance(value, list | tuple):
        return _cut_sequence(value, rows)
    raise _UnclearError(f"a {type(value).__name__}")


def _cut_sequence(value: Any, rows: Rows) -> Any:
    """Cut a list with one item per sample, or a short list of values with one row per sample each."""
    whole = len(value) in rows
    try:
        parts = [_cut(item, rows) for item in value] if value else None
    except _UnclearError:
        parts = None
    if whole and parts is not None and any(item is not None for item in parts):
        # Ambiguous: two samples' logits, or the logits and the labels of two samples? A wrong guess loses results.
        raise _UnclearError(
            f"a {type(value).__name__} of {len(value)} whose items may be samples or hold a row of each"
        )
    if whole:
        return value[: rows.real]
    if parts is None:
        raise _UnclearError(f"a {type(value).__name__} of {len(value)}")
    return type(value)(parts)
