"""Random access to samples: from ids to decoded batches.

The bytes that a batch needs are sorted by shard and offset, neighbours are joined, and each run is one
``preadv`` into a single buffer; fields of a fixed size are then gathered into one array without a loop over
samples. Reads and NumPy release the GIL, so threads suffice. A sample that cannot be read or decoded is an
error that names shard, key, field and byte offset. Cost: one system call a run of neighbours, one copy of
the bytes; open files are bounded.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from disttrain.data.decode import BadValueError, Decoded, Field, RawValues, decode
from disttrain.data.index import ShardIndex
from disttrain.errors import DataError, DecodeError, ShardError, nearest

_OPEN_FILES: Final = 256
_JOIN_GAP_BYTES: Final = 8 * 1024
_SHARD_STRIDE: Final = 2**45


class _OpenShard:
    """A file descriptor that closes with its last user, so that no thread reads from a reused number."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(
                f"cannot open shard {path}: {error.strerror}", mend="restore it; it was there when the run started"
            ) from None

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise ShardError(
                    f"shard {self.path} at byte {offset + done}: {error.strerror}", mend="check the disk and the file"
                ) from None
            if count == 0:
                raise ShardError(
                    f"shard {self.path} ends at byte {offset + done}, before a sample that its index lists",
                    mend="restore the shard and run `disttrain shards index` again",
                )
            done += count


@dataclass(frozen=True)
class _Places:
    """Where the samples of a batch lie."""

    shard: NDArray[np.int64]  # ids: (sample,)
    local: NDArray[np.int64]  # ids: (sample,)


class Reader:
    """Reads and decodes samples of an index by their ids. Safe to use from several threads.

    Args:
        index: where the samples lie.
        fields: the fields of a batch by name.

    Raises:
        DataError: a declared field does not occur in the data.
    """

    def __init__(self, index: ShardIndex, fields: Mapping[str, Field]) -> None:
        self.index = index
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
        shard = np.searchsorted(self.index.starts, ids, side="right") - 1
        places = _Places(shard, ids - self.index.starts[shard])
        offsets, sizes = self._spans(places)
        raw = self._fetch(places, offsets, sizes)
        out: dict[str, Decoded] = {}
        for column, (name, field) in enumerate(self.fields.items()):
            try:
                out[name] = decode(field, raw[column])
            except BadValueError as bad:
                table = self.index.table(int(shard[bad.place]))
                raise DecodeError(
                    f"shard {self.index.shards[int(shard[bad.place])].path} at byte {offsets[bad.place, column]}:"
                    f" sample {table.keys[int(places.local[bad.place])]!r}, field {name!r} ({field.ext}): {bad}",
                    mend=f"repair the sample, or declare another decoder for data.fields.{name}",
                ) from None
        return out

    def keys(self, ids: NDArray[np.int64]) -> list[str]:
        """The keys of some samples."""
        shard = np.searchsorted(self.index.starts, ids, side="right") - 1
        local = (ids - self.index.starts[shard]).tolist()
        tables = {int(s): self.index.table(int(s)).keys for s in np.unique(shard)}
        return [tables[s][i] for s, i in zip(shard.tolist(), local, strict=True)]

    def mean_sample_bytes(self) -> float:
        """Average size of a sample in its shard, headers included."""
        return float(sum(shard.size_bytes for shard in self.index.shards)) / max(1, len(self.index))

    def _spans(self, places: _Places) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Byte offset and size of every field of every sample, each of shape (samples, fields)."""
        shape = (len(places.shard), len(self.fields))
        offsets, sizes = np.empty(shape, np.int64), np.empty(shape, np.int64)
        for shard in np.unique(places.shard).tolist():
            table = self.index.table(shard)
            here = np.flatnonzero(places.shard == shard)
            rows = places.local[here]
            for column, (name, field) in enumerate(self.fields.items()):
                offset, size = np.full(len(here), -1), np.full(len(here), -1)
                for extension in field.alternatives:
                    if extension in table.fields:
                        source = table.fields.index(extension)
                        missing = offset < 0
                        offset[missing] = table.offsets[rows[missing], source]
                        size[missing] = table.sizes[rows[missing], source]
                if (offset < 0).any():
                    row = int(rows[np.flatnonzero(offset < 0)[0]])
                    raise DataError(
                        f"shard {self.index.shards[shard].path}: sample {table.keys[row]!r} has no field {name!r}"
                        f" (extension {field.ext!r})",
                        mend="pack the sample again with the field, or remove it",
                    )
                offsets[here, column], sizes[here, column] = offset, size
        return offsets, sizes

    def _fetch(self, places: _Places, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> list[RawValues]:
        """Read the spans by runs of neighbours and cut the fields out of the one buffer."""
        num_fields = offsets.shape[1]
        # One axis for all shards, so far apart that runs never join across them.
        touched, rank = np.unique(places.shard, return_inverse=True)
        begins = (offsets + rank[:, None] * _SHARD_STRIDE).ravel()
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
        view = buffer.data
        files = [self._file(int(shard)) for shard in touched]
        where = zip((run_begin // _SHARD_STRIDE).tolist(), (run_begin % _SHARD_STRIDE).tolist(), strict=True)
        for (place, begin), start, length in zip(where, run_at[:-1].tolist(), lengths.tolist(), strict=True):
            files[place].read_into(view[start : start + length], begin)
        run_of = np.cumsum(fresh) - 1
        position = np.empty(len(order), dtype=np.int64)
        position[order] = run_at[run_of] + begins - run_begin[run_of]
        at = position.reshape(offsets.shape)
        return [_cut(buffer, at[:, column], sizes[:, column]) for column in range(num_fields)]

    def _file(self, shard: int) -> _OpenShard:
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
    view = buffer.data
    return RawValues([view[a : a + s] for a, s in zip(at.tolist(), sizes.tolist(), strict=True)])
