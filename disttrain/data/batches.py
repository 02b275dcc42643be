"""From sample ids to micro batches: read, decode, transform, collate, mask.

A batch is a dictionary: the decoded fields by name, and

- ``__key__``: list of sample keys,
- ``__id__``: ids in the index, int64, shape (samples,),
- ``__weight__``: 1 for a sample, 0 for padding and for bad samples, float32, shape (samples,),
- ``__count__``: how many samples, from the left, are real (a Python int: no device is asked),
- ``__bad__``: only where samples were skipped, the list of them.

Several micro batches are made at one go from one read; what each holds depends on its own ids alone. A skipped
sample moves to the right end of its micro batch. Cost: without hooks no loop over samples in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disttrain.data.bad_samples import BadSample, BadSampleError
from disttrain.data.draws import Draws
from disttrain.data.hooks import HooksConfig, Sample, collate_samples, column
from disttrain.data.reader import Reader, Samples
from disttrain.errors import ConfigError

KEY: Final = "__key__"
ID: Final = "__id__"
WEIGHT: Final = "__weight__"
COUNT: Final = "__count__"
BAD: Final = "__bad__"

Batch = dict[str, Any]

_NUMBERS: Final = count()


class BatchMaker:
    """Makes micro batches. Safe to use from several threads.

    Args:
        reader: reads the samples.
        hooks: transform and collate.
        skip_bad: mask samples that cannot be used instead of raising.
    """

    def __init__(self, reader: Reader, hooks: HooksConfig | None = None, *, skip_bad: bool = False) -> None:
        self.reader, self.hooks, self.skip_bad = reader, hooks or HooksConfig(), skip_bad
        self.number = next(_NUMBERS)
        """What worker processes know this maker by."""

    @property
    def draws_numbers(self) -> bool:
        """Whether anything in training draws random numbers for a sample."""
        return self.hooks.transform is not None or any(field.augment for field in self.reader.fields.values())

    def make(
        self, ids: NDArray[np.int64], counts: NDArray[np.int64] | None = None, draws: Draws | None = None
    ) -> list[Batch]:
        """Some micro batches.

        Args:
            ids: the samples. shape (micro batches, samples)
            counts: real samples of each micro batch, from the left; None where all are. shape (micro batches,)
            draws: random numbers for all of them, in training.

        Raises:
            DataError: a shard cannot be read, or a sample cannot be used and is not to be skipped.
        """
        rows, size = ids.shape
        read, samples = self._read(ids.ravel(), draws)
        bad: list[list[BadSample]] = []
        if read.bad:
            counts, order, bad = _to_the_right(read.bad, np.full(rows, size) if counts is None else counts, size)
            ids = ids.ravel()[order].reshape(rows, size)
            read = _reordered(read, order)
            samples = None if samples is None else [samples[place] for place in order.tolist()]
        real = [size] * rows if counts is None else counts.tolist()
        weights = torch.ones(rows, size)
        for row, real_here in enumerate(real):
            if real_here < size:
                weights[row, real_here:] = 0.0
        names, columns = self._columns(read, size) if samples is None else ([], [])
        names += [KEY, ID, WEIGHT, COUNT]
        columns += [_cut(read.keys, size), torch.from_numpy(ids.copy()).unbind(0), weights.unbind(0), real]
        batches: list[Batch] = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        if samples is not None:
            batches = [self._collate(part) | own for part, own in zip(_cut(samples, size), batches, strict=True)]
        for batch, found in zip(batches, bad, strict=False):
            if found:
                batch[BAD] = found
        return batches

    def _read(self, ids: NDArray[np.int64], draws: Draws | None) -> tuple[Samples, list[Sample] | None]:
        """What was read, and its samples one by one where hooks want them so."""
        read = self.reader.samples(ids, draws, mark_bad=self.skip_bad)
        if self.hooks.transform is None and self.hooks.collate is None:
            return read, None
        samples = _one_by_one(read)
        if self.hooks.transform is None:
            return read, samples
        for place, sample in enumerate(samples):
            try:
                samples[place] = self._transform(sample, draws, place)
            except BadSampleError as error:
                found = self._refused(int(ids[place]), error)
                if not self.skip_bad:
                    raise found.error() from None
                read.bad.setdefault(place, found)
                samples[place] = self._substitute(int(ids[place]), draws, place)
        return read, samples

    def _transform(self, sample: Sample, draws: Draws | None, place: int) -> Sample:
        assert self.hooks.transform is not None
        random = None if draws is None else draws.generator(place, "transform")
        try:
            out = self.hooks.transform(sample, random)
        except BadSampleError:
            raise
        except Exception as error:  # the user's code: its own error and traceback, with the sample that met it
            error.add_note(f"in data.hooks.transform, of sample {sample[KEY]!r}")
            raise
        if not isinstance(out, dict):
            raise ConfigError(
                f"data.hooks.transform returned a {type(out).__name__}", mend="return the sample, a dictionary"
            )
        return out

    def _substitute(self, sample_id: int, draws: Draws | None, place: int) -> Sample:
        """The next sample that the transform accepts, in place of one that it refused."""
        wanted = sample_id
        while True:
            wanted = self.reader.next_good(wanted)
            if wanted == sample_id:
                raise ConfigError("data.hooks.transform refuses every sample", mend="correct the transform")
            (sample,) = _one_by_one(self.reader.samples(np.array([wanted]), draws, mark_bad=True))
            try:
                return self._transform(sample, draws, place)
            except BadSampleError:
                continue

    def _refused(self, sample_id: int, error: BadSampleError) -> BadSample:
        reason = f" was refused by data.hooks.transform: {error}"
        return self.reader.bad_sample(sample_id, "", -1, reason, "repair the sample or remove it")

    def _columns(self, read: Samples, size: int) -> tuple[list[str], list[Sequence[Any]]]:
        """Names of the fields of a batch, and the values of each, one a micro batch."""
        names: list[str] = []
        columns: list[Sequence[Any]] = []
        for name, values in read.fields.items():
            field = self.reader.fields[name]
            if field.pad is None and isinstance(values, Tensor):
                names.append(name)
                columns.append(values.reshape(-1, size, *values.shape[1:]).unbind(0))
            elif isinstance(values[0], Tensor):
                # Whether a field's values have one shape is asked of each micro batch, not of a whole read.
                parts = [column(name, list(part), field) for part in _cut(values, size)]
                names.extend(parts[0])
                columns.extend([part[made] for part in parts] for made in parts[0])
            else:
                names.append(name)
                columns.append(_cut(values, size))
        return names, columns

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        if self.hooks.collate is None:
            return collate_samples(samples, self.reader.fields)
        found = self.hooks.collate(samples)
        if not isinstance(found, dict):
            raise ConfigError(
                f"data.hooks.collate returned a {type(found).__name__}", mend="return a dictionary of fields"
            )
        return dict(found)


def _cut(values: Any, size: int) -> list[Any]:
    """A sequence in pieces of so many values."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def _reordered(read: Samples, order: NDArray[np.int64]) -> Samples:
    places = order.tolist()
    fields = {
        name: values[order] if isinstance(values, Tensor) else [values[place] for place in places]
        for name, values in read.fields.items()
    }
    return Samples(fields, [read.keys[place] for place in places], read.bad)


def _one_by_one(read: Samples) -> list[Sample]:
    return [
        {KEY: key, **{name: values[place] for name, values in read.fields.items()}}
        for place, key in enumerate(read.keys)
    ]


def _to_the_right(
    bad: dict[int, BadSample], counts: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[list[BadSample]]]:
    """Bad samples behind the good ones of their micro batch.

    Returns:
        how many samples of each row remain real, the places in their new order, and each row's bad samples.
    """
    is_real = np.arange(size) < counts[:, None]
    is_bad = np.zeros(is_real.size, dtype=bool)
    is_bad[list(bad)] = True
    is_good = is_real & ~is_bad.reshape(is_real.shape)
    within = np.argsort(~is_good, axis=1, kind="stable")
    order = (within + np.arange(len(counts))[:, None] * size).ravel()
    found: list[list[BadSample]] = [[] for _ in counts]
    for place in sorted(bad):
        row, column_ = divmod(place, size)
        if column_ < counts[row]:  # padding that is bad harms nobody
            found[row].append(bad[place])
    return is_good.sum(axis=1), order, found
