"""Load the micro batches of one rank, prefetched by threads, in a deterministic order.

:class:`TrainLoader` iterates over one epoch from any position; :class:`EvaluationLoader` iterates over all samples in
index order, with masked padding. Each read covers several micro batches (a handover between threads costs more than a
small batch), and the bytes read ahead are bounded. Batches arrive in order whatever the number of threads.

For the contents of a batch, see :mod:`disttrain.data.loader.batches`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from disttrain.data.decode.rng import Draws
from disttrain.data.loader.batches import Batch, BatchMaker
from disttrain.data.loader.workers import WorkerPool
from disttrain.data.order.mixture import Mixture
from disttrain.data.order.sample_order import Needs, Order, evaluation_ids
from disttrain.data.reader.sample_reader import Reader
from disttrain.errors import ConfigError
from disttrain.parallel.config import BatchPlan
from disttrain.system.device import same_device, uses_cuda

# Larger reads cost less per sample; these limits bound the time to the first batch of a read.
_SAMPLES_A_READ: Final = 4096
_BYTES_A_READ: Final = 8 * 2**20


@dataclass(frozen=True)
class LoaderConfig:
    """Prefetching of batches. No setting changes which samples are read.

    Attributes:
        threads: number of reader threads; 0 reads in the training thread.
        workers: number of worker processes that read, decode and transform instead of the threads: for decoders and
            transforms that hold the GIL. 0 uses threads.
        prefetch_mib: limit on the bytes read ahead, in MiB of encoded samples.
    """

    threads: int = 2
    workers: int = 0
    prefetch_mib: int = 256

    def __post_init__(self) -> None:
        for name, value in (("threads", self.threads), ("workers", self.workers)):
            if value < 0:
                raise ConfigError(f"loader.{name} is {value}", hint="use 0 or more")
        if self.prefetch_mib < 1:
            raise ConfigError(f"loader.prefetch_mib is {self.prefetch_mib}", hint="use at least 1")


@dataclass(frozen=True)
class _Work:
    """Micro batches to load with one read.

    Attributes:
        samples: returns the sample ids, shape (micro batches, samples), and their random numbers, or None if nothing
            is drawn; called in the reader thread.
        counts: number of real samples in each micro batch, shape (micro batches,); None if all are real.
    """

    samples: Callable[[], tuple[NDArray[np.int64], Draws | None]]
    counts: NDArray[np.int64] | None = None


class _Loader:
    """Shared base of both loaders: prefetch work and cut it into micro batches."""

    def __init__(
        self, source: Reader | BatchMaker, config: LoaderConfig, micro_batch_size: int, pool: WorkerPool | None
    ) -> None:
        self.maker = source if isinstance(source, BatchMaker) else BatchMaker(source)
        self.reader = self.maker.reader
        self.config = config
        self._pool = pool if pool is not None or not config.workers else WorkerPool(config.workers)
        self.micro_batch_size = micro_batch_size
        self.wait_seconds = 0.0
        """Total seconds the consumer has waited for data."""
        self._sample_bytes = max(1.0, self.reader.mean_sample_bytes())

    def _micro_batches_a_read(self) -> int:
        samples = min(_SAMPLES_A_READ, _BYTES_A_READ / self._sample_bytes)
        return max(1, int(samples / self.micro_batch_size))

    def _run(self, work: Iterator[_Work]) -> Iterator[Batch]:
        threads = self.config.workers or self.config.threads
        if threads == 0:
            for item in work:
                started = time.perf_counter()
                batches = self._load(item)
                self.wait_seconds += time.perf_counter() - started
                yield from batches
            return
        read_bytes = self._micro_batches_a_read() * self.micro_batch_size * self._sample_bytes
        ahead = int(max(1, min(4 * threads, self.config.prefetch_mib * 2**20 / read_bytes)))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="disttrain-reader", initializer=same_device())
        pending: deque[Future[list[Batch]]] = deque()
        try:
            for item in work:
                pending.append(pool.submit(self._load, item))
                if len(pending) >= ahead:
                    yield from self._wait(pending.popleft())
            while pending:
                yield from self._wait(pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _wait(self, future: Future[list[Batch]]) -> list[Batch]:
        started = time.perf_counter()
        batches = future.result()
        self.wait_seconds += time.perf_counter() - started
        return batches

    def _load(self, work: _Work) -> list[Batch]:
        ids, draws = work.samples()
        if self._pool is not None:
            batches = self._pool.make(self.maker, ids, work.counts, draws)
        else:
            batches = self.maker.make(ids, work.counts, draws)
        if uses_cuda():
            batches = [{n: v.pin_memory() if isinstance(v, Tensor) else v for n, v in b.items()} for b in batches]
        return batches


def _growing(first: int, last: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut a range into (start, length) with lengths 1, 2, 4, ..., ``most``, so that the first batch is ready early."""
    length = 1
    while first < last:
        length = min(length, last - first)
        yield first, length
        first, length = first + length, min(2 * length, most)


