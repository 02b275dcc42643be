"""Batches on their way to a device: nothing changes but the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain import ShardedDataModule
from disttrain.data.loader.batches import BAD, KEY
from disttrain.data.reader.bad_sample_policy import BadSample
from disttrain.system.device import DeviceCopier
from tests.support.features import write_features


def batch() -> dict[str, Any]:
    bad = BadSample("a.tar", "k", "label", 512, ": not a class number", "repair it")
    return {"x": torch.arange(6.0).reshape(2, 3), KEY: ["a", "b"], "nested": {"y": [torch.ones(1)]}, BAD: [bad]}


def test_a_batch_on_the_cpu_is_as_it_was() -> None:
    moved = DeviceCopier(torch.device("cpu"))(batch())
    assert torch.equal(moved["x"], batch()["x"])
    assert (moved[KEY], moved[BAD]) == (batch()[KEY], batch()[BAD])


@pytest.mark.gpu
def test_a_batch_on_a_device_is_whole_when_the_training_stream_uses_it() -> None:
    device = torch.device("cuda", 0)
    copier = DeviceCopier(device)
    host = torch.arange(4_000_000, dtype=torch.float32).pin_memory()
    sums = []
    for number in range(20):
        torch.cuda._sleep(2_000_000)  # the training stream is busy while the next copy begins
        moved = copier({"x": host + number, KEY: ["a"]})
        assert moved["x"].device == device
        sums.append(moved["x"].double().sum())
        del moved  # its memory may be used again at once
    expected = [(host.double() + number).sum().item() for number in range(20)]
    assert [value.item() for value in sums] == expected


@pytest.mark.gpu
def test_loaders_give_pinned_batches(tmp_path: Path) -> None:
    shard = write_features(tmp_path, "train", 24)
    data = ShardedDataModule(train=shard, val=shard, global_batch_size=8, micro_batch_size=4)
    data.setup("fit")
    torch.cuda.init()  # as a training on a device has by then
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for found in loader:
            assert found["features.npy"].is_pinned()
