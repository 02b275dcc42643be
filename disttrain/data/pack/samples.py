"""Samples to be packed, and their split into train, val and test.

A split is stratified: every part gets its share of each class, or of each range of a target. It is a function
of the labels, the fractions and the seed alone (NumPy's raw Philox stream is stable across versions). Cost: two sorts
of the labels and a short loop over the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

_QUANTILES: Final = 10
# Purposes of random streams; disttrain.data.order.sample_order uses 1 to 3.
_SPLIT, _SHUFFLE = 11, 12

IMAGES: Final = frozenset(
    {"jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "ppm", "pgm", "gif", "img", "avif", "jp2", "j2k"}
)
"""File extensions of images, in a folder and in a shard."""

Ids = NDArray[np.int64]
Labels = NDArray[np.int64] | NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample to be written to a shard.

    Attributes:
        key: its key, unique in its split, without a dot after the last slash.
        fields: content by extension, such as ``{"image.npy": ..., "cls": b"3"}``.
    """

    key: str
    fields: Mapping[str, bytes]


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a source, by number.

    Attributes:
        num_samples: how many there are.
        read: returns the sample of a number, the same bytes each time.
        labels: class numbers (integers) or targets (floats) to stratify the splits by. shape (samples,)
        classes: names of the classes by number, if they have names.
        splits: sample numbers of each of the source's own splits; empty if it has none.
        notes: remarks for the user on how the source was read, such as skipped columns.
    """

    num_samples: int
    read: Callable[[int], Sample]
    labels: Labels | None = None
    classes: tuple[str, ...] = ()
    splits: Mapping[str, Ids] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(number) for number in range(self.num_samples))


@dataclass(frozen=True, eq=False)
class Source:
    """A source of samples, before it is read.

    Attributes:
        name: name of the data set.
        fingerprint: changes whenever the samples would; cheaper to compute than reading them.
        load: reads the source; called only if something has to be packed.
    """

    name: str
    fingerprint: str
    load: Callable[[], Samples]


def stratified_split(labels: Labels, *, fractions: Sequence[float], seed: int) -> list[Ids]:
    """Split samples at random so that every part gets its share of each class, or of each range of a target.

    Sizes are the fractions of all samples, rounded so that they sum to N; a class's share of a part is off by at most
    one sample. Targets (floats) are stratified by ten quantiles, or by fewer if those would hold fewer than ten
    samples. The result is a function of the arguments alone, independent of the NumPy version.

    Returns:
        sample numbers of each part, ascending.
    """
    n = len(labels)
    if labels.dtype.kind == "f":
        bins = max(1, min(_QUANTILES, n // 10))
        strata = np.empty(n, dtype=np.int64)
        strata[np.argsort(labels, kind="stable")] = np.arange(n) * bins // n
    else:
        strata = np.unique(labels, return_inverse=True)[1]
    by_stratum = np.lexsort((_raw(n, seed, _SPLIT), strata))
    table = _allot(np.bincount(strata), np.array(fractions) / sum(fractions))
    part = np.repeat(np.tile(np.arange(len(fractions)), len(table)), table.ravel())
    return [np.sort(by_stratum[part == number]).astype(np.int64) for number in range(len(fractions))]


def _allot(counts: Ids, fractions: NDArray[np.float64]) -> Ids:
    """Return how many of each class go to each part, shape (classes, parts): rounded shares, exact sums."""
    shares = counts[:, None] * fractions
    table = np.floor(shares + 1e-9).astype(np.int64)
    whole = counts.sum() * fractions
    totals = np.floor(whole + 1e-9).astype(np.int64)
    most_cut = np.argsort(totals - whole, kind="stable")
    totals[most_cut[: counts.sum() - totals.sum()]] += 1
    needed = totals - table.sum(axis=0)
    left = counts - table.sum(axis=1)
    for number in np.flatnonzero(left):
        # Giving to the parts that need most always yields exact sums (Gale-Ryser theorem).
        chosen = np.lexsort((table[number] - shares[number], -needed))[: left[number]]
        table[number, chosen] += 1
        needed[chosen] -= 1
    return table


def shuffled(ids: Ids, *, seed: int) -> Ids:
    """Return sample numbers in a random order that depends on the seed alone."""
    return ids[np.argsort(_raw(len(ids), seed, _SHUFFLE), kind="stable")]


def _raw(n: int, seed: int, purpose: int) -> NDArray[np.uint64]:
    return np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64)).random_raw(n)
