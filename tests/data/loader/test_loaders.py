"""The loaders: what the order says, in order, whatever threads read it, from any position."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from disttrain.data.decode.fields import Decoded, Field
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.loader import loaders as loader_module
from disttrain.data.loader.batches import COUNT, ID, KEY, WEIGHT, Batch, BatchMaker
from disttrain.data.loader.loaders import EvaluationLoader, LoaderConfig, TrainLoader
from disttrain.data.loader.transforms import HooksConfig
from disttrain.data.order.mixture import Mixture, Portion
from disttrain.data.order.sample_order import Order, OrderConfig
from disttrain.data.reader.sample_reader import Reader
from disttrain.errors import ConfigError, DataError, ShardError
from disttrain.parallel.config import BatchPlan
from tests.support.hooks import AddNoise
from tests.support.shards import write_numbered, write_shard

quick = settings(derandomize=True, deadline=None, max_examples=40)
SIZES = (7, 30, 1, 25, 10)
THREADS = (0, 1, 3)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """73 samples whose ``x`` holds their number."""
    index = ShardIndex.open(write_numbered(tmp_path_factory.mktemp("shards"), SIZES))
    return Reader(index, {"x": Field("x.npy"), "label": Field("cls"), "raw": Field("cls", decoder="bytes")})


def train_loader(
    reader: Reader, plan: BatchPlan, *, rank: int = 0, threads: int = 0, start: tuple[int, int] = (0, 0), seed: int = 0
) -> TrainLoader:
    order = Order(reader.index.sizes, OrderConfig(plan.global_batch_size, seed=seed, window=9))
    return TrainLoader(reader, order, plan, rank=rank, config=LoaderConfig(threads=threads), position=lambda: start)


def check_batch(batch: Batch, reader: Reader) -> None:
    """What a batch holds is what its ids say."""
    ids = batch[ID].tolist()
    assert batch["x"].tolist() == [[float(i)] * 3 for i in ids], f"contents of other samples than {ids}"
    assert batch["label"].tolist() == [i % 4 for i in ids], f"labels of other samples than {ids}"
    assert batch["raw"] == [str(i % 4).encode() for i in ids], f"bytes of other samples than {ids}"
    assert batch[KEY] == [reader.index.key(i) for i in ids], f"keys of other samples than {ids}"
    assert (batch[ID].dtype, batch[WEIGHT].dtype, type(batch[COUNT])) == (torch.int64, torch.float32, int)
    expected = [1.0] * batch[COUNT] + [0.0] * (len(ids) - batch[COUNT])
    assert batch[WEIGHT].tolist() == expected, f"weights {batch[WEIGHT].tolist()} of {batch[COUNT]} real samples"


def ids_of(loader: TrainLoader | EvaluationLoader, reader: Reader) -> list[list[int]]:
    found = []
    for batch in loader:
        check_batch(batch, reader)
        found.append(batch[ID].tolist())
    return found


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    ranks, accumulation, micro = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return BatchPlan(ranks * accumulation * micro, micro, ranks)


@quick
@given(plans(), st.sampled_from(THREADS), st.sampled_from([1, 4, 1024]), st.data())
def test_training_batches_are_what_the_order_says(
    reader: Reader, plan: BatchPlan, threads: int, samples_a_read: int, data: st.DataObject
) -> None:
    steps = sum(SIZES) // plan.global_batch_size
    epoch, step, seed = data.draw(st.integers(0, 3)), data.draw(st.integers(0, steps - 1)), data.draw(st.integers(0, 9))
    order = Order(reader.index.sizes, OrderConfig(plan.global_batch_size, seed=seed, window=9))
    expected = order.sample_ids(epoch, step, steps - step).reshape(
        steps - step, plan.num_ranks, plan.accumulation, plan.micro_batch_size
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "_SAMPLES_A_READ", samples_a_read)
        for rank in range(plan.num_ranks):
            loader = train_loader(reader, plan, rank=rank, threads=threads, start=(epoch, step), seed=seed)
            assert len(loader) == steps * plan.accumulation, "the length is not that of a whole epoch"
            ours = ids_of(loader, reader)
            theirs = expected[:, rank].reshape(-1, plan.micro_batch_size).tolist()
            assert ours == theirs, f"rank {rank} of {plan} from step {step} of epoch {epoch} reads other samples"


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("samples_a_read", [1, 4, 5, 12, 24, 30, 1024])
def test_an_epoch_resumed_in_the_middle_is_the_tail_of_a_whole_one(
    reader: Reader, threads: int, samples_a_read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_SAMPLES_A_READ", samples_a_read)
    plan = BatchPlan(24, 2, 2)  # six micro batches a step: in one read, or in several
    whole = ids_of(train_loader(reader, plan, rank=1, threads=threads, start=(2, 0)), reader)
    assert len(whole) == 3 * 6
    for step in (1, 2):
        tail = ids_of(train_loader(reader, plan, rank=1, threads=threads, start=(2, step)), reader)
        assert tail == whole[step * 6 :], f"resumed at step {step} with {threads} threads"
    assert ids_of(train_loader(reader, plan, threads=threads, start=(2, 3)), reader) == [], "an epoch that has ended"


def test_a_loader_may_be_walked_again(reader: Reader) -> None:
    loader = train_loader(reader, BatchPlan(8, 4, 1), threads=2)
    assert ids_of(loader, reader) == ids_of(loader, reader)


def test_the_position_is_asked_for_with_the_first_batch(reader: Reader) -> None:
    asked = []

    def position() -> tuple[int, int]:
        asked.append(True)
        return 1, 2

    order = Order(reader.index.sizes, OrderConfig(8))
    loader = TrainLoader(reader, order, BatchPlan(8, 8), config=LoaderConfig(threads=1), position=position)
    batches = iter(loader)
    assert not asked, "the position was asked for before the first batch"
    first = next(batches)
    assert len(asked) == 1
    assert first[ID].tolist() == order.sample_ids(1, 2)[0].tolist(), "the first batch is not at the position given"
    assert len(list(batches)) == order.steps_per_epoch - 3
    assert len(asked) == 1, "the position was asked for again inside an epoch"


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (8, 1), (8, 2), (10, 3), (32, 4), (100, 2)])
def test_an_evaluation_counts_every_sample_once(
    reader: Reader, threads: int, micro: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_SAMPLES_A_READ", 16)
    real: list[int] = []
    weight = 0.0
    for rank in range(ranks):
        config = LoaderConfig(threads=threads)
        loader = EvaluationLoader(reader, micro_batch_size=micro, num_ranks=ranks, rank=rank, config=config)
        batches = list(loader)
        assert len(batches) == len(loader) == math.ceil(math.ceil(sum(SIZES) / micro) / ranks)
        for batch in batches:
            check_batch(batch, reader)
            assert len(batch[ID]) == micro, "a micro batch of another size"
            real.extend(batch[ID][: batch[COUNT]].tolist())
            assert not batch[ID][batch[COUNT] :].any(), "padding is not sample 0"
            weight += float(batch[WEIGHT].sum())
    assert real == list(range(sum(SIZES))), "not every sample once, in order"
    assert weight == sum(SIZES)


@pytest.mark.parametrize("threads", THREADS)
def test_an_error_of_a_thread_reaches_the_consumer(tmp_path: Path, threads: int) -> None:
    samples = [{"__key__": f"k{i}", "cls": b"1" if i != 37 else b"one"} for i in range(60)]
    reader = Reader(ShardIndex.open(write_shard(tmp_path / "a.tar", samples)), {"label": Field("cls")})
    loader = EvaluationLoader(reader, micro_batch_size=1, config=LoaderConfig(threads=threads))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "_SAMPLES_A_READ", 4)
        seen = []
        with pytest.raises(DataError, match="'k37'") as caught:
            seen.extend(batch[ID].item() for batch in loader)
    assert "hint:" in str(caught.value)
    assert reading_threads() == [], "reading threads outlive the error"


def test_a_shard_that_is_torn_between_two_reads_ends_the_epoch(tmp_path: Path) -> None:
    """Without threads that read ahead: a shard cut off during a read ends the process (test_mmap.py)."""
    paths = write_numbered(tmp_path, [40])
    reader = Reader(ShardIndex.open(paths), {"x": Field("x.npy")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "_SAMPLES_A_READ", 1)
        batches = iter(EvaluationLoader(reader, micro_batch_size=1, config=LoaderConfig(threads=0)))
        assert next(batches)[ID].tolist() == [0]
        os.truncate(paths[0], 1024)
        with pytest.raises(ShardError, match="ends at byte"):
            list(batches)


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("disttrain-reader")]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("way", ["close", "drop", "end"])
def test_stopping_leaves_no_thread_behind(
    reader: Reader, threads: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_SAMPLES_A_READ", 1)
    batches: Any = iter(train_loader(reader, BatchPlan(1, 1), threads=threads))
    next(batches)
    assert reading_threads(), "nothing is read ahead: the test shows nothing"
    if way == "close":
        batches.close()
    elif way == "end":
        list(batches)
    del batches
    assert reading_threads() == []


def test_without_threads_the_consumer_reads(reader: Reader) -> None:
    before = threading.active_count()
    for _ in train_loader(reader, BatchPlan(8, 4, 1), threads=0):
        assert threading.active_count() == before


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_read_ahead_is_bounded(tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of a quarter MiB and a bound of 1 MiB: four are read ahead, and one is handed over."""
    monkeypatch.setattr(loader_module, "_SAMPLES_A_READ", 1)
    content = bytes(2**18)
    path = write_shard(tmp_path / "a.tar", [{"__key__": f"k{i}", "bin": content} for i in range(12)])
    read: list[int] = []

    class Counting(Reader):
        def read(self, ids: NDArray[np.int64]) -> dict[str, Decoded]:
            read.extend(ids.tolist())
            return super().read(ids)

    counting = Counting(ShardIndex.open(path), {"bin": Field("bin")})
    config = LoaderConfig(threads=threads, prefetch_mib=1)
    batches = iter(EvaluationLoader(counting, micro_batch_size=1, config=config))
    for taken in range(1, 6):
        next(batches)
        assert len(read) <= taken + 4, f"{len(read)} samples are read when {taken} are taken"
    assert sum(1 for _ in batches) == 7


