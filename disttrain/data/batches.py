"""From sample ids to micro batches: read, decode, transform, collate, mask.

A batch is a dictionary: the decoded fields by name, and

- ``__key__``: list of sample keys,
- ``__id__``: ids in the index, int64, shape (samples,),
- ``__weight__``: 1 for a sample, or what ``data.hooks.weight`` names; 0 for padding, bad and filtered samples; float32,
  shape (samples,),
- ``__count__``: how many samples, from the left, are real (a Python int: no device is asked),
- ``__bad__``: only where bad samples were skipped, the list of them,
- ``__filtered__``: only where the transform left out samples, how many.

Several micro batches are made at one go from one read; what each holds depends on its own ids alone. A skipped or
filtered sample moves to the right end of its micro batch. Cost: without hooks no loop over samples in Python.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disttrain.data.bad_samples import BadSample, BadSampleError, FilteredSampleError
from disttrain.data.checks import (
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
from disttrain.data.draws import Draws
from disttrain.data.hooks import HooksConfig, Sample, collate_samples, column, stack
from disttrain.data.reader import Reader, Samples
from disttrain.errors import ConfigError, nearest

__all__ = ["BAD", "COUNT", "FILTERED", "ID", "KEY", "RESERVED", "WEIGHT", "Batch", "BatchMaker"]

Batch = dict[str, Any]

_NUMBERS: Final = count()
_MADE_HERE: Final = frozenset(RESERVED) - {KEY}


def check_batch(batch: Any, owner: object) -> Any:
    """The batch; refuse one of a loader that is not disttrain's, unless it has what those have.

    Args:
        batch: any.
        owner: the task that needs it, for the message.

    Raises:
        ConfigError: it lacks something.
    """
    missing = [name for name in (KEY, WEIGHT, COUNT) if not isinstance(batch, Mapping) or name not in batch]
    if missing:
        raise ConfigError(
            f"{type(owner).__name__} is a disttrain.Task, and its loader gives a {type(batch).__name__}"
            + (f" without {', '.join(missing)}" if isinstance(batch, Mapping) else ""),
            mend="use disttrain.ShardedDataModule, or give each batch these entries (disttrain/data/batches.py), or"
            " derive the module from lightning.pytorch.LightningModule, which takes any batch",
        )
    return batch


class BatchMaker:
    """Makes micro batches. Safe to use from several threads.

    Args:
        reader: reads the samples.
        hooks: transform and collate.
        allowed: the numbers that a field may hold once it has been transformed; a sample with others is bad.
        skip_bad: mask samples that cannot be used instead of raising.

    Raises:
        ConfigError: there is no field of the name that ``hooks.weight`` is.
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
        """What worker processes know this maker by."""
        self._stand_in_id = 0
        weight = self.hooks.weight
        self._checks = self.allowed | ({weight: WEIGHTS} if weight else {})
        if self.hooks.transform is None and weight and weight not in reader.fields:
            raise ConfigError(
                f"data.hooks.weight is {weight!r}, which is not one of data.fields",
                mend=f"name the field that holds the weights; {nearest(weight, reader.fields)}",
            )
        reader.require(self._checks if self.hooks.transform is None else {})

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
        """The weight of each sample, where none is left out. shape (micro batches, samples)"""
        if not self.hooks.weight:
            return torch.ones(rows, size)
        name = self.hooks.weight
        return as_weights(read.fields[name] if samples is None else [s[name] for s in samples]).reshape(rows, size)

    def _read(
        self, ids: NDArray[np.int64], real: NDArray[np.int64], draws: Draws | None
    ) -> tuple[Samples, list[Sample] | None, set[int]]:
        """What was read, its samples one by one where hooks want them so, and which of them are filtered."""
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
            # Weight 0 makes any values do: those of the first sample of the micro batch that is left, if any is.
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
        except Exception as error:  # the user's code: its own error and traceback, with the sample that met it
            error.add_note(f"in data.hooks.transform, of sample {key!r}")
            raise
        if not isinstance(out, dict):
            raise ConfigError(
                f"data.hooks.transform returned a {type(out).__name__}",
                mend="return the sample, a dictionary; raise disttrain.FilteredSampleError for one to leave out",
            )
        self._check(out, key)
        return out

    def _check(self, out: Sample, key: str) -> None:
        """Refuse what a transform may not return.

        Raises:
            ConfigError: a name that is reserved, another key, or no weight.
        """
        if not _MADE_HERE.isdisjoint(out):
            check_names(out, where="what data.hooks.transform returns", but=KEY)
        if out.get(KEY, key) != key:
            raise ConfigError(
                f"data.hooks.transform returned the key {out[KEY]!r} for sample {key!r}",
                mend=f"leave {KEY} as it is, and return what you need under another name",
            )
        if self.hooks.weight and self.hooks.weight not in out:
            raise ConfigError(
                f"data.hooks.weight is {self.hooks.weight!r}, which data.hooks.transform does not return",
                mend=f"return it for every sample, or correct the name; {nearest(self.hooks.weight, out)}",
            )

    def _faults(self, samples: Sequence[Sample]) -> dict[int, str]:
        """Which transformed samples hold a number that is not allowed, and which one."""
        found: dict[int, str] = {}
        for name, allowed in self._checks.items():
            places = [place for place, sample in enumerate(samples) if name in sample]
            if places:
                for number, fault in allowed.faults(stack([samples[place][name] for place in places])).items():
                    found.setdefault(places[number], f"it made {name!r} {fault}")
        return found

    def _stand_in(self, draws: Draws | None) -> Sample:
        """What stands for the samples of a micro batch of which none is left: the first of all that is accepted.

        Nothing but the data, the seed and the transform decides which, so it is the same for all ranks and workers.
        """
        fixed = None if draws is None else Draws(draws.seed, np.zeros(1, np.int64), np.zeros(1, np.int64))
        self._stand_in_id, values = self._substitute(self._stand_in_id - 1, fixed)
        return values

    def _substitute(self, sample_id: int, draws: Draws | None) -> tuple[int, Sample]:
        """The next sample that the transform accepts, in place of one that it refused, and its id.

        Args:
            sample_id: the one before.
            draws: random numbers of one sample.
        """
        wanted = sample_id
        for _ in range(len(self.reader.index)):
            wanted = self.reader.next_good(wanted)
            read = self.reader.samples(np.array([wanted]), draws, mark_bad=True)
            if read.bad:  # it has another's values, and is passed over once it is known
                continue
            try:
                made = self._transform(_one_by_one(read)[0], draws, 0)
            except (BadSampleError, FilteredSampleError):
                continue
            if not self._faults([made]):
                return wanted, made
        raise ConfigError("data.hooks.transform refuses every sample", mend="correct the transform")

    def _refused(self, sample_id: int, why: str) -> BadSample:
        reason = f" was refused by data.hooks.transform: {why}"
        return self.reader.bad_sample(sample_id, "", -1, reason, "repair the sample or remove it")

    def _columns(self, read: Samples, rows: int, size: int) -> tuple[list[str], list[Sequence[Any]]]:
        """Names of the fields of a batch, and the values of each, one a micro batch."""
        names: list[str] = []
        columns: list[Sequence[Any]] = []
        for name, values in read.fields.items():
            field = self.reader.fields[name]
            if field.pad is None and isinstance(values, Tensor):
                names.append(name)
                columns.append(values.reshape(rows, size, *values.shape[1:]).unbind(0))
            elif isinstance(values[0], Tensor):
                # Whether a field's values have one shape is asked of each micro batch, not of a whole read.
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
                f"data.hooks.collate returned a {type(found).__name__}", mend="return a dictionary of fields"
            )
        check_names(found, where="what data.hooks.collate returns", but=KEY)
        if KEY in found and list(found[KEY]) != own[KEY]:
            raise ConfigError(
                f"data.hooks.collate returned other values of {KEY} than the samples'",
                mend="leave it out, and return what you need under another name",
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


def _by_row(places: Iterable[int], real: NDArray[np.int64], size: int) -> list[list[int]]:
    """The places of each row, ascending; padding, which harms nobody, is not counted."""
    found: list[list[int]] = [[] for _ in real]
    for place in sorted(places):
        row, column_ = divmod(place, size)
        if column_ < real[row]:
            found[row].append(place)
    return found


def _to_the_right(
    unused: Collection[int], real: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples that are not used behind the others of their micro batch.

    Returns:
        how many samples of each row remain real, and the places in their new order.
    """
    is_real = np.arange(size) < real[:, None]
    is_unused = np.zeros(is_real.size, dtype=bool)
    is_unused[list(unused)] = True
    is_good = is_real & ~is_unused.reshape(is_real.shape)
    within = np.argsort(~is_good, axis=1, kind="stable")
    return is_good.sum(axis=1), (within + np.arange(len(real))[:, None] * size).ravel()
