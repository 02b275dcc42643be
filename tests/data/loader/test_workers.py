"""Worker processes: the same batches in the same order, errors that travel, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from disttrain.data.decode.fields import Field
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.loader.batches import Batch, BatchMaker
from disttrain.data.loader.loaders import EvaluationLoader, LoaderConfig, TrainLoader
from disttrain.data.loader.transforms import HooksConfig
from disttrain.data.loader.workers import WorkerPool
from disttrain.data.order.sample_order import Order, OrderConfig
from disttrain.data.reader.sample_reader import Reader
from disttrain.errors import ConfigError, DataError
from disttrain.parallel.config import BatchPlan
from tests.support.hooks import AddNoise, die, fail, kinds, refuse_every_fifth, with_process, without_dimensions
from tests.support.shards import write_numbered


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """Two processes for all tests that kill none."""
    pool = WorkerPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """80 samples whose ``x`` holds their number."""
    index = ShardIndex.open(write_numbered(tmp_path_factory.mktemp("shards"), [25, 15, 40]))
    return Reader(index, {"x": Field("x.npy"), "label": Field("cls"), "raw": Field("cls", decoder="bytes")})


def differing(ours: Any, theirs: Any, place: str = "batch") -> str:
    """Where two batches differ, to the last bit, or nothing."""
    if isinstance(theirs, dict):
        if not isinstance(ours, dict) or list(ours) != list(theirs):
            return f"{place}: {ours!r} has other names"
        return "".join(differing(ours[name], value, f"{place}[{name!r}]") for name, value in theirs.items())
    if isinstance(theirs, torch.Tensor):
        same = isinstance(ours, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        return "" if same else f"{place}: {ours!r} is not {theirs!r}"
    return "" if ours == theirs else f"{place}: {ours!r} is not {theirs!r}"


def check_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert not (found := differing(one, other)), f"batch {number}: {found}"


@pytest.mark.parametrize(
    "hooks",
    [
        HooksConfig(),
        HooksConfig(AddNoise(), weight="noise"),
        HooksConfig(kinds),
        HooksConfig(collate=without_dimensions),
    ],
)
def test_processes_and_threads_give_the_same_bits_in_the_same_order(
    reader: Reader, pool: WorkerPool, hooks: HooksConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disttrain.data.loader.loaders._SAMPLES_A_READ", 8)
    maker, plan = BatchMaker(reader, hooks), BatchPlan(8, 4, 1)
    order = Order(reader.index.sizes, OrderConfig(8, seed=3, window=16))

    def batches(config: LoaderConfig, pool: WorkerPool | None) -> list[Batch]:
        return list(TrainLoader(maker, order, plan, config=config, position=lambda: (1, 2), pool=pool))

    alone = batches(LoaderConfig(threads=0), None)
    assert len(alone) == 2 * (80 // 8 - 2)
    check_equal(batches(LoaderConfig(threads=3), None), alone)
    check_equal(batches(LoaderConfig(workers=2), pool), alone)


def test_batches_larger_than_the_shared_memory_come_through(pool: WorkerPool, tmp_path: Path) -> None:
    from tests.support.shards import npy, write_shard

    array = np.random.default_rng(0).integers(0, 255, 400_000).astype(np.uint8)
    index = ShardIndex.open(
        write_shard(tmp_path / "a.tar", [{"__key__": str(n), "x.npy": npy(array)} for n in "abcdefgh"])
    )
    maker = BatchMaker(Reader(index, {"x": Field("x.npy")}))
    for size in (1, 8, 2):  # before and after it has grown
        (batch,) = pool.make(maker, np.arange(size)[None], None, None)
        assert batch["x"].shape == (size, 400_000)
        assert torch.equal(batch["x"][-1], torch.from_numpy(array))


def test_several_processes_work_for_several_splits(reader: Reader, pool: WorkerPool) -> None:
    makers = [BatchMaker(reader, HooksConfig(with_process)) for _ in range(2)]
    found = set()
    for maker in makers:
        loader = EvaluationLoader(maker, micro_batch_size=1, config=LoaderConfig(workers=2), pool=pool)
        found |= {int(batch["process"][0]) for batch in loader}
    assert os.getpid() not in found, "batches were made in the trainer's own process"
    assert 1 <= len(found) <= 2, f"{len(found)} processes"


def test_errors_travel(reader: Reader, pool: WorkerPool) -> None:
    ids = np.arange(5)[None]
    with pytest.raises(DataError, match="sample 'train-00000' was rejected") as caught:
        pool.make(BatchMaker(reader, HooksConfig(refuse_every_fifth)), ids, None, None)
    assert "on_bad_sample" in caught.value.hint
    with pytest.raises(ZeroDivisionError, match="a bug of one's own") as bug:
        pool.make(BatchMaker(reader, HooksConfig(fail)), ids, None, None)
    assert any("in a worker process" in note and "hooks.py" in note for note in bug.value.__notes__)
    (batch,) = pool.make(BatchMaker(reader), ids, None, None)
    assert batch["x"][:, 0].tolist() == [0, 1, 2, 3, 4], "a process that raised works no more"


def test_a_hook_that_cannot_be_sent_is_named(reader: Reader, pool: WorkerPool) -> None:
    maker = BatchMaker(reader, HooksConfig(lambda sample, random: sample))
    with pytest.raises(ConfigError, match=r"data\.hooks cannot be sent to worker processes"):
        pool.make(maker, np.arange(5)[None], None, None)


def test_a_process_that_dies_is_an_error_and_the_next_one_starts(reader: Reader) -> None:
    pool = WorkerPool(1)
    with pytest.raises(DataError, match="worker process ended with exit code -9"):
        pool.make(BatchMaker(reader, HooksConfig(die)), np.arange(2)[None], None, None)
    (batch,) = pool.make(BatchMaker(reader), np.arange(2)[None], None, None)
    assert batch["x"][:, 0].tolist() == [0, 1]
    pool.close()


def test_a_request_to_stop_is_the_trainers(reader: Reader) -> None:
    """SLURM sends it to every process of a step; the trainer still needs batches to the end of its step."""
    pool = WorkerPool(1)
    maker = BatchMaker(reader, HooksConfig(with_process))
    (before,) = pool.make(maker, np.arange(1)[None], None, None)
    for request in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(int(before["process"][0]), request)
    (after,) = pool.make(maker, np.arange(1)[None], None, None)
    assert int(after["process"][0]) == int(before["process"][0]), "the worker process was ended"
    pool.close()


def test_closing_ends_the_processes(reader: Reader) -> None:
    pool = WorkerPool(1)
    (batch,) = pool.make(BatchMaker(reader, HooksConfig(with_process)), np.arange(1)[None], None, None)
    process = psutil.Process(int(batch["process"][0]))
    pool.close()
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


_TRAINER = """
import os, sys
import numpy as np
from disttrain.data.loader.batches import BatchMaker
from disttrain.data.decode.fields import Field
from disttrain.data.loader.transforms import HooksConfig
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.reader.sample_reader import Reader
from disttrain.data.loader.workers import WorkerPool
from tests.support.hooks import with_process

