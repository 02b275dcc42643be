"""Random access to samples: from ids to decoded batches.

The bytes of a batch come from mapped files, or are read in as few runs as possible (see
:mod:`disttrain.data.reader.pread`). Fields of a fixed size are then gathered into one array without a loop over
samples. Reads and NumPy release the GIL, so threads suffice. A sample that lacks a field or does not decode raises
an error that names shard, key, field and byte offset, or is marked and given the values of the next good sample.
Cost: one copy of the bytes and, for shards that are not mapped, one system call per run of neighbours.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from disttrain.data.cache.cached_shards import ShardStore
from disttrain.data.cache.shard_cache import CacheConfig
from disttrain.data.decode.allowed_values import Allowed, check_names, classes
from disttrain.data.decode.fields import (
    BadValuesError,
    Decoded,
    Field,
    RawValues,
    check_safe,
    decode,
    with_default,
)
from disttrain.data.decode.rng import Draws
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.reader.bad_sample_policy import BadSample
from disttrain.data.reader.mmap import Spans
from disttrain.data.reader.pread import ShardFiles
from disttrain.data.reader.spans import Places, spans
from disttrain.data.remote.ranges import shown
from disttrain.errors import DataError, nearest

_TRIES: Final = 1000


class _BadPlacesError(Exception):
    """Raised if some samples of a read are bad; lists them by place in the batch."""

    def __init__(self, samples: dict[int, BadSample]) -> None:
        super().__init__()
        self.samples = samples


@dataclass(frozen=True, eq=False)
class Samples:
    """Result of a read.

    Attributes:
        fields: the decoded fields by name, each with one value per sample.
        keys: the samples' keys.
        bad: the bad samples, by place; they keep their own keys but have the values of other samples.
    """

    fields: dict[str, Decoded]
    keys: list[str]
    bad: dict[int, BadSample]


class Reader:
    """Reads and decodes samples of an index by id. Thread-safe.

    Args:
        index: the samples and where they are stored.
        fields: the fields of a batch by name.
        cache: cache for remote shards.
        unsafe_decoders: decoders allowed although they may run code from the data, such as ``pickle``; none by default.

    Raises:
        DataError: a declared field does not occur in the data.
        ConfigError: the cache is smaller than a shard, a field would be unpickled, or its name is reserved.
    """

    def __init__(
        self,
        index: ShardIndex,
        fields: Mapping[str, Field],
        *,
        cache: CacheConfig | None = None,
        unsafe_decoders: Sequence[str] = (),
    ) -> None:
        check_safe(fields, unsafe_decoders)
        padded = [name for name, field in fields.items() if field.pad is not None]
        check_names(fields, padded, where="data.fields")
        self.index = index
        self.store = ShardStore(index.shards, cache)
        self.fields = dict(fields)
        self.unsafe_decoders = frozenset(unsafe_decoders)
        self._alternatives = [field.alternatives for field in self.fields.values()]
        self._files = ShardFiles(index.shards, self.store)
        self._known_bad: dict[int, BadSample] = {}
        self._own = {name: (classes(field.classes),) for name, field in self.fields.items() if field.classes}
        self._allowed: dict[str, tuple[Allowed, ...]] = dict(self._own)
        self._required = np.array([field.default is None for field in self.fields.values()], dtype=bool)
        present = index.fields()
        for name, field in self.fields.items():
            if set(field.alternatives) & set(present):
                continue
            if field.default is not None:
                warnings.warn(
                    f"{index.name}: field {name!r} (extension {field.ext!r}) does not occur in the first shard, so"
                    f" its samples get the default {field.default!r}; the first shard has {', '.join(present)}",
                    stacklevel=2,
                )
            else:
                raise DataError(
                    f"{index.name}: field {name!r} (extension {field.ext!r}) does not occur in"
                    f" {shown(index.shards[0].path)}, which has {', '.join(present)}",
                    hint=f"correct data.fields.{name}; {nearest(field.alternatives[0], present)}",
                )

    def require(self, allowed: Mapping[str, Allowed]) -> None:
        """Treat samples with disallowed numbers in a field as bad; replaces earlier requirements.

        Args:
            allowed: the numbers that each field may hold, by name; the classes that a field declares always apply too.
        """
        required = self._own | {name: (*self._own.get(name, ()), what) for name, what in allowed.items()}
        if required != self._allowed:
            self._allowed = required
            self._known_bad.clear()  # they may satisfy the new requirements

    def read(self, ids: NDArray[np.int64], draws: Draws | None = None) -> dict[str, Decoded]:
        """Return the decoded fields of some samples, by field name.

        Args:
            ids: samples, in the order wanted; repeats are allowed. shape (samples,)
            draws: random numbers for augmentations at decode time; None for no augmentation.

        Raises:
            ShardError: a shard cannot be read.
            DataError: a sample lacks a field.
            DecodeError: a value does not decode.
        """
        return self.samples(ids, draws).fields

    def samples(self, ids: NDArray[np.int64], draws: Draws | None = None, *, mark_bad: bool = False) -> Samples:
        """Return fields and keys of some samples; raises like :meth:`read`.

        Args:
            ids: samples, in the order wanted. shape (samples,)
            draws: random numbers for decoding.
            mark_bad: list bad samples and give them the values of the next good ones, instead of raising.
        """
        places = Places.of(self.index, ids)
        if not (mark_bad and self._known_bad):
            try:
                return Samples(self._decoded(places, draws), places.keys(self.index), {})
            except _BadPlacesError as found:
                if not mark_bad:
                    first = min(found.samples)
                    raise found.samples[first].error(len(found.samples) - 1) from None
                self._remember(ids, found)
        wanted = ids.copy()
        bad: dict[int, BadSample] = {}
        for _ in range(_TRIES):
            for place in np.flatnonzero(np.isin(wanted, list(self._known_bad))).tolist():
                bad[place] = bad.get(place) or self._known_bad[int(wanted[place])]
                wanted[place] = self.next_good(int(wanted[place]))
            try:
                return Samples(self._decoded(Places.of(self.index, wanted), draws), places.keys(self.index), bad)
            except _BadPlacesError as found:
                self._remember(wanted, found)
        raise self._all_bad()

    def next_good(self, sample_id: int) -> int:
        """Return the next sample, wrapping around at the end, that is not known to be bad.

        Raises:
            DataError: the next thousand samples are all bad.
        """
        for distance in range(1, _TRIES):
            candidate = (sample_id + distance) % len(self.index)
            if candidate not in self._known_bad:
                return candidate
        raise self._all_bad()

    def keys(self, ids: NDArray[np.int64]) -> list[str]:
        """Return the keys of some samples."""
        return Places.of(self.index, ids).keys(self.index)

    def mean_sample_bytes(self) -> float:
        """Return the average size of a sample in its shard, headers included."""
        return float(sum(shard.size_bytes for shard in self.index.shards)) / max(1, len(self.index))

    def bad_sample(self, sample_id: int, field: str, offset: int, reason: str, hint: str) -> BadSample:
        """Return the record of a bad sample."""
        shard = int(np.searchsorted(self.index.starts, sample_id, side="right")) - 1
        return BadSample(shown(self.index.shards[shard].path), self.index.key(sample_id), field, offset, reason, hint)

    def _remember(self, ids: NDArray[np.int64], found: _BadPlacesError) -> None:
        self._known_bad.update({int(ids[place]): sample for place, sample in found.samples.items()})

    def _all_bad(self) -> DataError:
        example = next(iter(self._known_bad.values()))
        return DataError(
            f"{self.index.name}: a thousand samples in a row are bad, such as {example}", hint=example.hint
        )

    def _decoded(self, places: Places, draws: Draws | None) -> dict[str, Decoded]:
        if not len(places.order):
            return {
                name: decode(field, RawValues([]), unsafe=self.unsafe_decoders) for name, field in self.fields.items()
            }
        offsets, sizes = spans(self.index, self._alternatives, places)
        lacks, absent = offsets < 0, None
        if lacks.any():
            if lacks[:, self._required].any():
                raise _BadPlacesError(self._lacking(places, offsets))
            absent = places.in_batch_order(lacks)
            # Read zero bytes for an absent field, at a place near the sample's other fields so that runs stay short.
            offsets = np.where(lacks, np.maximum(offsets.max(axis=1, keepdims=True), 0), offsets)
            sizes = np.where(lacks, 0, sizes)
        there = self._files.read(places.shards, offsets, sizes)
        return self._values(places, there, offsets, sizes, absent, draws)

    def _values(
        self,
        places: Places,
        there: Spans,
        offsets: NDArray[np.int64],
        sizes: NDArray[np.int64],
        absent: NDArray[np.bool_] | None,
        draws: Draws | None,
    ) -> dict[str, Decoded]:
        memory, at = there
        at, sizes = places.in_batch_order(at), places.in_batch_order(sizes)
        out: dict[str, Decoded] = {}
        bad: dict[int, BadSample] = {}
        for column, (name, field) in enumerate(self.fields.items()):
            try:
                if absent is None or not absent[:, column].any():
                    raw = RawValues(pieces=(memory, at[:, column], sizes[:, column]))
                    out[name] = decode(field, raw, draws, unsafe=self.unsafe_decoders)
                else:
                    here = np.flatnonzero(~absent[:, column])
                    raw = RawValues(pieces=(memory, at[here, column], sizes[here, column]))
                    some = None if draws is None else draws.of(here)
                    out[name] = with_default(field, raw, here, len(at), some, unsafe=self.unsafe_decoders)
                self._check(name, out[name])
            except BadValuesError as found:
                offset = places.in_batch_order(offsets[:, column])
                hint = found.hint or f"repair the sample, or declare another decoder for data.fields.{name}"
                for place, reason in found.faults.items():
                    bad.setdefault(place, self._undecodable(places, place, name, int(offset[place]), reason, hint))
        if bad:
            raise _BadPlacesError(bad)
        return out

    def _check(self, name: str, values: Decoded) -> None:
        faults: dict[int, str] = {}
        for allowed in self._allowed.get(name, ()):
            faults |= allowed.faults(values)
        if faults:
            raise BadValuesError(faults, hint="repair the sample, or correct what the run expects")

    def _lacking(self, places: Places, offsets: NDArray[np.int64]) -> dict[int, BadSample]:
        names, found = list(self.fields), {}
        lacks = (places.in_batch_order(offsets) < 0) & self._required
        for place, column in np.argwhere(lacks).tolist():
            name = names[column]
            reason = f" has no field {name!r} (extension {self.fields[name].ext!r})"
            found[place] = self.bad_sample(
                self._id_of(places, place), name, -1, reason, "pack the sample again with the field, or remove it"
            )
        return found

    def _undecodable(self, places: Places, place: int, name: str, offset: int, reason: str, hint: str) -> BadSample:
        return self.bad_sample(
            self._id_of(places, place),
            name,
            offset,
            f", field {name!r} ({self.fields[name].ext}): {reason}",
            hint,
        )

    def _id_of(self, places: Places, place: int) -> int:
        row = int(np.flatnonzero(places.order == place)[0])
        shard = next(shard for shard, here in places.shards if row < here.stop)
        return int(self.index.starts[shard] + places.local[row])