class TrainLoader(_Loader):
    """The training micro batches of one rank.

    Iteration covers one epoch from ``position``, which is called only when the first batch is requested, so its owner
    (the trainer's restored counters) may set it late. ``len`` is always that of a whole epoch.

    Args:
        source: builds the batches; a bare Reader gets a default BatchMaker.
        order: the order of samples.
        plan: the split of a global batch over ranks and micro batches.
        rank: this rank among ``plan.num_ranks``.
        config: prefetch settings.
        position: returns (epoch, step within the epoch); by default the start of epoch 0.
        pool: worker processes to share; by default the loader creates its own if ``config`` asks for workers.
    """

    def __init__(
        self,
        source: Reader | BatchMaker,
        order: Order | Mixture,
        plan: BatchPlan,
        *,
        rank: int = 0,
        config: LoaderConfig | None = None,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
        pool: WorkerPool | None = None,
    ) -> None:
        super().__init__(source, config or LoaderConfig(), plan.micro_batch_size, pool)
        self.order, self.plan, self.rank = order, plan, rank
        self.position = position
        """Returns (epoch, step within the epoch)."""
        self._order_lock = Lock()

    def __len__(self) -> int:
        return self.order.steps_per_epoch * self.plan.accumulation

    def __iter__(self) -> Iterator[Batch]:
        epoch, step = self.position()
        if self.reader.store.has_remote:
            self.reader.store.follow(self._needs(epoch), step)
        yield from self._run(self._work(epoch, step))

    def _needs(self, epoch: int) -> Needs:
        """Return when this rank needs which shards, in this epoch and the next (prefetched while this one ends)."""
        low = self.rank * self.plan.rank_batch_size
        with self._order_lock:
            now, then = (self.order.shard_needs(e, (low, low + self.plan.rank_batch_size)) for e in (epoch, epoch + 1))
        return Needs.join([now, then.later(self.order.steps_per_epoch)])

    def _work(self, epoch: int, first_step: int) -> Iterator[_Work]:
        """Generate work in whole steps if a read holds at least one, otherwise in parts of a step."""
        size, steps = self._micro_batches_a_read(), self.order.steps_per_epoch
        low = self.rank * self.plan.rank_batch_size
        if size >= self.plan.accumulation:
            for step, several in _growing(first_step, steps, size // self.plan.accumulation):
                yield self._some(epoch, step, several, low, low + self.plan.rank_batch_size)
            return
        for step in range(first_step, steps):
            for part in range(0, self.plan.accumulation, size):
                count = min(size, self.plan.accumulation - part)
                at = low + part * self.plan.micro_batch_size
                yield self._some(epoch, step, 1, at, at + count * self.plan.micro_batch_size)

    def _some(self, epoch: int, step: int, num_steps: int, low: int, high: int) -> _Work:
        def samples() -> tuple[NDArray[np.int64], Draws | None]:
            self.reader.store.begin(step)
            with self._order_lock:  # the order caches its last windows and is not thread-safe
                found = self.order.sample_ids(epoch, step, num_steps, (low, high))
            ids = found.reshape(-1, self.plan.micro_batch_size)
            if not self.maker.draws_numbers:
                return ids, None
            epochs = np.full(found.shape, epoch)
            if isinstance(self.order, Mixture):
                epochs = self.order.sample_epochs(epoch, step, num_steps, (low, high))
            return ids, Draws(self.order.config.seed, epochs.ravel(), ids.ravel())

        return _Work(samples)


class EvaluationLoader(_Loader):
    """The evaluation micro batches of one rank: every sample exactly once over all ranks, with masked padding.

    Args:
        source: builds the batches; a bare Reader gets a default BatchMaker.
        micro_batch_size: samples per micro batch; the last one is padded to this size.
        num_ranks: number of ranks that share the evaluation.
        rank: this rank.
        config: prefetch settings.
        pool: worker processes to share.
    """

    def __init__(
        self,
        source: Reader | BatchMaker,
        *,
        micro_batch_size: int,
        num_ranks: int = 1,
        rank: int = 0,
        config: LoaderConfig | None = None,
        pool: WorkerPool | None = None,
    ) -> None:
        super().__init__(source, config or LoaderConfig(), micro_batch_size, pool)
        self.num_ranks, self.rank = num_ranks, rank
        self._ids, self._counts = evaluation_ids(len(self.reader.index), micro_batch_size, num_ranks, rank)

    @property
    def pads(self) -> bool:
        """Whether any rank has padded micro batches."""
        return len(self.reader.index) != len(self._ids) * self.micro_batch_size * self.num_ranks

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Batch]:
        if self.reader.store.has_remote:
            self.reader.store.follow(self._needs(), 0)
        try:
            pieces = _growing(0, len(self._ids), self._micro_batches_a_read())
            yield from self._run(self._rows(row, row + size) for row, size in pieces)
        finally:
            self.reader.store.finish(again=True)

    def _needs(self) -> Needs:
        """Return the first and last micro batch that need each shard."""
        low = int(self._ids[0, 0])
        begins = np.maximum(self.reader.index.starts[:-1], low)
        ends = np.minimum(self.reader.index.starts[1:], low + int(self._counts.sum()))
        shards = np.flatnonzero(ends > begins)
        first, last = (begins[shards] - low), (ends[shards] - 1 - low)
        return Needs(shards, first // self.micro_batch_size, last // self.micro_batch_size)

    def _rows(self, first: int, last: int) -> _Work:
        def samples() -> tuple[NDArray[np.int64], None]:
            self.reader.store.begin(first)
            return self._ids[first:last], None

        return _Work(samples, self._counts[first:last])
