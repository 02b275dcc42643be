"""What research code may do to samples between reading and training: transform each, collate a micro batch.

A transform gets one decoded sample and, in training, a random generator of its own that is keyed by seed, epoch
and sample: what it draws from that generator is the same whichever rank, thread or process runs it. Global
generators (``random``, ``numpy.random``, ``torch``) are not, and break the promise that a run does not know its
ranks. A collate gets the samples of one micro batch. Both run in the reading threads, or in worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disttrain.data.checks import KEY, LENGTHS, check_names
from disttrain.data.field import Field
from disttrain.data.values import Decoded, stacked
from disttrain.errors import DataError

Sample = dict[str, Any]
SampleTransform = Callable[[Sample, np.random.Generator | None], Sample]
"""From a sample (its decoded fields and ``__key__``) and a generator, None in evaluation, to a sample."""
Collate = Callable[[Sequence[Sample]], dict[str, Any]]
"""From the samples of a micro batch to its fields."""


@dataclass(frozen=True)
class HooksConfig:
    """Code of one's own between reading and training.

    Attributes:
        transform: called on every sample, in training with a random generator of the sample's own, in
            evaluation with None. It may raise :class:`~disttrain.data.bad_samples.BadSampleError`, or
            :class:`~disttrain.data.bad_samples.FilteredSampleError` for a sample that is not wanted.
        collate: makes a micro batch of its samples; by default numbers and tensors are stacked, tensors of
            fields with ``pad`` padded, and all else listed.
        weight: name of the field, or of the value that the transform returns, that weighs each sample's loss: one
            finite number of 0 or more. By default all samples weigh 1.
    """

    transform: SampleTransform | None = None
    collate: Collate | None = None
    weight: str = ""


def collate_samples(samples: Sequence[Sample], fields: Mapping[str, Field]) -> dict[str, Any]:
    """Samples side by side, by the name of each value.

    Tensors, arrays and numbers are stacked where all have one shape, and padded where their field says so
    (see :func:`pad_tensors`); anything else becomes a list.

    Raises:
        DataError: the samples have different names, or a padded field's tensors do not fit together.
        ConfigError: one has the name of a padded field's lengths.
    """
    batch: dict[str, Any] = {}
    names = [name for name in samples[0] if name != KEY]  # the batch has the keys, whatever a transform returns
    padded = [name for name in names if (field := fields.get(name)) is not None and field.pad is not None]
    check_names(names, padded, where="what data.hooks.transform returns")
    for sample in samples[1:]:
        if odd := (sample.keys() - {KEY}) ^ set(names):
            raise DataError(
                f"the transform gave some samples a value {min(odd, key=str)!r} and others none",
                mend="give it to all samples",
            )
    for name in names:
        batch.update(column(name, [sample[name] for sample in samples], fields.get(name)))
    return batch


def column(name: str, values: Sequence[Any], field: Field | None = None) -> dict[str, Any]:
    """One name's values over a micro batch: a tensor, a padded tensor and its lengths, or a list."""
    values = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values]
    if field is not None and field.pad is not None:
        padded, lengths = pad_tensors(name, values, field.pad)
        return {name: padded, name + LENGTHS: lengths}
    return {name: stack(values)}


def stack(values: list[Any]) -> Decoded:
    """Tensors of one shape and type as one, numbers as a tensor, all else as it is."""
    first = values[0]
    if isinstance(first, (bool, int, float, np.number)) and all(type(v) is type(first) for v in values):
        try:
            return torch.tensor(values)
        except (RuntimeError, TypeError, ValueError):  # an integer that int64 cannot hold
            return values
    return stacked(values)


def pad_tensors(name: str, values: Sequence[Any], fill: float) -> tuple[Tensor, Tensor]:
    """Tensors of different lengths as one, filled up on the right.

    Args:
        name: what errors call them.
        values: tensors that differ in their first dim at most. shapes (length, ...)
        fill: what follows the end of the shorter ones.

    Returns:
        the tensor, shape (samples, longest, ...), and the lengths, int64, shape (samples,).

    Raises:
        DataError: they differ in another dim or type, or have no first dim.
    """
    first = values[0]
    for value in values:
        fits = isinstance(value, Tensor) and value.ndim and value.shape[1:] == first.shape[1:]
        if not fits or value.dtype != first.dtype:
            raise DataError(
                f"field {name!r} is to be padded, but holds {_words(value)} beside {_words(first)}",
                mend="only the first dim may differ: leave out pad, or give the field a transform",
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
