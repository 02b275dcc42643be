"""Random access to samples: from ids to decoded batches.

The bytes that a batch needs are sorted by shard and offset, neighbours are joined, and each run is one
``preadv`` into a single buffer; fields of a fixed size are then gathered into one array without a loop over
samples. Reads and NumPy release the GIL, so threads suffice. A sample that cannot be read or decoded is an
error that names shard, key, field and byte offset. Cost: one system call a run of neighbours, one copy of
the bytes; open files are bounded.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from disttrain.data.cache import CacheConfig
from disttrain.data.decode import BadValueError, Decoded, Field, RawValues, decode
from disttrain.data.index import ShardIndex
from disttrain.data.remote import shown
from disttrain.data.store import ShardStore
from disttrain.errors import DataError, DecodeError, ShardError, nearest

_FILE_LIMIT: Final = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
# A window may span more than a thousand shards, and opening one takes long on a network file system.
_OPEN_FILES: Final = min(4096, _FILE_LIMIT // 4) if _FILE_LIMIT > 0 else 4096  # negative: no limit
_JOIN_GAP_BYTES: Final = 8 * 1024
_SHARD_STRIDE: Final = 2**45


class _OpenShard:
    """A file descriptor that closes with its last user, so that no thread reads from a reused number."""

    def __init__(self, path: str, fd: int | None = None) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY) if fd is None else fd
        except OSError as error:
            raise ShardError(
                f"cannot open shard {path}: {error.strerror}", mend="restore it; it was there when the run started"
            ) from None

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        while True:
            try:
                count = os.preadv(self.fd, (buffer,), offset)
            except OSError as error:
                raise ShardError(
                    f"shard {self.path} at byte {offset}: {error.strerror}", mend="check the disk and the file"
                ) from None
            if count == len(buffer):
                return
            if count == 0:
                raise ShardError(
                    f"shard {self.path} ends at byte {offset}, before a sample that its index lists",
                    mend="restore the shard and run `disttrain shards index` again",
                )
            buffer, offset = buffer[count:], offset + count


@dataclass(frozen=True, eq=False)
class _Places:
    """The samples of a batch in the order of the data: by shard, then by number in the shard.

    Attributes:
        order: which sample of the batch each one is. shape (places,)
        local: its number in its shard. shape (places,)
        shards: each shard and the range of places that lie in it.
    """

    order: NDArray[np.int64]
    local: NDArray[np.int64]
    shards: list[tuple[int, slice]]

    def shard_of(self, place: int) -> int:
        return next(shard for shard, here in self.shards if place < here.stop)


class Reader:
    """Reads and decodes samples of an index by their ids. Safe to use from several threads.

    Args:
        index: where the samples lie.
        fields: the fields of a batch by name.
        cache: where remote shards are kept while they are read.

    Raises:
        DataError: a declared field does not occur in the data.
        ConfigError: the cache is smaller than a shard.
    """

    def __init__(self, index: ShardIndex, fields: Mapping[str, Field], *, cache: CacheConfig | None = None) -> None:
        self.index = index
        self.store = ShardStore(index.shards, cache)
        self.fields = dict(fields)
        self._files: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = Lock()
        present = index.fields()
        for name, field in self.fields.items():
            if not set(field.alternatives) & set(present):
                raise DataError(
                    f"{index.name}: field {name!r} (extension {field.ext!r}) does not occur in"
                    f" {index.shards[0].path}, which has {', '.join(present)}",
                    mend=f"correct data.fields.{name}; {nearest(field.alternatives[0], present)}",
                )

    def read(self, ids: NDArray[np.int64]) -> dict[str, Decoded]:
        """The decoded fields of some samples, by field name.

        Args:
            ids: samples, in the order wanted; repeats are allowed. shape (samples,)

        Raises:
            ShardError: a shard cannot be read.
            DataError: a sample lacks a field.
            DecodeError: a value does not decode.
        """
        places = self._places(ids)
        offsets, sizes = self._spans(places)
        raw = self._fetch(places, offsets, sizes)
        out: dict[str, Decoded] = {}
        for column, (name, field) in enumerate(self.fields.items()):
            try:
                out[name] = decode(field, raw[column])
            except BadValueError as bad:
                place = int(np.flatnonzero(places.order == bad.place)[0])
                raise DecodeError(
                    f"shard {self.index.shards[places.shard_of(place)].path} at byte {offsets[place, column]}:"
                    f" sample {self.index.key(int(ids[bad.place]))!r}, field {name!r} ({field.ext}): {bad}",
                    mend=f"repair the sample, or declare another decoder for data.fields.{name}",
                ) from None
        return out

    def keys(self, ids: NDArray[np.int64]) -> list[str]:
        """The keys of some samples."""
        places = self._places(ids)
        local = places.local.tolist()
        ordered: list[str] = []  # shard by shard: keys that are neighbours in memory are found faster
        for shard, here in places.shards:
            keys = self.index.table(shard).keys
            ordered += [keys[number] for number in local[here]]
        found = np.empty(len(ids), dtype=object)
        found[places.order] = ordered
        return found.tolist()

    def mean_sample_bytes(self) -> float:
        """Average size of a sample in its shard, headers included."""
        return float(sum(shard.size_bytes for shard in self.index.shards)) / max(1, len(self.index))

    def _places(self, ids: NDArray[np.int64]) -> _Places:
        order = np.argsort(ids)
        ids = ids[order]
        shard = np.searchsorted(self.index.starts, ids, side="right") - 1
        bounds = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(ids)]
        shards = [(int(shard[low]), slice(low, high)) for low, high in pairwise(bounds)]
        return _Places(order, ids - self.index.starts[shard], shards)

    def _spans(self, places: _Places) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Byte offset and size of every field of every sample, each of shape (places, fields)."""
        shape = (len(places.order), len(self.fields))
        offsets, sizes = np.empty(shape, np.int64), np.empty(shape, np.int64)
        cells: dict[tuple[str, ...], list[NDArray[np.int64]]] = {}
        for shard, here in places.shards:
            table = self.index.table(shard)
            if table.fields not in cells:  # once for all shards with these columns: a shard adds little to a batch
                columns, absent = self._columns(table.fields)
                if absent:
                    raise self._lacks(shard, int(places.local[here.start]), absent[0])
                cells[table.fields] = [places.local[:, None] * len(table.fields) + choice for choice in columns]
            first, *others = cells[table.fields]
            offset, size = table.offsets.take(first[here]), table.sizes.take(first[here])
            for other in others:
                missing = offset < 0
                offset = np.where(missing, table.offsets.take(other[here]), offset)
                size = np.where(missing, table.sizes.take(other[here]), size)
            offsets[here], sizes[here] = offset, size
        if (offsets < 0).any():
            place, column = np.argwhere(offsets < 0)[0].tolist()
            raise self._lacks(places.shard_of(place), int(places.local[place]), list(self.fields)[column])
        return offsets, sizes

    def _columns(self, present: tuple[str, ...]) -> tuple[list[NDArray[np.int64]], list[str]]:
        """The columns of a table: of the fields' first alternatives, of their second, ...; and the absent fields."""
        choices = {
            name: [present.index(extension) for extension in field.alternatives if extension in present]
            for name, field in self.fields.items()
        }
        absent = [name for name, columns in choices.items() if not columns]
        # A field with fewer alternatives than another repeats its last one, which changes nothing.
        ranks = range(max(1, *map(len, choices.values())))
        return [np.array([c[min(rank, len(c) - 1)] for c in choices.values() if c]) for rank in ranks], absent

    def _lacks(self, shard: int, local: int, name: str) -> DataError:
        return DataError(
            f"shard {self.index.shards[shard].path}: sample {self.index.table(shard).keys[local]!r} has no field"
            f" {name!r} (extension {self.fields[name].ext!r})",
            mend="pack the sample again with the field, or remove it",
        )

    def _fetch(self, places: _Places, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> list[RawValues]:
        """Read the spans by runs of neighbours and cut the fields out of the one buffer."""
        # One axis for all shards, so far apart that runs never join across them.
        counts = [here.stop - here.start for _, here in places.shards]
        shift = np.repeat(np.arange(len(counts)) * _SHARD_STRIDE, counts)
        begins = (offsets + shift[:, None]).ravel()
        ends = begins + sizes.ravel()
        order = np.argsort(begins)
        begins, ends = begins[order], ends[order]
        reach = np.maximum.accumulate(ends)  # repeated samples overlap: how far the bytes so far go
        fresh = np.concatenate(([True], begins[1:] > reach[:-1] + _JOIN_GAP_BYTES))
        starts = np.flatnonzero(fresh)
        run_begin = begins[starts]
        lengths = np.maximum.reduceat(ends, starts) - run_begin
        run_at = np.concatenate(([0], np.cumsum(lengths)))  # where each run lies in the buffer
        buffer = np.empty(int(run_at[-1]), dtype=np.uint8)
        self._read_runs([shard for shard, _ in places.shards], run_begin, run_at, buffer.data)
        position = np.empty_like(begins)
        position[order] = begins + (run_at[:-1] - run_begin)[np.cumsum(fresh) - 1]
        # Back to the order of the batch.
        at, size = np.empty_like(offsets), np.empty_like(sizes)
        at[places.order], size[places.order] = position.reshape(offsets.shape), sizes
        return [_cut(buffer, at[:, column], size[:, column]) for column in range(offsets.shape[1])]

    def _read_runs(self, shards: list[int], begins: NDArray[np.int64], at: NDArray[np.int64], view: memoryview) -> None:
        """Fill the buffer run by run: run ``i`` begins at ``begins[i]`` on the axis of all shards."""
        places, offsets = np.divmod(begins, _SHARD_STRIDE)
        bounds = at.tolist()
        file, opened = None, -1
        for place, offset, start, stop in zip(places.tolist(), offsets.tolist(), bounds, bounds[1:], strict=False):
            if file is None or place != opened:  # one at a time: a read may touch more shards than may be open
                file = None  # nor may one be held while another is fetched, which may have to evict it
                file, opened = self._file(shards[place]), place
            file.read_into(view[start:stop], offset)

    def _file(self, shard: int) -> _OpenShard:
        if (fd := self.store.open(shard)) is not None:
            return _OpenShard(shown(self.index.shards[shard].path), fd)  # kept open, it could never be evicted
        with self._lock:
            found = self._files.get(shard)
            if found is None:
                found = self._files[shard] = _OpenShard(self.index.shards[shard].path)
                while len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(shard)
            return found


def _cut(buffer: NDArray[np.uint8], at: NDArray[np.int64], sizes: NDArray[np.int64]) -> RawValues:
    size = int(sizes[0])
    if size > 0 and bool((sizes == size).all()):
        # Every window of `size` bytes as a row, without a copy; indexing then copies the rows wanted.
        rows = np.lib.stride_tricks.as_strided(buffer, shape=(len(buffer) - size + 1, size), strides=(1, 1))
        return RawValues(block=rows[at])
    return RawValues(pieces=(buffer, at, sizes))
