"""Build micro batches from sample ids: read, decode, transform, collate, mask.

A batch is a dictionary with the decoded fields by name, plus:

- ``__key__``: list of sample keys,
- ``__id__``: ids in the index, int64, shape (samples,),
- ``__weight__``: loss weights, float32, shape (samples,): 1, or the value of ``data.hooks.weight``; 0 for padding and
  for bad and filtered samples,
- ``__count__``: the number of real samples, which come first (a Python int, so reading it never syncs a device),
- ``__bad__``: list of the skipped bad samples; present only if there are any,
- ``__filtered__``: number of samples that the transform filtered; present only if there are any.

One read serves several micro batches, but the contents of each depend only on its own ids. Bad and filtered samples
move to the end of their micro batch. Cost: without hooks, no Python loop over samples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disttrain.data.decode.allowed_values import (
    BAD,
    COUNT,
    FILTERED,
    ID,
    KEY,
    RESERVED,
    WEIGHT,
    WEIGHTS,
    Allowed,
    as_weights,
    check_names,
)
from disttrain.data.decode.rng import Draws
from disttrain.data.loader.transforms import HooksConfig, Sample, collate_samples, column, stack
from disttrain.data.reader.bad_sample_policy import BadSample, BadSampleError, FilteredSampleError
from disttrain.data.reader.sample_reader import Reader, Samples
from disttrain.errors import ConfigError, nearest

__all__ = ["BAD", "COUNT", "FILTERED", "ID", "KEY", "RESERVED", "WEIGHT", "Batch", "BatchMaker"]

Batch = dict[str, Any]

_NUMBERS: Final = count()
_MADE_HERE: Final = frozenset(RESERVED) - {KEY}


def check_batch(batch: Any, owner: object) -> Any:
    """Check that a batch, from any loader, has the entries that a task needs.

    Args:
        batch: the batch, of any type.
        owner: the task that needs it, for the error message.

    Returns:
        The batch, unchanged.

    Raises:
        ConfigError: an entry is missing.
    """
    missing = [name for name in (KEY, WEIGHT, COUNT) if not isinstance(batch, Mapping) or name not in batch]
    if missing:
        raise ConfigError(
            f"{type(owner).__name__} is a disttrain.Task, but its loader returns a {type(batch).__name__}"
            + (f" without {', '.join(missing)}" if isinstance(batch, Mapping) else ""),
            hint="use disttrain.ShardedDataModule, add these entries to each batch (disttrain/data/loader/batches.py),"
            " or derive the module from lightning.pytorch.LightningModule, which accepts any batch",
        )
    return batch


class BatchMaker:
    """Build micro batches. Thread-safe.

    Args:
        reader: reads the samples.
        hooks: transform and collate.
        allowed: values that a field may hold after the transform; a sample with any other value is bad.
        skip_bad: mask bad samples instead of raising.

    Raises:
        ConfigError: ``hooks.weight`` does not name a field.
    """

    def __init__(
        self,
        reader: Reader,
        hooks: HooksConfig | None = None,
        *,
        allowed: Mapping[str, Allowed] | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.reader, self.hooks, self.skip_bad = reader, hooks or HooksConfig(), skip_bad
        self.allowed = dict(allowed or {})
        self.number = next(_NUMBERS)
        """Identifies this maker in worker processes."""
        self._stand_in_id = 0
        weight = self.hooks.weight
        self._checks = self.allowed | ({weight: WEIGHTS} if weight else {})
        if self.hooks.transform is None and weight and weight not in reader.fields:
            raise ConfigError(
                f"data.hooks.weight is {weight!r}, which is not one of data.fields",
                hint=f"name the field that holds the weights; {nearest(weight, reader.fields)}",
            )
        reader.require(self._checks if self.hooks.transform is None else {})

    @property
    def draws_numbers(self) -> bool:
        """Whether the transform or any augmentation draws random numbers in training."""
        return self.hooks.transform is not None or any(field.augment for field in self.reader.fields.values())

    def make(
        self, ids: NDArray[np.int64], counts: NDArray[np.int64] | None = None, draws: Draws | None = None
    ) -> list[Batch]:
        """Build micro batches from one read.

        Args:
            ids: the sample ids. shape (micro batches, samples)
            counts: number of real samples in each micro batch, which come first; None if all are real.
                shape (micro batches,)
            draws: random numbers for all samples, in training.

        Raises:
            DataError: a shard cannot be read, or a sample is bad and ``skip_bad`` is off.
        """
        rows, size = ids.shape
        real = np.full(rows, size) if counts is None else counts
        read, samples, filtered = self._read(ids.ravel(), real, draws)
        unused = read.bad.keys() | filtered
        if unused:
            bad, left_out = _by_row(read.bad, real, size), _by_row(filtered, real, size)
            real, order = _to_the_right(unused, real, size)
            ids = ids.ravel()[order].reshape(rows, size)
            read = _reordered(read, order)
            samples = None if samples is None else [samples[place] for place in order.tolist()]
        weights = self._weights(read, samples, rows, size)
        counted = real.tolist()
        for row, real_here in enumerate(counted):
            if real_here < size:
                weights[row, real_here:] = 0.0
        names, columns = self._columns(read, rows, size) if samples is None else ([], [])
        names += [KEY, ID, WEIGHT, COUNT]
        columns += [_cut(read.keys, size), torch.from_numpy(ids.copy()).unbind(0), weights.unbind(0), counted]
        batches: list[Batch] = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        if samples is not None:
            batches = [self._collate(part, own) | own for part, own in zip(_cut(samples, size), batches, strict=True)]
        if unused:
            for batch, bad_here, left_out_here in zip(batches, bad, left_out, strict=True):
                batch.update({BAD: [read.bad[place] for place in bad_here]} if bad_here else {})
                batch.update({FILTERED: len(left_out_here)} if left_out_here else {})
        return batches

    def _weights(self, read: Samples, samples: list[Sample] | None, rows: int, size: int) -> Tensor:
        """Return the loss weights before masking. shape (micro batches, samples)"""
        if not self.hooks.weight:
            return torch.ones(rows, size)
        name = self.hooks.weight
        return as_weights(read.fields[name] if samples is None else [s[name] for s in samples]).reshape(rows, size)

    def _read(
        self, ids: NDArray[np.int64], real: NDArray[np.int64], draws: Draws | None
    ) -> tuple[Samples, list[Sample] | None, set[int]]:
        """Return what was read, its samples one by one if there are hooks, and the places of filtered samples."""
        read = self.reader.samples(ids, draws, mark_bad=self.skip_bad)
        if self.hooks.transform is None and self.hooks.collate is None:
            return read, None, set()
        samples = _one_by_one(read)
        if self.hooks.transform is None:
            return read, samples, set()
        filtered: set[int] = set()
        refused: dict[int, str] = {}
        for place, sample in enumerate(samples):
            try:
                samples[place] = self._transform(sample, draws, place)
            except FilteredSampleError:
                filtered.add(place)
            except BadSampleError as error:
                refused[place] = str(error)
        made = [place for place in range(len(samples)) if place not in filtered and place not in refused]
        faults = self._faults([samples[place] for place in made])
        refused |= {made[number]: fault for number, fault in faults.items()}
        for place in sorted(refused):
            found = self._refused(int(ids[place]), refused[place])
            if not self.skip_bad:
                raise found.error() from None
            read.bad.setdefault(place, found)
            own = None if draws is None else draws.of(np.array([place]))
            samples[place] = self._substitute(int(ids[place]), own)[1] | {KEY: read.keys[place]}
        size = len(ids) // len(real)
        stand_in: Sample | None = None
        for place in filtered:
            # Its weight is 0, so any values do: take those of the first remaining sample of the micro batch, if any.
            row = range(place - place % size, place - place % size + int(real[place // size]))
            kept = next((other for other in row if other not in filtered), None)
            if kept is not None:
                values = samples[kept]
            else:
                values = stand_in = stand_in or self._stand_in(draws)
            samples[place] = values | {KEY: read.keys[place]}
        return read, samples, filtered - read.bad.keys()

    def _transform(self, sample: Sample, draws: Draws | None, place: int) -> Sample:
        assert self.hooks.transform is not None
        random = None if draws is None else draws.generator(place, "transform")
        key = sample[KEY]
        try:
            out = self.hooks.transform(sample, random)
        except (BadSampleError, FilteredSampleError):
            raise
        except Exception as error:  # user code: keep its error and traceback, and add the sample
            error.add_note(f"in data.hooks.transform, of sample {key!r}")
            raise
        if not isinstance(out, dict):
            raise ConfigError(
                f"data.hooks.transform returned a {type(out).__name__}",
                hint="return the sample as a dictionary; raise disttrain.FilteredSampleError to skip it",
            )
        self._check(out, key)
        return out

    def _check(self, out: Sample, key: str) -> None:
        """Check the return value of a transform.

        Raises:
            ConfigError: a name is reserved, the key was changed, or the weight is missing.
        """
        if not _MADE_HERE.isdisjoint(out):
            check_names(out, where="the return value of data.hooks.transform", allowed=KEY)
        if out.get(KEY, key) != key:
            raise ConfigError(
                f"data.hooks.transform returned the key {out[KEY]!r} for sample {key!r}",
                hint=f"leave {KEY} unchanged, and return your value under another name",
            )
        if self.hooks.weight and self.hooks.weight not in out:
            raise ConfigError(
                f"data.hooks.weight is {self.hooks.weight!r}, which data.hooks.transform does not return",
                hint=f"return it for every sample, or correct the name; {nearest(self.hooks.weight, out)}",
            )

    def _faults(self, samples: Sequence[Sample]) -> dict[int, str]:
        """Return the fault of each transformed sample that holds a value that is not allowed, by place."""
        found: dict[int, str] = {}
        for name, allowed in self._checks.items():
            places = [place for place, sample in enumerate(samples) if name in sample]
            if places:
                for number, fault in allowed.faults(stack([samples[place][name] for place in places])).items():
                    found.setdefault(places[number], f"it returned {name!r}: {fault}")
        return found

    def _stand_in(self, draws: Draws | None) -> Sample:
        """Return placeholder values for a micro batch with no samples left: the first sample the transform accepts.

        The choice depends only on the data, the seed and the transform, so all ranks and workers agree on it.
        """
        fixed = None if draws is None else Draws(draws.seed, np.zeros(1, np.int64), np.zeros(1, np.int64))
        self._stand_in_id, values = self._substitute(self._stand_in_id - 1, fixed)
        return values

    def _substitute(self, sample_id: int, draws: Draws | None) -> tuple[int, Sample]:
        """Return the id and values of the next sample that the transform accepts, to replace one that it rejected.

        Args:
            sample_id: the id to search from, exclusive.
            draws: random numbers for one sample.
        """
        wanted = sample_id
        for _ in range(len(self.reader.index)):
            wanted = self.reader.next_good(wanted)
            read = self.reader.samples(np.array([wanted]), draws, mark_bad=True)
            if read.bad:  # holds another sample's values; next_good skips it from now on
                continue
            try:
                made = self._transform(_one_by_one(read)[0], draws, 0)
            except (BadSampleError, FilteredSampleError):
                continue
            if not self._faults([made]):
                return wanted, made
        raise ConfigError("data.hooks.transform rejects every sample", hint="correct the transform")

    def _refused(self, sample_id: int, why: str) -> BadSample:
        reason = f" was rejected by data.hooks.transform: {why}"
        return self.reader.bad_sample(sample_id, "", -1, reason, "repair the sample or remove it")

    def _columns(self, read: Samples, rows: int, size: int) -> tuple[list[str], list[Sequence[Any]]]:
        """Return the names of a batch's fields, and for each a sequence with its values per micro batch."""
        names: list[str] = []
        columns: list[Sequence[Any]] = []
        for name, values in read.fields.items():
            field = self.reader.fields[name]
            if field.pad is None and isinstance(values, Tensor):
                names.append(name)
                columns.append(values.reshape(rows, size, *values.shape[1:]).unbind(0))
            elif isinstance(values[0], Tensor):
                # Stack or list per micro batch, not per read: a batch must not depend on what was read with it.
                parts = [column(name, list(part), field) for part in _cut(values, size)]
                names.extend(parts[0])
                columns.extend([part[made] for part in parts] for made in parts[0])
            else:
                names.append(name)
                columns.append(_cut(values, size))
        return names, columns

    def _collate(self, samples: Sequence[Sample], own: Batch) -> Batch:
        if self.hooks.collate is None:
            return collate_samples(samples, self.reader.fields)
        found = self.hooks.collate(samples)
        if not isinstance(found, dict):
            raise ConfigError(
                f"data.hooks.collate returned a {type(found).__name__}", hint="return a dictionary of fields"
            )
        check_names(found, where="the return value of data.hooks.collate", allowed=KEY)
        if KEY in found and list(found[KEY]) != own[KEY]:
            raise ConfigError(
                f"data.hooks.collate returned values of {KEY} that differ from the samples'",
                hint="omit it, and return your values under another name",
            )
        return dict(found)


def _cut(values: Any, size: int) -> list[Any]:
    """Cut a sequence into pieces of ``size`` values."""
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


def _by_row(places: Iterable[int], real: NDArray[np.int64], size: int) -> list[list[int]]:
    """Group places by row, ascending; places in the padding are ignored."""
    found: list[list[int]] = [[] for _ in real]
    for place in sorted(places):
        row, column_ = divmod(place, size)
        if column_ < real[row]:
            found[row].append(place)
    return found


def _to_the_right(
    unused: Collection[int], real: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Move unused samples behind the others of their micro batch.

    Returns:
        the number of real samples left in each row, and the places in their new order.
    """
    is_real = np.arange(size) < real[:, None]
    is_unused = np.zeros(is_real.size, dtype=bool)
    is_unused[list(unused)] = True
    is_good = is_real & ~is_unused.reshape(is_real.shape)
    within = np.argsort(~is_good, axis=1, kind="stable")
    return is_good.sum(axis=1), (within + np.arange(len(real))[:, None] * size).ravel()
