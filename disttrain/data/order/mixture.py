"""Mix several sources into one training order, with exact quotas.

A period of ``k`` global batches has ``k * G`` slots. Source ``i`` fills exactly ``Q_i`` of them, spread as evenly as
possible; ``k`` is the smallest period for which every quota is within 1 % of its weight. The ``j``-th slot of source
``i`` in period ``u`` takes that source's draw number ``u * Q_i + j``. Each source has a separate
:class:`~disttrain.data.order.sample_order.Order` with separate epochs, so a small source may be repeated (in a new
order each time, never with a sample twice in one of its epochs) while a large one is still in its first epoch. Like the
order of a single source, a mixture is a pure function of (sizes, weights, seed, step, global batch size): it does not
depend on the world size, and any position is found without replaying.

Cost: O(k * G) memory for the slots of a period, plus the sources' orders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from disttrain.data.order.sample_order import DEFAULT_LANES, Ids, Needs, Order, OrderConfig, steps_in
from disttrain.errors import ConfigError, DataError

MIXTURE_VERSION: Final = 1
_MAX_PERIOD: Final = 256
_TOLERANCE: Final = 0.01


@dataclass(frozen=True)
class Portion:
    """One source of a mixture.

    Attributes:
        name: name in reports and errors.
        shard_sizes: number of samples in each of its shards.
        weight: its share of the samples, relative to the other weights.
    """

    name: str
    shard_sizes: tuple[int, ...]
    weight: float

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(
                f"source {self.name!r} has weight {self.weight}", hint="use a positive weight, or remove the source"
            )
        if sum(self.shard_sizes) < 1:
            raise DataError(f"source {self.name!r} holds no samples", hint="point it at shards that hold samples")


class Mixture:
    """The training order over several weighted sources.

    Ids number the samples of all sources, concatenated. An epoch of the run has as many steps as the samples of all
    sources fill; the sources' epochs are counted separately.

    Args:
        portions: the sources.
        config: global batch size, seed, lanes and window; each source's seed is derived from it.

    Raises:
        ConfigError: a weight is too small for a single slot in the longest period.
        DataError: there are fewer samples than one global batch.
    """

    def __init__(self, portions: Sequence[Portion], config: OrderConfig) -> None:
        self.portions, self.config = tuple(portions), config
        sizes = np.array([sum(portion.shard_sizes) for portion in portions], dtype=np.int64)
        self.num_samples = int(sizes.sum())
        self.steps_per_epoch = steps_in(self.num_samples, config.global_batch_size)
        self._starts = np.concatenate(([0], np.cumsum(sizes)))
        self.period, self.quotas = _quotas(self.portions, config.global_batch_size)
        self._source, self._turn = _slots(self.quotas)  # both of shape (slots of a period,)
        # A source's order deals out its draws in rounds of one per lane, so that consecutive draws come from all over
        # the source. A source that fits into one window is fully shuffled without lanes, and then no sample is dropped
        # from an epoch.
        lanes = np.where(sizes <= config.window, 1, np.minimum(sizes, DEFAULT_LANES))
        self._orders = [
            Order(
                list(portion.shard_sizes),
                replace(config, global_batch_size=int(count), seed=_seed(config.seed, i), lanes=0),
            )
            for i, (portion, count) in enumerate(zip(self.portions, lanes, strict=True))
        ]

    def sample_ids(
        self, epoch: int, first_step: int, num_steps: int = 1, positions: tuple[int, int] | None = None
    ) -> Ids:
        """Return the sample ids of some steps, as :meth:`Order.sample_ids` does; shape (num_steps, positions)."""
        periods, slot = self._places(epoch, first_step, num_steps, positions)
        out = np.empty_like(slot)
        for i, here in self._sources(slot):
            draws = periods[here] * self.quotas[i] + self._turn[slot[here]]
            out[here] = self._starts[i] + self._draw(i, draws)
        return out

    def sample_epochs(
        self, epoch: int, first_step: int, num_steps: int = 1, positions: tuple[int, int] | None = None
    ) -> Ids:
        """Return, for each of :meth:`sample_ids`, the epoch of its source."""
        periods, slot = self._places(epoch, first_step, num_steps, positions)
        out = np.empty_like(slot)
        for i, here in self._sources(slot):
            draws = periods[here] * self.quotas[i] + self._turn[slot[here]]
            order = self._orders[i]
            out[here] = draws // order.config.global_batch_size // order.steps_per_epoch
        return out

    def shard_needs(self, epoch: int, positions: tuple[int, int] | None = None) -> Needs:
        """Return when an epoch needs which shards, as :meth:`Order.shard_needs` does; the same for all ranks."""
        parts, shift = [], 0
        first_step, num_steps = epoch * self.steps_per_epoch, self.steps_per_epoch
        for portion, order, quota in zip(self.portions, self._orders, self.quotas.tolist(), strict=True):
            size = order.config.global_batch_size
            draws = (first_step // self.period * quota, ((first_step + num_steps - 1) // self.period + 1) * quota)
            first, last = (draw // size // order.steps_per_epoch for draw in (draws[0], draws[1] - 1))
            if last - first > 1:  # repeated within the epoch: needed throughout
                shards = np.flatnonzero(portion.shard_sizes) + shift
                parts.append(Needs(shards, np.zeros_like(shards), np.full_like(shards, num_steps - 1)))
            else:
                for own in range(first, last + 1):
                    found = order.shard_needs(own).later(own * order.steps_per_epoch)
                    # A draw may fall on any step of its period.
                    begin = found.first * size // quota * self.period - first_step
                    end = (((found.last + 1) * size - 1) // quota + 1) * self.period - 1 - first_step
                    here = (end >= 0) & (begin < num_steps)
                    parts.append(Needs(found.shards[here] + shift, np.maximum(begin[here], 0), end[here]))
            shift += len(portion.shard_sizes)
        return Needs.join(parts)

    def epochs_of(self, steps: int) -> dict[str, float]:
        """Return how many epochs of each source the first ``steps`` steps cover, as a fraction, by name."""
        counts = self.counts_of(steps)
        sizes = np.diff(self._starts)
        return {p.name: counts[p.name] / int(size) for p, size in zip(self.portions, sizes, strict=True)}

    def counts_of(self, steps: int) -> dict[str, int]:
        """Return how many samples of each source the first ``steps`` steps use, by name."""
        periods, rest = divmod(steps * self.config.global_batch_size, len(self._source))
        begun = np.bincount(self._source[:rest], minlength=len(self.portions))
        return {p.name: int(periods * q + b) for p, q, b in zip(self.portions, self.quotas, begun, strict=True)}

    def fingerprint(self) -> dict[str, int | str]:
        """Return what a checkpoint stores to recognize this order."""
        prints = "|".join(str(sorted(order.fingerprint().items())) for order in self._orders)
        return {
            "version": MIXTURE_VERSION,
            "seed": self.config.seed,
            "global_batch_size": self.config.global_batch_size,
            "num_samples": self.num_samples,
            "quotas": ":".join(str(quota) for quota in self.quotas),
            "sources": hashlib.sha256(prints.encode()).hexdigest()[:16],
        }

    def _places(
        self, epoch: int, first_step: int, num_steps: int, positions: tuple[int, int] | None
    ) -> tuple[Ids, Ids]:
        """Return the period and slot of each position of some steps, both of shape (num_steps, positions)."""
        low, high = positions or (0, self.config.global_batch_size)
        steps = epoch * self.steps_per_epoch + np.arange(first_step, first_step + num_steps, dtype=np.int64)
        slots = steps[:, None] * self.config.global_batch_size + np.arange(low, high, dtype=np.int64)
        return np.divmod(slots, len(self._source))

    def _sources(self, slot: Ids) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """Yield each source that fills some of the slots, with a mask of its slots."""
        filled = self._source[slot]
        for i in np.unique(filled).tolist():
            yield i, filled == i

    def _draw(self, source: int, draws: Ids) -> Ids:
        """Return a source's samples for ascending draw numbers."""
        order = self._orders[source]
        rounds, places = np.divmod(draws, order.config.global_batch_size)
        first, last, length = int(rounds[0]), int(rounds[-1]), order.steps_per_epoch
        found: list[Ids] = []
        for epoch in range(first // length, last // length + 1):
            begin = max(first - epoch * length, 0)
            end = min(last + 1 - epoch * length, length)
            found.append(order.sample_ids(epoch, begin, end - begin))
        return np.asarray(np.concatenate(found)[rounds - first, places], dtype=np.int64)


def _quotas(portions: Sequence[Portion], global_batch_size: int) -> tuple[int, NDArray[np.int64]]:
    """Return the period in global batches, and each source's slots in it (largest remainder method)."""
    weights = np.array([portion.weight for portion in portions], dtype=np.float64)
    weights /= weights.sum()
    period, quotas = 1, np.zeros(len(portions), dtype=np.int64)
    while True:
        exact = weights * period * global_batch_size
        quotas = np.floor(exact).astype(np.int64)
        missing = period * global_batch_size - int(quotas.sum())
        # Stable sort: on equal remainders, earlier sources win.
        quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
        if (np.abs(quotas - exact) <= _TOLERANCE * exact).all() or period == _MAX_PERIOD:
            break
        period += 1
    if (quotas == 0).any():
        name = portions[int(np.flatnonzero(quotas == 0)[0])].name
        raise ConfigError(
            f"the weight of source {name!r} gives it no sample in {_MAX_PERIOD} global batches",
            hint="raise its weight or the global batch size, or remove the source",
        )
    return period, quotas


def _slots(quotas: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the source of each slot of a period, and the slot's number within that source.

    The ideal position of the ``j``-th slot of source ``i`` is ``(j + 1/2) / Q_i`` of the period; slots are assigned in
    that order.
    """
    source = np.repeat(np.arange(len(quotas)), quotas)
    turn = np.concatenate([np.arange(quota) for quota in quotas])
    ideal = (turn + 0.5) / quotas[source]
    order = np.argsort(ideal, kind="stable")
    return source[order], turn[order]


def _seed(seed: int, source: int) -> int:
    """Derive a seed for one source, so that sources of equal size get different orders."""
    return int(np.random.SeedSequence((seed, source)).generate_state(1, np.uint64)[0] >> np.uint64(1))
