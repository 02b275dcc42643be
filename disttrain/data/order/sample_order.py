"""Which sample goes to which global batch.

The order is a pure function of (shard sizes, seed, epoch, step, global batch size). World size, workers and
strategy never enter, so a run resumed on other hardware sees the same samples. An epoch permutes the shards,
concatenates them and rotates that sequence by an offset that differs from epoch to epoch. The first ``T * G`` of its
``N`` samples (``T = N // G`` steps of ``G`` samples) are used, each exactly once; the remainder, fewer than ``G``,
consists of different samples in the next epoch. The sequence is cut into ``L`` lanes of ``T * g`` consecutive samples
(``g = G / L``), shuffled within windows inside each lane. Position ``p`` of step ``t`` is element ``t * g + p mod g``
of lane ``p // g``. A rank reads a contiguous range of positions, hence a few lanes, hence a few shards.

Cost: O(shards) memory, O(window) time to any position, no Python loop over samples. A window is sorted only as far
as its elements are requested, so a resume does not wait for later ones. Randomness comes from the raw 64-bit stream
of NumPy's counter-based Philox generator, which is stable across NumPy versions.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from disttrain.errors import ConfigError, DataError

ORDER_VERSION: Final = 1
"""Incremented whenever the same configuration would give a different order; stored in checkpoints."""

DEFAULT_LANES: Final = 64
DEFAULT_WINDOW: Final = 16_384

# Purposes of random streams. The purpose is part of the Philox key, so streams never overlap.
_SHARDS, _OFFSET, _WINDOWS = 1, 2, 3
_GOLDEN: Final = 0.6180339887498949

Ids = NDArray[np.int64]


class Needs(NamedTuple):
    """Which shards a reader needs, and when; a shard may appear several times.

    Attributes:
        shards: shard numbers. shape (needs,)
        first: the first step that may read the shard. shape (needs,)
        last: the last step that may read it. shape (needs,)
    """

    shards: Ids
    first: Ids
    last: Ids

    def later(self, steps: int) -> Needs:
        """Return the same needs, shifted by a number of steps."""
        return Needs(self.shards, self.first + steps, self.last + steps)

    @classmethod
    def join(cls, parts: Sequence[Needs]) -> Needs:
        """Concatenate several needs."""
        return cls(*(np.concatenate(part) for part in zip(*parts, strict=True)))


@dataclass(frozen=True)
class OrderConfig:
    """What the order depends on, besides the sizes of the shards.

    Attributes:
        global_batch_size: samples per optimizer step, ``G``.
        seed: any integer ``0 <= seed < 2**63``.
        lanes: how many places in the data set a global batch draws from, ``L``; must divide ``G``.
            0 takes the largest divisor of ``G`` up to 64.
        window: number of consecutive samples of a lane that are shuffled together.

    Raises:
        ConfigError: a value is out of range, or ``lanes`` does not divide ``global_batch_size``.
    """

    global_batch_size: int
    seed: int = 0
    lanes: int = 0
    window: int = DEFAULT_WINDOW

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ConfigError(f"global_batch_size is {self.global_batch_size}", hint="set it to at least 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}", hint="use a seed from 0 to 2**63 - 1")
        if self.window < 1:
            raise ConfigError(f"window is {self.window}", hint="set it to at least 1 (1 disables shuffling)")
        if self.lanes < 0 or (self.lanes and self.global_batch_size % self.lanes):
            raise ConfigError(
                f"lanes is {self.lanes}, which does not divide global_batch_size {self.global_batch_size}",
                hint="use a divisor of the global batch size, or 0 to choose one automatically",
            )

    @property
    def num_lanes(self) -> int:
        """The number of lanes: ``lanes``, or the largest divisor of the global batch size up to 64."""
        if self.lanes:
            return self.lanes
        bound = min(DEFAULT_LANES, self.global_batch_size)
        return next(d for d in range(bound, 0, -1) if self.global_batch_size % d == 0)


class Order:
    """The training order over shards of given sizes.

    Args:
        shard_sizes: number of samples in each shard, in index order. shape (shards,)
        config: what else the order depends on.

    Raises:
        DataError: there are fewer samples than one global batch.
    """

    def __init__(self, shard_sizes: NDArray[np.integer] | list[int], config: OrderConfig) -> None:
        self.config = config
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self._sizes.sum())
        self.steps_per_epoch = steps_in(self.num_samples, config.global_batch_size)
        self._starts = np.concatenate(([0], np.cumsum(self._sizes)))
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def sample_ids(
        self, epoch: int, first_step: int, num_steps: int = 1, positions: tuple[int, int] | None = None
    ) -> Ids:
        """Return the sample ids of some steps, restricted to a range of positions in the global batch.

        An id is a sample's place in index order, ``0 <= id < num_samples``.

        Args:
            epoch: ``>= 0``.
            first_step: step within the epoch.
            num_steps: how many steps.
            positions: half-open range of positions in the global batch; all of them by default.

        Returns:
            ids, shape (num_steps, positions).
        """
        low, high = positions or (0, self.config.global_batch_size)
        if not (first_step >= 0 and first_step + num_steps <= self.steps_per_epoch):
            raise IndexError(f"steps {first_step}..{first_step + num_steps} of {self.steps_per_epoch} in an epoch")
        if not 0 <= low < high <= self.config.global_batch_size:
            raise IndexError(f"positions {low}..{high} of a global batch of {self.config.global_batch_size}")
        return self._epoch(epoch).sample_ids(first_step, num_steps, low, high)

    def shard_needs(self, epoch: int, positions: tuple[int, int] | None = None) -> Needs:
        """Return which shards an epoch needs, and when, for a range of positions; O(shards)."""
        low, high = positions or (0, self.config.global_batch_size)
        begun = self._epoch(epoch)
        found = begun.needs(low // begun.per_step, (high - 1) // begun.per_step + 1)
        shards = np.searchsorted(self._starts, found.shards, side="right") - 1
        return Needs(shards, found.first, found.last)

    def fingerprint(self) -> dict[str, int | str]:
        """Return what a checkpoint stores to identify this order: equal fingerprints mean equal orders."""
        return {
            "version": ORDER_VERSION,
            "seed": self.config.seed,
            "global_batch_size": self.config.global_batch_size,
            "lanes": self.config.num_lanes,
            "window": self.config.window,
            "num_samples": self.num_samples,
            "shards": hashlib.sha256(self._sizes.astype("<i8").tobytes()).hexdigest()[:16],
        }

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            found = self._epochs[epoch] = _Epoch(self._sizes, self._starts, self.config, epoch)
            while len(self._epochs) > 2:  # the current epoch, and the next one once prefetching reaches it
                self._epochs.popitem(last=False)
        return found


class _Epoch:
    """One epoch's shard permutation, rotation and windows."""

    def __init__(self, sizes: Ids, starts: Ids, config: OrderConfig, epoch: int) -> None:
        self.config, self.epoch = config, epoch
        self.num_samples = int(starts[-1])
        steps = self.num_samples // config.global_batch_size
        self.per_step = config.global_batch_size // config.num_lanes  # g
        self.lane_length = steps * self.per_step
        shards = _permutation(len(sizes), self._stream(_SHARDS))
        self._sequence_starts = np.concatenate(([0], np.cumsum(sizes[shards])))  # ids: (shards + 1,)
        self._id_shift = starts[:-1][shards] - self._sequence_starts[:-1]
        self._offset = self._rotation()
        self._windows: OrderedDict[tuple[int, int, int], _Window] = OrderedDict()

    def _stream(self, purpose: int, index: int = 0, lane: int = 0) -> np.random.Philox:
        # Philox increments the lowest counter word as it draws; the other words identify the stream.
        return np.random.Philox(
            key=np.array([self.config.seed, purpose], dtype=np.uint64),
            counter=np.array([0, index, lane, self.epoch], dtype=np.uint64),
        )

    def _rotation(self) -> int:
        """Return this epoch's offset, which moves by a stride coprime to N from epoch to epoch.

        Consecutive epochs never share an offset, and with a single shard every sample is skipped equally often. An
        independent draw per epoch would guarantee neither.
        """
        n = self.num_samples
        first = np.random.Philox(key=np.array([self.config.seed, _OFFSET], dtype=np.uint64)).random_raw()
        stride = max(1, round(n * _GOLDEN))
        while np.gcd(stride, n) != 1:
            stride += 1
        return int((int(first) + self.epoch * stride) % n)

    def sample_ids(self, first_step: int, num_steps: int, low: int, high: int) -> Ids:
        g, window = self.per_step, self.config.window
        first_lane, last_lane = low // g, (high - 1) // g + 1
        lanes = np.arange(low, high, dtype=np.int64) // g - first_lane  # ids: (position,)
        elements = np.arange(first_step, first_step + num_steps, dtype=np.int64)[:, None] * g
        elements = elements + np.arange(low, high, dtype=np.int64) % g  # ids: (step, position)
        first, last = first_step * g, (first_step + num_steps) * g  # of each lane
        out = (first_lane + lanes) * self.lane_length + elements
        windows = range(first // window, (last - 1) // window + 1) if window > 1 else range(0)
        for index in windows:
            begin = max(first, index * window)
            end = min(last, (index + 1) * window)
            table = self._window(index, first_lane, last_lane).shuffled(begin - index * window, end - index * window)
            steps, places = np.nonzero((elements >= begin) & (elements < end))
            chosen = lanes[places]
            within = table[chosen, elements[steps, places] - begin]
            out[steps, places] = (first_lane + chosen) * self.lane_length + index * window + within
        sequence = (out + self._offset) % self.num_samples
        shard = np.searchsorted(self._sequence_starts, sequence, side="right") - 1
        return np.asarray(sequence + self._id_shift[shard], dtype=np.int64)

    def needs(self, first_lane: int, last_lane: int) -> Needs:
        """Return the needs of some lanes; each shard is given by the id of one of its samples."""
        parts = []
        for lane in range(first_lane, last_lane):
            begin = lane * self.lane_length + self._offset
            end = begin + self.lane_length
            # A lane that runs past the end of the sequence wraps around to its beginning.
            for shift in (0, self.num_samples):
                low, high = max(begin, shift), min(end, self.num_samples + shift)
                if low < high:
                    parts.append(self._needs_of(low - shift, high - shift, low - begin))
        return Needs.join(parts)

    def _needs_of(self, low: int, high: int, element: int) -> Needs:
        """Return the needs of ``[low, high)`` of the sequence, which starts at ``element`` of its lane."""
        first = int(np.searchsorted(self._sequence_starts, low, side="right")) - 1
        last = int(np.searchsorted(self._sequence_starts, high, side="left"))
        begins = np.maximum(self._sequence_starts[first:last], low)
        ends = np.minimum(self._sequence_starts[first + 1 : last + 1], high)
        ids = begins + self._id_shift[first:last]
        held = ends > begins  # a shard may be empty
        window, g = self.config.window, self.per_step
        # A window's samples may appear at any of its steps.
        from_ = (begins - low + element) // window * window
        to = np.minimum(((ends - 1 - low + element) // window + 1) * window, self.lane_length) - 1
        return Needs(ids[held], from_[held] // g, to[held] // g)

    def _window(self, index: int, first_lane: int, last_lane: int) -> _Window:
        """Return the shuffles of one window in some lanes."""
        key = (index, first_lane, last_lane)
        found = self._windows.get(key)
        if found is None:
            length = min(self.config.window, self.lane_length - index * self.config.window)
            streams = [self._stream(_WINDOWS, index, lane) for lane in range(first_lane, last_lane)]
            found = self._windows[key] = _Window(length, streams)
            while len(self._windows) > 2:  # a chunk of steps may straddle two windows
                self._windows.popitem(last=False)
        return found


class _Window:
    """Permutations of one window, one per lane, as returned by :func:`_permutation`, sorted on demand.

    The first request uses a partial sort, which takes a quarter of the time of a full one. The rest is sorted when a
    later request needs it.
    """

    def __init__(self, length: int, streams: Sequence[np.random.Philox]) -> None:
        self._keys = np.empty((len(streams), length), dtype=np.uint64)  # ids: (lane, element)
        for row, stream in zip(self._keys, streams, strict=True):
            row[:] = _random_keys(length, stream)
        self._low = self._high = 0  # sorted so far: [low, high) is final, and smaller keys come before it

    def shuffled(self, low: int, high: int) -> Ids:
        """Return some elements of every lane; shape (lanes, high - low)."""
        keys = self._keys
        if self._low == self._high:
            keys.partition(sorted({low, high - 1}), axis=1)
            keys[:, low:high].sort(axis=1)
            self._low, self._high = low, high
        if low < self._low:
            keys[:, : self._low].sort(axis=1)
            self._low = 0
        if high > self._high:
            keys[:, self._high :].sort(axis=1)
            self._high = keys.shape[1]
        return _indices(keys[:, low:high], keys.shape[1])


def steps_in(num_samples: int, global_batch_size: int) -> int:
    """Return the number of whole global batches in an epoch.

    Raises:
        DataError: there are fewer samples than one global batch.
    """
    if num_samples < global_batch_size:
        raise DataError(
            f"the training data holds {num_samples} samples, fewer than one global batch of {global_batch_size}",
            hint=f"set global_batch_size to at most {num_samples}, or add data",
        )
    return num_samples // global_batch_size


def _permutation(n: int, stream: np.random.Philox) -> Ids:
    """Return a uniform permutation of ``range(n)``: random keys, sorted.

    Each key holds its index in the low bits, so a plain sort yields the permutation, ties cannot happen, and the
    result depends on the raw stream alone (NumPy's own shuffles may change between versions).
    """
    keys = _random_keys(n, stream)
    keys.sort()
    return _indices(keys, n)


def _random_keys(n: int, stream: np.random.Philox) -> NDArray[np.uint64]:
    """Return random keys with their index in the low bits."""
    return (stream.random_raw(n) & ~_index_mask(n)) | np.arange(n, dtype=np.uint64)


def _indices(keys: NDArray[np.uint64], n: int) -> Ids:
    return (keys & _index_mask(n)).astype(np.int64)


def _index_mask(n: int) -> np.uint64:
    """Return a mask of the low bits of a key, wide enough for an index below ``n``."""
    return np.uint64((1 << max(1, (n - 1).bit_length())) - 1)


def evaluation_ids(num_samples: int, micro_batch_size: int, num_ranks: int, rank: int) -> tuple[Ids, NDArray[np.int64]]:
    """Return the samples 0..N-1 in micro batches that are the same at every world size.

    Rank ``r`` takes a contiguous run of ``ceil(M / R)`` of the ``M = ceil(N / b)`` micro batches. The last micro
    batch, and ranks that run out of samples, are padded with sample 0, which is masked. Every rank runs the same
    number of forward passes. Adding ranks never changes which samples share a micro batch, so results are
    bit-identical too.

    Returns:
        ids, shape (micro batches of this rank, micro_batch_size), and how many of each row, from the left,
        are real samples, shape (micro batches of this rank,).

    Raises:
        DataError: there are no samples.
    """
    if num_samples < 1:
        raise DataError("the evaluation data holds no samples", hint="point val/test at shards that hold samples")
    total = -(-num_samples // micro_batch_size)
    each = -(-total // num_ranks)
    ids = np.arange(rank * each, (rank + 1) * each, dtype=np.int64)[:, None] * micro_batch_size
    ids = ids + np.arange(micro_batch_size, dtype=np.int64)  # ids: (micro batch, sample)
    counts = np.clip(num_samples - ids[:, 0], 0, micro_batch_size)
    return np.where(ids < num_samples, ids, 0), counts
