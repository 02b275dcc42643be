"""Micro batches of one rank, read ahead by threads, in the order that the order says.

:class:`TrainLoader` walks one epoch from any position; :class:`EvaluationLoader` walks the plain order with
masked padding. Several micro batches are read at one go (a hand-over between threads costs more than a small
batch), and the bytes read ahead are bounded. The batches come in order whatever the number of threads.

A batch is a dictionary: the decoded fields by name, and

- ``__key__``: list of sample keys,
- ``__id__``: ids in the index, int64, shape (samples,),
- ``__weight__``: 1 for a sample, 0 for padding, float32, shape (samples,),
- ``__count__``: how many samples, from the left, are real (a Python int: no device is asked).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disttrain.data.mixture import Mixture
from disttrain.data.order import Needs, Order, evaluation_ids
from disttrain.data.reader import Reader
from disttrain.errors import ConfigError
from disttrain.parallel.config import BatchPlan

KEY: Final = "__key__"
ID: Final = "__id__"
WEIGHT: Final = "__weight__"
COUNT: Final = "__count__"

Batch = dict[str, Any]

# A read costs the more a sample the fewer it takes; what bounds it is the time to its first batch.
_SAMPLES_A_READ: Final = 4096
_BYTES_A_READ: Final = 8 * 2**20


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are read ahead. None of it changes what is read.

    Attributes:
        threads: reading threads; 0 reads in the training thread.
        prefetch_mib: bound on the bytes read ahead, in MiB of encoded samples.
    """

    threads: int = 2
    prefetch_mib: int = 256

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ConfigError(f"loader.threads is {self.threads}", mend="use 0 or more")
        if self.prefetch_mib < 1:
            raise ConfigError(f"loader.prefetch_mib is {self.prefetch_mib}", mend="use at least 1")


@dataclass(frozen=True)
class _Work:
    """Micro batches to read at one go.

    Attributes:
        ids: gives the samples, shape (micro batches, samples); called by the thread that reads.
        counts: real samples of each micro batch, shape (micro batches,); None where all are.
    """

    ids: Callable[[], NDArray[np.int64]]
    counts: NDArray[np.int64] | None = None


class _Loader:
    """What both loaders share: reading work ahead and cutting it into micro batches."""

    def __init__(self, reader: Reader, config: LoaderConfig, micro_batch_size: int) -> None:
        self.reader = reader
        self.config = config
        self.micro_batch_size = micro_batch_size
        self.wait_seconds = 0.0
        """Seconds that the consumer has waited for data so far."""
        self._sample_bytes = max(1.0, reader.mean_sample_bytes())

    def _micro_batches_a_read(self) -> int:
        samples = min(_SAMPLES_A_READ, _BYTES_A_READ / self._sample_bytes)
        return max(1, int(samples / self.micro_batch_size))

    def _run(self, work: Iterator[_Work]) -> Iterator[Batch]:
        if self.config.threads == 0:
            for item in work:
                started = time.perf_counter()
                batches = self._load(item)
                self.wait_seconds += time.perf_counter() - started
                yield from batches
            return
        read_bytes = self._micro_batches_a_read() * self.micro_batch_size * self._sample_bytes
        ahead = int(max(1, min(4 * self.config.threads, self.config.prefetch_mib * 2**20 / read_bytes)))
        pool = ThreadPoolExecutor(self.config.threads, thread_name_prefix="disttrain-reader")
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
        ids = work.ids()
        rows, size = ids.shape
        fields = self.reader.read(ids.ravel())
        keys = self.reader.keys(ids.ravel())
        if torch.cuda.is_available():
            fields = {name: v.pin_memory() if isinstance(v, Tensor) else v for name, v in fields.items()}
        counts = np.full(rows, size) if work.counts is None else work.counts
        weights = torch.from_numpy((np.arange(size) < counts[:, None]).astype(np.float32))
        copied = torch.from_numpy(ids.copy())
        batches: list[Batch] = []
        for row in range(rows):
            here = slice(row * size, (row + 1) * size)
            batch: Batch = {name: value[here] for name, value in fields.items()}
            batch[KEY] = keys[here]
            batch[ID] = copied[row]
            batch[WEIGHT] = weights[row]
            batch[COUNT] = int(counts[row])
            batches.append(batch)
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
        reader: reads the samples.
        order: says which.
        plan: the cut of a global batch.
        rank: this rank among ``plan.num_ranks``.
        config: how to read ahead.
        position: gives (epoch, step within the epoch); the start of epoch 0 by default.
    """

    def __init__(
        self,
        reader: Reader,
        order: Order | Mixture,
        plan: BatchPlan,
        *,
        rank: int = 0,
        config: LoaderConfig | None = None,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        super().__init__(reader, config or LoaderConfig(), plan.micro_batch_size)
        self.order, self.plan, self.rank = order, plan, rank
        self._position = position
        self._order_lock = Lock()

    def __len__(self) -> int:
        return self.order.steps_per_epoch * self.plan.accumulation

    def __iter__(self) -> Iterator[Batch]:
        epoch, step = self._position()
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
        def ids() -> NDArray[np.int64]:
            self.reader.store.begin(step)
            with self._order_lock:  # the order keeps its last windows, which threads must not mix up
                found = self.order.sample_ids(epoch, step, num_steps, (low, high))
            return found.reshape(-1, self.plan.micro_batch_size)

        return _Work(ids)


class EvaluationLoader(_Loader):
    """The evaluation micro batches of one rank: every sample once over all ranks, padding masked.

    Args:
        reader: reads the samples.
        micro_batch_size: samples of a micro batch; the last is padded to it.
        num_ranks: ranks that share the evaluation.
        rank: this rank.
        config: how to read ahead.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        micro_batch_size: int,
        num_ranks: int = 1,
        rank: int = 0,
        config: LoaderConfig | None = None,
    ) -> None:
        super().__init__(reader, config or LoaderConfig(), micro_batch_size)
        self._ids, self._counts = evaluation_ids(len(reader.index), micro_batch_size, num_ranks, rank)

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Batch]:
        if self.reader.store.has_remote:
            self.reader.store.follow(self._needs(), 0)
        try:
            pieces = _growing(0, len(self._ids), self._micro_batches_a_read())
            yield from self._run(self._rows(row, row + size) for row, size in pieces)
        finally:
            self.reader.store.finish()

    def _needs(self) -> Needs:
        """Which micro batch is the first to need a shard, and which the last."""
        low = int(self._ids[0, 0])
        begins = np.maximum(self.reader.index.starts[:-1], low)
        ends = np.minimum(self.reader.index.starts[1:], low + int(self._counts.sum()))
        shards = np.flatnonzero(ends > begins)
        first, last = (begins[shards] - low), (ends[shards] - 1 - low)
        return Needs(shards, first // self.micro_batch_size, last // self.micro_batch_size)

    def _rows(self, first: int, last: int) -> _Work:
        def ids() -> NDArray[np.int64]:
            self.reader.store.begin(first)
            return self._ids[first:last]

        return _Work(ids, self._counts[first:last])
