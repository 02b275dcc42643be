"""Statistics of a data set: sizes by field, of samples and of shards, and the number of samples per class.

All but the classes come from the shards' tables. Sizes are counted in bins an eighth of an octave wide, which are
merged for display, so memory does not grow with samples or shards. Cost: the tables; for classes, the bytes of that
field, which for small samples means reading whole shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from disttrain.data.index.shard_index import Shard
from disttrain.data.index.sidecar import ShardTable
from disttrain.data.index.stream import opened

_PER_OCTAVE: Final = 8
_ABSENT: Final = "(none)"


@dataclass
class Sizes:
    """Count and total bytes of some items; ``bins`` counts them by size."""

    count: int = 0
    total: int = 0
    min: int = -1
    max: int = -1
    bins: Counter[int] = field(default_factory=Counter)

    def add(self, sizes: NDArray[np.int64]) -> None:
        """Add items by their sizes in bytes. shape (n,)"""
        if not len(sizes):
            return
        low, high = int(sizes.min()), int(sizes.max())
        self.min = low if self.count == 0 else min(self.min, low)
        self.max = max(self.max, high)
        self.count += len(sizes)
        self.total += int(sizes.sum())
        numbers = np.floor(np.log2(np.maximum(sizes, 1)) * _PER_OCTAVE).astype(np.int64)
        self.bins.update(dict(zip(*map(np.ndarray.tolist, np.unique(numbers, return_counts=True)), strict=True)))

    @property
    def mean(self) -> float:
        """Average size in bytes."""
        return self.total / max(1, self.count)

    def histogram(self, max_bins: int = 12) -> list[tuple[int, int, int]]:
        """Return the smallest and largest size of each bin, and its count; bins have equal width on a log scale.

        Returns:
            at most ``max_bins`` bins, ascending, without gaps; the outer ones end at the extremes.
        """
        if not self.bins:
            return []
        first, last = min(self.bins), max(self.bins)
        width = 1
        while last // width - first // width >= max_bins:
            width *= 2
        counts = [0] * (last // width - first // width + 1)
        for number, count in self.bins.items():
            counts[number // width - first // width] += count
        edges = [int(np.ceil(2.0 ** ((first // width + n) * width / _PER_OCTAVE))) for n in range(len(counts) + 1)]
        edges[0], edges[-1] = self.min, self.max + 1
        return [(low, high - 1, n) for low, high, n in zip(edges, edges[1:], counts, strict=False) if high > low]


@dataclass
class Statistics:
    """The statistics of a data set; see :meth:`add`.

    Attributes:
        shards: sizes of the tars.
        samples: sizes of the samples, all fields together, without headers and padding.
        per_shard: fewest and most samples in a shard.
        fields: sizes of each field.
    """

    shards: Sizes = field(default_factory=Sizes)
    samples: Sizes = field(default_factory=Sizes)
    per_shard: tuple[int, int] = (0, 0)
    fields: dict[str, Sizes] = field(default_factory=dict)

    def add(self, table: ShardTable, size_bytes: int) -> None:
        """Add a shard by its table and the size of its tar."""
        low, high = self.per_shard
        self.per_shard = (min(low, len(table)) if self.shards.count else len(table), max(high, len(table)))
        self.shards.add(np.array([size_bytes], dtype=np.int64))
        self.samples.add(np.maximum(table.sizes, 0).sum(axis=1))
        for column, name in enumerate(table.fields):
            sizes = table.sizes[:, column]
            self.fields.setdefault(name, Sizes()).add(sizes[sizes >= 0])


class _Span(NamedTuple):
    offset: int
    size: int


def count_values(shard: Shard, table: ShardTable, extension: str, *, max_bytes: int = 64) -> Counter[str]:
    """Count how often each value of a small text field, such as a class number, occurs in a shard.

    Args:
        shard: the shard to read.
        table: its table.
        extension: the field; samples without it count as ``(none)``.
        max_bytes: longer values are truncated to this.
    """
    column = table.fields.index(extension) if extension in table.fields else None
    if column is None:
        return Counter({_ABSENT: len(table)})
    offsets, sizes = table.offsets[:, column].tolist(), table.sizes[:, column].tolist()
    spans = sorted(_Span(o, min(s, max_bytes)) for o, s in zip(offsets, sizes, strict=True) if o >= 0)
    counts = Counter(value.decode("utf-8", "backslashreplace").strip() for value in _read_spans(shard.path, spans))
    if len(spans) < len(table):
        counts[_ABSENT] = len(table) - len(spans)
    return counts


def _read_spans(place: str, spans: Sequence[_Span]) -> Iterable[bytes]:
    """Yield the bytes of some ascending spans, read in windows if they are close together."""
    with opened(place) as source:
        near = len(spans) > 1 and (spans[-1].offset - spans[0].offset) / (len(spans) - 1) < source.window_bytes / 4
        window, at = b"", 0
        for offset, size in spans:
            if offset + size > at + len(window):
                window, at = source.read(offset, max(size, source.window_bytes if near else 0)), offset
            yield window[offset - at : offset - at + size]


def in_order(counts: Counter[str]) -> list[tuple[str, int]]:
    """Return values sorted for display: numbers by size, then the others by name."""
    return sorted(counts.items(), key=lambda item: (not item[0].isdecimal(), len(item[0].lstrip("0")), item[0]))
