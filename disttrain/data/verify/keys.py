"""Find keys that occur in more than one shard, for data sets of any size.

Within a shard a repeated key is a fault. Across shards it is allowed, but usually means that data is duplicated or is
in two splits. Only a 64-bit hash of each key is kept. Hashes that occur twice are looked up in their shards again, so
hash collisions are never reported. Cost: 8 bytes per key, and as much again to sort them; for the reported keys, the
headers of their shards once more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from disttrain.data.index.shard_index import Shard
from disttrain.data.index.sidecar import split_name
from disttrain.data.index.stream import opened
from disttrain.data.index.tar import scan_source
from disttrain.errors import ShardError


class Repeat(NamedTuple):
    """A key, and the first two shards that hold it."""

    key: str
    first: Shard
    second: Shard


class Keys:
    """The keys of some shards, as hashes. Thread-safe.

    Args:
        shards: all shards.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._hashes: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)] * len(shards)
        self._lock = Lock()

    def add(self, number: int, keys: Collection[str]) -> None:
        """Add the keys of a shard, which must be unique."""
        hashes = _hashes(keys)
        with self._lock:
            self._hashes[number] = hashes

    def repeats(self, most: int) -> tuple[list[Repeat], int]:
        """Return keys that occur in several shards.

        Args:
            most: how many to look up.

        Returns:
            those keys, in shard order, and the total number of repeated keys.
        """
        whole = np.sort(np.concatenate(self._hashes)) if self._hashes else np.empty(0, dtype=np.int64)
        repeated = np.unique(whole[1:][whole[1:] == whole[:-1]])
        del whole
        named: list[Repeat] = []
        total = len(repeated)
        keys_of = lru_cache(maxsize=2 * most)(self._keys_of)
        for value, first, second in self._places(repeated):
            if len(named) == most:
                break
            key = keys_of(first).get(value)
            if key is not None and key == keys_of(second).get(value):
                named.append(Repeat(key, self._shards[first], self._shards[second]))
            else:
                total -= 1  # a hash collision, or a shard that is no longer readable
        return named, total

    def _places(self, repeated: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """Yield each repeated hash, and the numbers of the first two shards that hold it."""
        unseen, told = -1, -2
        seen_in = np.full(len(repeated), unseen, dtype=np.int64)
        for number, hashes in enumerate(self._hashes if len(repeated) else ()):
            at = np.minimum(np.searchsorted(repeated, hashes), len(repeated) - 1)
            at = at[repeated[at] == hashes]
            for place in at[seen_in[at] >= 0].tolist():
                yield int(repeated[place]), int(seen_in[place]), number
            seen_in[at] = np.where(seen_in[at] == unseen, number, told)

    def _keys_of(self, number: int) -> dict[int, str]:
        """Return the keys of a shard by hash, up to the first damage."""
        found: dict[int, str] = {}
        with suppress(ShardError), opened(self._shards[number].path) as file:
            for member in scan_source(file):
                if (parts := split_name(member.name)) is not None:
                    found[hash(parts[0])] = parts[0]
        return found


def _hashes(keys: Collection[str]) -> NDArray[np.int64]:
    # Python's hash: 64 pseudorandom bits, stable within a process, at a few nanoseconds per key.
    return np.fromiter(map(hash, keys), dtype=np.int64, count=len(keys))
