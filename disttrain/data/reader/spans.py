"""Map ids to shards, byte offsets and sizes, without a loop over samples.

The samples are sorted by shard and number, so that each shard's table is queried once, and every result can be
put back in batch order. A field that a sample lacks has offset -1. Cost: a sort of the ids and a few gathers per
shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disttrain.data.index.shard_index import ShardIndex

Alternatives = Sequence[tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Places:
    """The samples of a batch in data order: by shard, then by number in the shard.

    Attributes:
        order: the position in the batch of each sample. shape (places,)
        local: its number in its shard. shape (places,)
        shards: each shard and the range of places that lie in it.
    """

    order: NDArray[np.int64]
    local: NDArray[np.int64]
    shards: list[tuple[int, slice]]

    @classmethod
    def of(cls, index: ShardIndex, ids: NDArray[np.int64]) -> Places:
        """Return the places of some samples."""
        order = np.argsort(ids)
        ids = ids[order]
        shard = np.searchsorted(index.starts, ids, side="right") - 1
        bounds = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(ids)] if len(ids) else []
        shards = [(int(shard[low]), slice(low, high)) for low, high in pairwise(bounds)]
        return cls(order, ids - index.starts[shard], shards)

    def in_batch_order(self, values: NDArray[Any]) -> NDArray[Any]:
        """Reorder values from data order to batch order."""
        out = np.empty_like(values)
        out[self.order] = values
        return out

    def keys(self, index: ShardIndex) -> list[str]:
        """Return the samples' keys in batch order."""
        local = self.local.tolist()
        ordered: list[str] = []  # shard by shard, for memory locality
        for shard, here in self.shards:
            keys = index.table(shard).keys
            ordered += [keys[number] for number in local[here]]
        found = np.empty(len(ordered), dtype=object)
        found[self.order] = ordered
        return found.tolist()


def spans(index: ShardIndex, alternatives: Alternatives, places: Places) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return byte offset and size of every field of every sample, each of shape (places, fields); -1 if absent.

    Args:
        index: the index of the samples.
        alternatives: the extensions that each field may have; the first one present in a sample is used.
        places: the samples.
    """
    shape = (len(places.order), len(alternatives))
    offsets, sizes = np.empty(shape, np.int64), np.empty(shape, np.int64)
    # Computed once for all shards with the same columns, since each shard contributes only a few samples.
    cells: dict[tuple[str, ...], tuple[list[NDArray[np.int64]], list[int]]] = {}
    for shard, here in places.shards:
        table = index.table(shard)
        if table.fields not in cells:
            columns, absent = _columns(alternatives, table.fields)
            cells[table.fields] = [places.local[:, None] * len(table.fields) + choice for choice in columns], absent
        (first, *others), absent = cells[table.fields]
        offset, size = table.offsets.take(first[here]), table.sizes.take(first[here])
        for other in others:
            missing = offset < 0
            offset = np.where(missing, table.offsets.take(other[here]), offset)
            size = np.where(missing, table.sizes.take(other[here]), size)
        if absent:
            offset[:, absent] = -1
        offsets[here], sizes[here] = offset, size
    return offsets, sizes


def _columns(alternatives: Alternatives, present: tuple[str, ...]) -> tuple[list[NDArray[np.int64]], list[int]]:
    """Return the table columns of the fields' first alternatives, of their second, ...; and the absent fields."""
    choices = [[present.index(extension) for extension in field if extension in present] for field in alternatives]
    absent = [number for number, columns in enumerate(choices) if not columns]
    # A field with fewer alternatives than another repeats its last one, which has no effect.
    ranks = range(max(1, *map(len, choices), 0))
    return [np.array([c[min(rank, len(c) - 1)] if c else 0 for c in choices]) for rank in ranks], absent
