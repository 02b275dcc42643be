"""Check the names and values of a batch.

Some names are set by disttrain itself (:data:`RESERVED`, and ``NAME_lengths`` for a padded field) and may not be used
for anything else. :class:`Allowed` defines which values a field may hold, such as the classes of a task. A sample with
any other value is a bad sample; it is detected on the host, where its shard and key are known. Cost: one array
comparison per read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disttrain.data.decode.values import Decoded
from disttrain.errors import ConfigError

KEY: Final = "__key__"
ID: Final = "__id__"
WEIGHT: Final = "__weight__"
COUNT: Final = "__count__"
BAD: Final = "__bad__"
FILTERED: Final = "__filtered__"
RESERVED: Final = (KEY, ID, WEIGHT, COUNT, BAD, FILTERED)
LENGTHS: Final = "_lengths"


@dataclass(frozen=True)
class Allowed:
    """The numbers that a value may hold: finite, ``least <= number < below``.

    Attributes:
        what: description of a valid number, for messages.
        least: lower bound, inclusive.
        below: upper bound, exclusive.
        whole: check only integer values; other types are left to the task to reject.
        single: each value must be a single number.
    """

    what: str = "a finite number"
    least: float = -math.inf
    below: float = math.inf
    whole: bool = False
    single: bool = False

    def faults(self, values: Decoded) -> dict[int, str]:
        """Describe the fault of each value that is not allowed, by place.

        Args:
            values: values of one field, one per sample.
        """
        if isinstance(values, Tensor):
            numbers = _numpy(values).reshape(len(values), math.prod(values.shape[1:]))
            if numbers.shape[1] == 1 or not self.single:
                fits = self._fit(numbers)
                # Fast path: all values fit.
                return (
                    {}
                    if fits.all()
                    else {p: self._words(numbers[p]) for p in np.flatnonzero(~fits.all(axis=1)).tolist()}
                )
        found = {place: self._fault(value) for place, value in enumerate(values)}
        return {place: fault for place, fault in found.items() if fault}

    def _fault(self, value: Any) -> str:
        if isinstance(value, (Tensor, np.ndarray, np.number, int, float)) and not isinstance(value, bool):
            numbers = np.atleast_1d(_numpy(value) if isinstance(value, Tensor) else np.asarray(value)).ravel()
            if len(numbers) == 1 or not self.single:
                return "" if self._fit(numbers).all() else self._words(numbers)
        if not self.single:
            return ""
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else ""
        return f"a {type(value).__name__}{shape} is not {self.what}"

    def _fit(self, numbers: NDArray[Any]) -> NDArray[np.bool_]:
        kind = numbers.dtype.kind
        if kind == "O" or (kind == "b" and self.single):  # a Python int beyond 64 bits, or a bool
            return np.zeros(numbers.shape, dtype=np.bool_)
        if kind not in ("iu" if self.whole else "iufb"):
            return np.ones(numbers.shape, dtype=np.bool_)
        if self.single and kind == "f":
            with np.errstate(over="ignore"):
                numbers = numbers.astype(np.float32)  # weights become float32, where a large float64 is infinite
        fits: NDArray[np.bool_] = np.isfinite(numbers)
        if self.least > -math.inf:
            fits &= numbers >= self.least
        if self.below < math.inf:
            fits &= numbers < self.below
        return fits

    def _words(self, numbers: NDArray[Any]) -> str:
        wrong = numbers[~self._fit(numbers)]
        return f"{wrong[0]} is not {self.what}"


FINITE: Final = Allowed()
WEIGHTS: Final = Allowed("a weight (a finite number >= 0)", least=0, single=True)


def classes(number: int) -> Allowed:
    """Allow only class labels.

    Args:
        number: number of classes.
    """
    return Allowed(f"one of the {number} classes 0 to {number - 1}", least=0, below=number, whole=True)


def as_weights(values: Decoded) -> Tensor:
    """Convert sample weights, one number each, to float32. shape (samples,)"""
    if isinstance(values, Tensor):
        return values.reshape(len(values)).float()
    return torch.tensor([float(value) for value in values], dtype=torch.float32)


def check_names(names: Iterable[str], padded: Collection[str] = (), *, where: str, allowed: str = "") -> None:
    """Reject names that disttrain reserves.

    Args:
        names: names of values in a batch.
        padded: the names of padded fields, whose lengths get a name too.
        where: the source of the names, for the error message.
        allowed: a reserved name that is allowed here.

    Raises:
        ConfigError: a name is reserved.
    """
    names = set(names)
    if taken := sorted(names.intersection(RESERVED) - {allowed}):
        raise ConfigError(
            f"{where} has {taken[0]!r}, but disttrain reserves the names {', '.join(RESERVED)}",
            hint="choose another name; to weight samples, set data.hooks.weight to the field that holds the weights",
        )
    for name in padded:
        if name + LENGTHS in names:
            raise ConfigError(
                f"{where} has {name + LENGTHS!r}, the name reserved for the lengths of the padded field {name!r}",
                hint=f"rename or remove it: pad of data.fields.{name} adds the lengths",
            )


def _numpy(values: Tensor) -> NDArray[Any]:
    values = values.detach()
    if values.layout != torch.strided:
        values = values.to_dense()
    if values.is_floating_point() and values.dtype not in (torch.float16, torch.float32, torch.float64):
        values = values.float()  # bfloat16 and float8, which NumPy lacks
    return values.numpy()