def test_waiting_is_counted(reader: Reader) -> None:
    for threads in THREADS:
        loader = train_loader(reader, BatchPlan(8, 4, 1), threads=threads)
        assert loader.wait_seconds == 0
        list(loader)
        assert loader.wait_seconds > 0, f"{threads} threads"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"threads": -1}, "loader.threads is -1"), ({"prefetch_mib": 0}, "loader.prefetch_mib is 0")],
)
def test_settings_that_cannot_work_are_refused(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LoaderConfig(**arguments)


def drawn(
    reader: Reader, order: Order | Mixture, ranks: int, threads: int, epoch: int = 0
) -> list[tuple[int, int, float]]:
    """(step, sample, what it drew) of every sample of an epoch, over all ranks, sorted."""
    maker, plan = BatchMaker(reader, HooksConfig(AddNoise())), BatchPlan(8, 2, ranks)
    found = []
    for rank in range(ranks):
        config = LoaderConfig(threads=threads)
        loader = TrainLoader(maker, order, plan, rank=rank, config=config, position=lambda: (epoch, 0))
        for number, batch in enumerate(loader):
            step = number // plan.accumulation
            found += [(step, *one) for one in zip(batch[ID].tolist(), batch["noise"].tolist(), strict=True)]
    return sorted(found)


def test_augmentation_does_not_know_the_ranks_nor_the_threads(reader: Reader) -> None:
    order = Order(reader.index.sizes, OrderConfig(8, window=9))
    alone = drawn(reader, order, 1, 0)
    assert len({noise for _, _, noise in alone}) == len(alone) == 72
    assert drawn(reader, order, 2, 3) == alone
    assert drawn(reader, order, 4, 1) == alone
    again = {sample: noise for _, sample, noise in drawn(reader, order, 2, 1, epoch=1)}
    assert not set(again.values()) & {noise for _, _, noise in alone}, "another epoch draws the same numbers"


def test_a_source_that_is_repeated_is_augmented_anew_each_time(reader: Reader) -> None:
    portions = [Portion("small", SIZES[:1], 1.0), Portion("large", SIZES[1:], 1.0)]
    mixture = Mixture(portions, OrderConfig(8, window=9))
    alone = drawn(reader, mixture, 1, 0)
    small = [(sample, noise) for _, sample, noise in alone if sample < SIZES[0]]
    assert len(small) == 36, "half of the samples come from 7"
    assert len(set(small)) == len(small), "a sample that comes again draws the same numbers again"
    assert drawn(reader, mixture, 4, 2) == alone
