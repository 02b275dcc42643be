"""Which bytes of which shards a batch needs: from ids to offsets and sizes, without a loop over samples.

The samples are sorted by shard and number, so that each shard's table is asked once, and every result can be
put back in the order of the batch. A field that a sample lacks has offset -1. Cost: a sort of the ids and a
few gathers a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disttrain.data.index import ShardIndex

Alternatives = Sequence[tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Places:
    """The samples of a batch in the order of the data: by shard, then by number in the shard.

    Attributes:
        order: which sample of the batch each one is. shape (places,)
        local: its number in its shard. shape (places,)
        shards: each shard and the range of places that lie in it.
    """

    order: NDArray[np.int64]
    local: NDArray[np.int64]
    shards: list[tuple[int, slice]]

    @classmethod
    def of(cls, index: ShardIndex, ids: NDArray[np.int64]) -> Places:
        """The places of some samples."""
        order = np.argsort(ids)
        ids = ids[order]
        shard = np.searchsorted(index.starts, ids, side="right") - 1
        bounds = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(ids)] if len(ids) else []
        shards = [(int(shard[low]), slice(low, high)) for low, high in pairwise(bounds)]
        return cls(order, ids - index.starts[shard], shards)

    def in_batch_order(self, values: NDArray[Any]) -> NDArray[Any]:
        """What was found place by place, as the batch has it."""
        out = np.empty_like(values)
        out[self.order] = values
        return out

    def keys(self, index: ShardIndex) -> list[str]:
        """The samples' keys, as the batch has them."""
        local = self.local.tolist()
        ordered: list[str] = []  # shard by shard: keys that are neighbours in memory are found faster
        for shard, here in self.shards:
            keys = index.table(shard).keys
            ordered += [keys[number] for number in local[here]]
        found = np.empty(len(ordered), dtype=object)
        found[self.order] = ordered
        return found.tolist()


def spans(index: ShardIndex, alternatives: Alternatives, places: Places) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Byte offset and size of every field of every sample, each of shape (places, fields); -1 where there is none.

    Args:
        index: where the samples lie.
        alternatives: the extensions that each field may have; the first that a sample has is taken.
        places: the samples.
    """
    shape = (len(places.order), len(alternatives))
    offsets, sizes = np.empty(shape, np.int64), np.empty(shape, np.int64)
    # Once for all shards with the same columns: a shard adds little to a batch.
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
    """The columns of a table: of the fields' first alternatives, of their second, ...; and the absent fields."""
    choices = [[present.index(extension) for extension in field if extension in present] for field in alternatives]
    absent = [number for number, columns in enumerate(choices) if not columns]
    # A field with fewer alternatives than another repeats its last one, which changes nothing.
    ranks = range(max(1, *map(len, choices), 0))
    return [np.array([c[min(rank, len(c) - 1)] if c else 0 for c in choices]) for rank in ranks], absent
