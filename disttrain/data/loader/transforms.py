"""User hooks between reading and training: transform each sample, collate each micro batch.

A transform gets one decoded sample and, in training, a generator keyed by seed, epoch and sample: its draws are the
same whichever rank, thread or process runs it. Draws from global generators (``random``, ``numpy.random``, ``torch``)
are not, and make the results depend on the number of ranks. A collate function gets the samples of one micro batch.
Both run in the reader threads, or in worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disttrain.data.decode.allowed_values import KEY, LENGTHS, check_names
from disttrain.data.decode.field import Field
from disttrain.data.decode.values import Decoded, stacked
from disttrain.errors import DataError

Sample = dict[str, Any]
SampleTransform = Callable[[Sample, np.random.Generator | None], Sample]
"""Maps a sample (its decoded fields and ``__key__``) and a generator (None in evaluation) to a sample."""
Collate = Callable[[Sequence[Sample]], dict[str, Any]]
"""Maps the samples of a micro batch to its fields."""


@dataclass(frozen=True)
class HooksConfig:
    """User code between reading and training.

    Attributes:
        transform: called on every sample, with a per-sample random generator in training and None in evaluation. It
            may raise :class:`~disttrain.data.reader.bad_sample_policy.BadSampleError`, or
            :class:`~disttrain.data.reader.bad_sample_policy.FilteredSampleError` to filter one out.
        collate: builds a micro batch from its samples. By default numbers and tensors are stacked, tensors of
            fields with ``pad`` are padded, and anything else becomes a list.
        weight: name of the field, or of a value returned by the transform, that weights each sample's loss: one
            finite number >= 0. By default every weight is 1.
    """

    transform: SampleTransform | None = None
    collate: Collate | None = None
    weight: str = ""


def collate_samples(samples: Sequence[Sample], fields: Mapping[str, Field]) -> dict[str, Any]:
    """Collate samples into a batch, by name.

    Tensors, arrays and numbers of equal shape are stacked; fields with ``pad`` are padded (see :func:`pad_tensors`);
    anything else becomes a list.

    Raises:
        DataError: the samples have different names, or a padded field's tensors do not fit together.
        ConfigError: a name is reserved, or is the name of a padded field's lengths.
    """
    batch: dict[str, Any] = {}
    names = [name for name in samples[0] if name != KEY]  # BatchMaker adds the keys
    padded = [name for name in names if (field := fields.get(name)) is not None and field.pad is not None]
    check_names(names, padded, where="the return value of data.hooks.transform")
    for sample in samples[1:]:
        if odd := (sample.keys() - {KEY}) ^ set(names):
            raise DataError(
                f"data.hooks.transform returned {min(odd, key=str)!r} for some samples but not for others",
                hint="return it for every sample",
            )
    for name in names:
        batch.update(column(name, [sample[name] for sample in samples], fields.get(name)))
    return batch


def column(name: str, values: Sequence[Any], field: Field | None = None) -> dict[str, Any]:
    """Collate one name's values: to a tensor, a padded tensor and its lengths, or a list."""
    values = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values]
    if field is not None and field.pad is not None:
        padded, lengths = pad_tensors(name, values, field.pad)
        return {name: padded, name + LENGTHS: lengths}
    return {name: stack(values)}


def stack(values: list[Any]) -> Decoded:
    """Stack tensors of equal shape and dtype, turn numbers into a tensor, and return anything else unchanged."""
    first = values[0]
    if isinstance(first, (bool, int, float, np.number)) and all(type(v) is type(first) for v in values):
        try:
            return torch.tensor(values)
        except (RuntimeError, TypeError, ValueError):  # an integer that int64 cannot hold
            return values
    return stacked(values)


def pad_tensors(name: str, values: Sequence[Any], fill: float) -> tuple[Tensor, Tensor]:
    """Stack tensors of different lengths, padded at the end.

    Args:
        name: name for error messages.
        values: tensors that differ only in their first dim. shapes (length, ...)
        fill: the padding value.

    Returns:
        the tensor, shape (samples, longest, ...), and the lengths, int64, shape (samples,).

    Raises:
        DataError: the tensors differ in another dim or in dtype, or have no first dim.
    """
    first = values[0]
    for value in values:
        fits = isinstance(value, Tensor) and value.ndim and value.shape[1:] == first.shape[1:]
        if not fits or value.dtype != first.dtype:
            raise DataError(
                f"field {name!r} has pad, but holds both {_words(value)} and {_words(first)}",
                hint="only the first dim may differ: remove pad, or make the other dims equal in data.hooks.transform",
            )
    lengths = torch.tensor([len(value) for value in values], dtype=torch.int64)
    padded = first.new_full((len(values), int(lengths.max()), *first.shape[1:]), fill)
    for row, value in zip(padded, values, strict=True):
        row[: len(value)] = value
    return padded, lengths


def _words(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
