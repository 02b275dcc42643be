"""Pinned memory, with a stand-in for it: no block is given away while a copy to the device still reads it."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from disttrain.checkpoint.saving.saver import Saver
from disttrain.data.decode.fields import Field
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.loader.batches import BatchMaker
from disttrain.data.loader.loaders import EvaluationLoader, LoaderConfig
from disttrain.data.loader.transforms import HooksConfig
from disttrain.data.reader.sample_reader import Reader
from disttrain.system import device as device_module
from disttrain.system.device import DeviceCopier
from tests.support.pinned import Pinned
from tests.support.shards import npy, write_shard

FIELDS = {
    "vector": Field("x.npy"),
    "scalar": Field("s.npy"),
    "ragged": Field("r.npy", pad=0.0),
    "raw": Field("f32", decoder="tensor", dtype="float32", shape=(2, 2)),
    "label": Field("cls"),
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """24 samples with a field of each kind that is gathered into pinned memory, and others."""
    samples = [
        {
            "__key__": f"{number:03d}",
            "x.npy": npy(np.full((2, 3), number, np.float64)),
            "s.npy": npy(np.float16(number)),
            "r.npy": npy(np.full(1 + number % 3, number, np.int32)),
            "f32": np.full((2, 2), number, "<f4").tobytes(),
            "cls": str(number).encode(),
        }
        for number in range(24)
    ]
    path = write_shard(tmp_path_factory.mktemp("pinned") / "a.tar", samples)
    return Reader(ShardIndex.open([path]), FIELDS)


@pytest.mark.parametrize(
    ("config", "hooks"),
    [
        (LoaderConfig(threads=0), HooksConfig()),
        (LoaderConfig(threads=2), HooksConfig()),
        (LoaderConfig(threads=2), HooksConfig(transform=lambda sample, random: sample)),
    ],
    ids=["no thread", "threads", "transform"],
)
def test_every_tensor_of_every_micro_batch_is_one_whose_copies_the_allocator_knows(
    config: LoaderConfig, hooks: HooksConfig, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = Pinned(monkeypatch, device=3)
    batches = list(EvaluationLoader(BatchMaker(reader, hooks), micro_batch_size=4, config=config))
    assert len(batches) == 6
    for number, batch in enumerate(batches):
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        assert {*FIELDS, "ragged_lengths", "__id__", "__weight__"} <= set(tensors)
        for name, tensor in tensors.items():
            assert pinned.knows(tensor), f"{name} of micro batch {number}"
        ids = torch.arange(4 * number, 4 * number + 4)
        assert torch.equal(batch["vector"], ids.double()[:, None, None].expand(4, 2, 3))
        assert torch.equal(batch["scalar"], ids.half())
        assert torch.equal(batch["raw"], ids.float()[:, None, None].expand(4, 2, 2))
        assert torch.equal(batch["label"], ids)
    assert set(pinned.devices.values()) == ({3} if config.threads else set()), "a reading thread works on device 0"


class Event:
    """A moment of a stream that has come when the test says so."""

    def __init__(self) -> None:
        self.has_come = False

    def query(self) -> bool:
        return self.has_come


class Stream:
    """A stream whose copies end when the test says so."""

    events: list[Event]

    def __init__(self, device: Any) -> None:
        self.events = []

    def record_event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]

    def wait_event(self, event: Event) -> None:
        pass


def test_a_batch_outlives_its_copy_whatever_a_collate_made_it_of(monkeypatch: pytest.MonkeyPatch) -> None:
    current = Stream(None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(device_module, "move_data_to_device", lambda batch, device: {})
    copier = DeviceCopier(torch.device("cuda", 0))
    stream: Any = copier._stream
    blocks: list[weakref.ref[Any]] = []

    def copy() -> None:
        """What a collate of the user's may give: views of NumPy's arrays over memory, nested, and then taken apart."""
        one, two = np.zeros(8, np.float32), np.zeros(8, np.float32)
        blocks.extend([weakref.ref(one), weakref.ref(two)])
        batch = {"x": torch.from_numpy(one).view(2, 4)[1], "pair": (torch.from_numpy(two), ["a"])}
        copier(batch)
        batch.clear()

    def alive() -> list[bool]:
        gc.collect()
        return [block() is not None for block in blocks]

    copy()
    copy()
    assert alive() == [True] * 4, "memory was given away that a copy still reads"
    stream.events[0].has_come = True
    copy()
    assert alive() == [False] * 2 + [True] * 4
    for event in stream.events:
        event.has_come = True
    copy()
    assert alive() == [False] * 6 + [True] * 2, "more is held than the copies under way"


class Graph:
    """A batch that knows how to move itself."""

    def to(self, device: Any, **options: Any) -> Graph:
        return self


@pytest.mark.parametrize(
    ("batch", "aside"),
    [
        ({"x": torch.ones(2), "__key__": ["a"], "__count__": 2, "pair": (torch.ones(1), [1, 2])}, True),
        ({"x": torch.ones(2), "graph": Graph()}, False),
        ({"x": torch.ones(2), "graphs": [Graph()]}, False),
        ((torch.ones(2), {"inner": (Graph(),)}), False),
        (Graph(), False),
    ],
)
def test_what_hides_its_tensors_is_copied_on_the_stream_that_trains(
    batch: Any, aside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of tensors that are copied aside would be used again while the training still reads them."""
    current, used = Stream(None), []

    def on(stream: Stream) -> Any:
        used.append(stream)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(device_module, "move_data_to_device", lambda batch, device: batch)
    copier = DeviceCopier(torch.device("cuda", 0))
    assert copier(batch) is batch
    assert used == [copier._stream if aside else current]


def test_the_thread_that_saves_works_on_the_device_of_the_one_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, seen = Pinned(monkeypatch, device=5), []

    class Job:
        final, about = Path("x"), type("About", (), {"global_step": 1})

        def run(self, group: Any) -> None:
            seen.append(threading.current_thread().name)

    saver = Saver()
    saver.begin(Job(), background=True)  # type: ignore[arg-type]
    outcome = saver.wait()
    assert outcome is not None
    assert outcome.error is None
    assert (seen, pinned.devices) == (["disttrain-save"], {"disttrain-save": 5})
