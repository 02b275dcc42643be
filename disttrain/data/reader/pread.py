"""Read the byte spans of a batch from its shards.

Local shards are mapped (see :mod:`disttrain.data.reader.mmap`). Other shards are read into one buffer: spans are
sorted and merged if close together, since reading a few unneeded kilobytes is cheaper than another system call. Reads
release the GIL. Open files are bounded (:mod:`disttrain.data.reader.open_shards`). Files of remote shards are closed
after each read, so that the cache may evict them. Cost: one system call per run of neighbours, none for mapped shards.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from disttrain.data.cache.cached_shards import ShardStore
from disttrain.data.index.shard_index import Shard
from disttrain.data.reader.mmap import MappedShards, Spans, cannot_open, ends_early
from disttrain.data.reader.open_shards import OPEN_SHARDS
from disttrain.data.remote.ranges import shown
from disttrain.errors import ShardError

_JOIN_GAP_BYTES: Final = 8 * 1024
_SHARD_STRIDE: Final = 2**45

Shards = Sequence[tuple[int, slice]]
"""Each shard and the range of rows that lie in it."""


class _OpenShard:
    """A file descriptor that is closed with its last user, so that no thread reads from a reused number."""

    def __init__(self, path: str, fd: int | None = None) -> None:
        self.path = path
        try:
            self.fd = OPEN_SHARDS.trying(lambda: os.open(path, os.O_RDONLY)) if fd is None else fd
        except OSError as error:
            raise cannot_open(path, error) from None

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        while True:
            try:
                count = os.preadv(self.fd, (buffer,), offset)
            except OSError as error:
                raise ShardError(
                    f"shard {self.path} at byte {offset}: {error.strerror}", hint="check the disk and the file"
                ) from None
            if count == len(buffer):
                return
            if count == 0:
                raise ends_early(self.path, offset)
            buffer, offset = buffer[count:], offset + count


class ShardFiles:
    """The shards of an index as files. Thread-safe.

    Args:
        shards: the shards of the index.
        store: opens remote shards.
    """

    def __init__(self, shards: Sequence[Shard], store: ShardStore) -> None:
        self._shards, self._store = shards, store
        self._mapped = MappedShards(shards)
        self._owner = OPEN_SHARDS.owner(self, len(shards))

    def read(self, shards: Shards, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> Spans:
        """Read spans of bytes.

        Args:
            shards: each shard and the range of rows that lie in it.
            offsets: where the spans begin in their shards. shape (rows, columns)
            sizes: sizes of the spans in bytes. shape (rows, columns)

        Returns:
            Memory that holds them, of which nothing else may be touched, shape (bytes,); and where in it each span
            begins, shape (rows, columns).

        Raises:
            ShardError: a shard cannot be read, or ends before a span.
        """
        return self._mapped.spans(shards, offsets, sizes) or self._joined(shards, offsets, sizes)

    def _joined(self, shards: Shards, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> Spans:
        """Read spans into one buffer, merging close neighbours into runs."""
        # One axis for all shards, spaced so far apart that runs never merge across shards.
        counts = [here.stop - here.start for _, here in shards]
        shift = np.repeat(np.arange(len(counts)) * _SHARD_STRIDE, counts)
        begins = (offsets + shift[:, None]).ravel()
        ends = begins + sizes.ravel()
        order = np.argsort(begins)
        begins, ends = begins[order], ends[order]
        reach = np.maximum.accumulate(ends)  # running end of all spans so far; repeated samples overlap
        fresh = np.concatenate(([True], begins[1:] > reach[:-1] + _JOIN_GAP_BYTES))
        starts = np.flatnonzero(fresh)
        run_begin = begins[starts]
        lengths = np.maximum.reduceat(ends, starts) - run_begin
        run_at = np.concatenate(([0], np.cumsum(lengths)))  # where each run lies in the buffer
        buffer = np.empty(int(run_at[-1]), dtype=np.uint8)
        self._read_runs([shard for shard, _ in shards], run_begin, run_at, buffer.data)
        position = np.empty_like(begins)
        position[order] = begins + (run_at[:-1] - run_begin)[np.cumsum(fresh) - 1]
        return buffer, position.reshape(offsets.shape)

    def _read_runs(self, shards: list[int], begins: NDArray[np.int64], at: NDArray[np.int64], view: memoryview) -> None:
        """Fill the buffer run by run; run ``i`` starts at ``begins[i]`` on the axis of all shards."""
        places, offsets = np.divmod(begins, _SHARD_STRIDE)
        file, opened = None, -1
        for place, offset, (start, stop) in zip(places.tolist(), offsets.tolist(), pairwise(at.tolist()), strict=True):
            if file is None or place != opened:  # one at a time: a read may touch more shards than may be open
                file = None  # close it before fetching the next shard, which may have to evict this one
                file, opened = self._file(shards[place]), place
            file.read_into(view[start:stop], offset)

    def _file(self, shard: int) -> _OpenShard:
        path = shown(self._shards[shard].path)
        if (fd := self._store.open(shard)) is not None:
            return _OpenShard(path, fd)  # not cached in OPEN_SHARDS: the shard could never be evicted
        found: _OpenShard | None = OPEN_SHARDS.get(self._owner, shard)
        if found is not None:
            return found
        has_room, found = OPEN_SHARDS.has_room(), _OpenShard(path)
        return OPEN_SHARDS.keep(self._owner, shard, found, holder=found) if has_room else found
