"""Locate a reader's shards: local ones in place, remote ones in the node's cache.

Threads prefetch remote shards in the order of the plan that the loader supplies; the cache evicts by the same plan.
Local shards cost nothing here.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from threading import Condition, Thread
from typing import Final

import numpy as np

from disttrain.data.cache.eviction import FAR, Plan
from disttrain.data.cache.shard_cache import CacheConfig, ShardCache, name_of
from disttrain.data.index.shard_index import Shard
from disttrain.data.order.sample_order import Needs
from disttrain.data.remote.ranges import shown
from disttrain.errors import ConfigError, DataError, DisttrainError

# Threads start reads in order, so the oldest of the last few is done or nearly so.
_READS_AT_ONCE: Final = 4
_LOOK_AGAIN_SECONDS: Final = 1.0


class ShardStore:
    """The shards of one index, opened by number. Thread-safe.

    Args:
        shards: the shards of the index.
        config: the cache for remote shards.

    Raises:
        ConfigError: the cache is smaller than a shard.
        DataError: the cache folder cannot be created.
    """

    def __init__(self, shards: Sequence[Shard], config: CacheConfig | None = None) -> None:
        config = config or CacheConfig()
        self.config, self._shards = config, shards
        largest = max((shard for shard in shards if shard.is_remote), key=lambda shard: shard.size_bytes, default=None)
        if largest is not None and largest.size_bytes > config.max_bytes:
            raise ConfigError(
                f"cache.max_gib {config.max_gib:g} is {config.max_bytes} bytes, less than shard {shown(largest.path)}"
                f" of {largest.size_bytes} bytes",
                hint=f"set data.cache.max_gib to {max(0.01, 4 * largest.size_bytes / 2**30):.2g} or more",
            )
        self._cache = ShardCache(config) if largest is not None else None
        self._ahead: _Ahead | None = None
        self._resting: Plan | None = None
        self._begun: deque[int] = deque(maxlen=_READS_AT_ONCE)
        self._warned = False

    @property
    def has_remote(self) -> bool:
        """Whether any shard is remote, so that a plan is useful."""
        return self._cache is not None

    def open(self, number: int) -> int | None:
        """Return a descriptor of a remote shard's local copy, which the caller must close soon; None for a local shard.

        Raises:
            DataError: the shard cannot be fetched.
        """
        shard = self._shards[number]
        return self._cache.open(shard) if self._cache is not None and shard.is_remote else None

    def follow(self, needs: Needs, step: int) -> None:
        """Prefetch and evict by a new plan, starting at a step."""
        if self._cache is None:
            return
        self._warn_if_small(self._cache.config, needs)
        self._begun.clear()
        try:
            ahead = _Ahead(self._cache, self._shards, needs, step)
        except OSError as error:
            raise DataError(
                f"the cache folder {self._cache.directory} cannot be written: {error.strerror}",
                hint="free space in it, or set data.cache.directory to another folder",
            ) from None
        self.finish()  # after publishing the new plan, or a shard of both might be evicted in between
        self._ahead = ahead

    def _warn_if_small(self, config: CacheConfig, needs: Needs) -> None:
        """Warn once if the cache cannot hold the shards of one step, which would be refetched each time."""
        sizes = np.array([shard.size_bytes if shard.is_remote else 0 for shard in self._shards], dtype=np.int64)
        changes = np.concatenate((sizes[needs.shards], -sizes[needs.shards]))
        times = np.concatenate((needs.first, needs.last + 1))
        # A shard released at a step makes room for those first needed at that step.
        at_once = int(np.cumsum(changes[np.lexsort((changes, times))]).max(initial=0))
        if at_once > config.max_bytes and not self._warned:
            self._warned = True
            warnings.warn(
                f"one rank draws from {at_once / 2**30:.3g} GiB of remote shards at once, more than"
                f" data.cache.max_gib {config.max_gib:.3g}, so shards are fetched again and again: raise it above that"
                " times the ranks of a node, or lower data.shuffle.window or data.shuffle.lanes",
                stacklevel=3,
            )

    def begin(self, step: int) -> None:
        """Record that the read of a step has started; shards needed only by older reads may be evicted."""
        if self._ahead is not None:
            self._begun.append(step)
            self._ahead.stand_at(self._begun[0])

    def finish(self, *, again: bool = False) -> None:
        """End the current plan.

        Args:
            again: another plan, such as the next validation, will need its shards. They are evicted after shards that
                are not needed at all, but before any that are scheduled.
        """
        resting, self._resting = self._resting, None
        if self._ahead is not None:
            if again:
                with suppress(OSError):  # the shards would only be fetched again
                    self._resting = self._ahead.rest()
            self._ahead.close()
            self._ahead = None
        if resting is not None:
            resting.close()


class _Ahead:
    """An active plan, and the threads that prefetch by it."""

    def __init__(self, cache: ShardCache, shards: Sequence[Shard], needs: Needs, step: int) -> None:
        self._cache = cache
        remote = np.array([shard.is_remote for shard in shards])[needs.shards]
        needs = Needs(needs.shards[remote], needs.first[remote], needs.last[remote])
        self._shards, self._changed, self._closed = shards, Condition(), False
        self._plan = self._plan_of(needs, step)
        self._lasts, self._let_go = np.sort(needs.last), 0
        order = np.argsort(needs.first, kind="stable")
        self._todo = deque(zip(*(part[order].tolist() for part in needs), strict=True))
        for number in range(cache.config.prefetch_threads):
            Thread(target=self._work, name=f"disttrain-prefetch-{number}", daemon=True).start()

    def stand_at(self, step: int) -> None:
        with self._changed:
            self._plan.stand_at(step)
            let_go = int(np.searchsorted(self._lasts, step))
            if let_go != self._let_go:  # not at every step: checking for room costs milliseconds
                self._let_go = let_go
                self._changed.notify_all()

    def rest(self) -> Plan:
        """Return a plan that needs the same shards at an unknown later time."""
        shards = np.unique(self._plan.needs.shards)
        some_time = np.full(len(shards), FAR, dtype=np.int64)
        return self._plan_of(Needs(shards, some_time, some_time), 0)

    def _plan_of(self, needs: Needs, step: int) -> Plan:
        names = [name_of(shard) for shard in self._shards]
        return Plan(self._cache.directory, names, needs, step, [shard.size_bytes for shard in self._shards])

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._plan.close()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._closed or not self._todo:
                    return
                shard, first, last = self._todo.popleft()
            while not self._done(shard, first, last):
                with self._changed:
                    if self._closed:
                        return
                    # Progress of another process makes room too, but does not notify this one: poll.
                    self._changed.wait(_LOOK_AGAIN_SECONDS)

    def _done(self, shard: int, first: int, last: int) -> bool:
        now = self._plan.step
        if self._closed or last < now:
            return True
        try:
            return self._cache.prefetch(self._shards[shard], max(0, first - now))
        except (DisttrainError, OSError):
            return True  # the reader of the shard hits the same error and reports it