if __name__ == "__main__":
    reader = Reader(ShardIndex.open(sys.argv[1]), {"x": Field("x.npy")})
    (batch,) = WorkerPool(1).make(BatchMaker(reader, HooksConfig(with_process)), np.arange(1)[None], None, None)
    print(int(batch["process"][0]), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_killed_trainer_leaves_no_process_behind(tmp_path: Path) -> None:
    (path,) = write_numbered(tmp_path, [3])
    script = tmp_path / "trainer.py"
    script.write_text(_TRAINER)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, str(script), path], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -9, done.stderr
    number = int(done.stdout)
    if psutil.pid_exists(number):
        psutil.Process(number).wait(timeout=20)  # raises where it does not end


_NO_GUARD = """
import sys
import numpy as np
import disttrain
from disttrain.data.loader.batches import BatchMaker
from disttrain.data.loader.transforms import HooksConfig
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.reader.sample_reader import Reader
from disttrain.data.loader.workers import WorkerPool

def double(sample, draw):
    return {"x": sample["x.npy"] * 2}

trainer = disttrain.Trainer(run_dir=sys.argv[2])
trainer.find_start("never")
print("begun", flush=True)
reader = Reader(ShardIndex.open(sys.argv[1]), {"x.npy": disttrain.Field("x.npy")})
try:
    WorkerPool(1).make(BatchMaker(reader, HooksConfig(double)), np.arange(1)[None], None, None)
except disttrain.DisttrainError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_named(tmp_path: Path) -> None:
    (path,) = write_numbered(tmp_path, [3])
    script = tmp_path / "unguarded.py"
    script.write_text(_NO_GUARD)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = [sys.executable, str(script), path, str(tmp_path / "run")]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "unguarded.py starts training when imported" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("begun") == 1, "the worker process has begun a run of its own"
