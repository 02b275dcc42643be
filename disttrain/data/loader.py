"""Micro batches of one rank, read ahead by threads, in the order that the order says.

:class:`TrainLoader` walks one epoch from any position; :class:`EvaluationLoader` walks the plain order with
masked padding. Several micro batches are read at one go (a hand-over between threads costs more than a small
batch), and the bytes read ahead are bounded. The batches come in order whatever the number of threads.

What a batch holds is said in :mod:`disttrain.data.batches`.
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

from disttrain.data.batches import Batch, BatchMaker
from disttrain.data.device import same_device, uses_cuda
from disttrain.data.draws import Draws
from disttrain.data.mixture import Mixture
from disttrain.data.order import Needs, Order, evaluation_ids
from disttrain.data.reader import Reader
from disttrain.data.workers import WorkerPool
from disttrain.errors import ConfigError
from disttrain.parallel.config import BatchPlan

# A read costs the more a sample the fewer it takes; what bounds it is the time to its first batch.
_SAMPLES_A_READ: Final = 4096
_BYTES_A_READ: Final = 8 * 2**20


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are read ahead. None of it changes what is read.

    Attributes:
        threads: reading threads; 0 reads in the training thread.
        workers: processes that read, decode and transform in place of the threads: for decoders and transforms
            that hold Python's lock. 0 uses the threads.
        prefetch_mib: bound on the bytes read ahead, in MiB of encoded samples.
    """

    threads: int = 2
    workers: int = 0
    prefetch_mib: int = 256

    def __post_init__(self) -> None:
        for name, value in (("threads", self.threads), ("workers", self.workers)):
            if value < 0:
                raise ConfigError(f"loader.{name} is {value}", mend="use 0 or more")
        if self.prefetch_mib < 1:
            raise ConfigError(f"loader.prefetch_mib is {self.prefetch_mib}", mend="use at least 1")


@dataclass(frozen=True)
class _Work:
    """Micro batches to read at one go.

    Attributes:
        samples: gives the samples, shape (micro batches, samples), and random numbers for them, or None where
            nothing is drawn; called by the thread that reads.
        counts: real samples of each micro batch, shape (micro batches,); None where all are.
    """

    samples: Callable[[], tuple[NDArray[np.int64], Draws | None]]
    counts: NDArray[np.int64] | None = None


class _Loader:
    """What both loaders share: reading work ahead and cutting it into micro batches."""

    def __init__(
        self, source: Reader | BatchMaker, config: LoaderConfig, micro_batch_size: int, pool: WorkerPool | None
    ) -> None:
        self.maker = source if isinstance(source, BatchMaker) else BatchMaker(source)
        self.reader = self.maker.reader
        self.config = config
        self._pool = pool if pool is not None or not config.workers else WorkerPool(config.workers)
        self.micro_batch_size = micro_batch_size
        self.wait_seconds = 0.0
        """Seconds that the consumer has waited for data so far."""
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
    """Cut a range into (start, length) of length 1, 2, 4, ... ``most``: the first batch waits for no other."""
    length = 1
    while first < last:
        length = min(length, last - first)
        yield first, length
        first, length = first + length, min(2 * length, most)


class TrainLoader(_Loader):
    """The training micro batches of one rank.

    Iterating walks one epoch from the position that ``position`` gives when the first batch is asked for, so
    that whoever owns the position (the trainer's restored counters) may set it late. The length is that of
    a whole epoch.

    Args:
        source: makes the batches, or reads the samples of plain ones.
        order: says which.
        plan: the cut of a global batch.
        rank: this rank among ``plan.num_ranks``.
        config: how to read ahead.
        position: gives (epoch, step within the epoch); the start of epoch 0 by default.
        pool: worker processes to share; by default the loader has its own where ``config`` asks for them.
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
        """Gives epoch and step within it."""
        self._order_lock = Lock()

    def __len__(self) -> int:
        return self.order.steps_per_epoch * self.plan.accumulation

    def __iter__(self) -> Iterator[Batch]:
        epoch, step = self.position()
        if self.reader.store.has_remote:
            self.reader.store.follow(self._needs(epoch), step)
        yield from self._run(self._work(epoch, step))

    def _needs(self, epoch: int) -> Needs:
        """When this rank needs which shards in this epoch and the next, which is fetched while this one ends."""
        low = self.rank * self.plan.rank_batch_size
        with self._order_lock:
            now, then = (self.order.shard_needs(e, (low, low + self.plan.rank_batch_size)) for e in (epoch, epoch + 1))
        return Needs.join([now, then.later(self.order.steps_per_epoch)])

    def _work(self, epoch: int, first_step: int) -> Iterator[_Work]:
        """Work in whole steps where a read holds several, else in parts of a step."""
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
            with self._order_lock:  # the order keeps its last windows, which threads must not mix up
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
    """The evaluation micro batches of one rank: every sample once over all ranks, padding masked.

    Args:
        source: makes the batches, or reads the samples of plain ones.
        micro_batch_size: samples of a micro batch; the last is padded to it.
        num_ranks: ranks that share the evaluation.
        rank: this rank.
        config: how to read ahead.
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
        """Whether micro batches of any rank are filled up."""
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
        """Which micro batch is the first to need a shard, and which the last."""
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
