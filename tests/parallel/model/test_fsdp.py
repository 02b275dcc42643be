"""Which blocks FSDP shards by default, and what it cannot shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain import OptimizerConfig, ParallelConfig, Task, Trainer
from disttrain.errors import ConfigError
from disttrain.parallel.model.fsdp import shard_units
from tests.support.ranks import run_ranks
from tests.support.sameness import FEATURES, MicroBatches

WIDE = 710  # squared more than half a million


class Net(nn.Module):
    """Stages that are lists, or dictionaries, of blocks, as in a U-Net; a block may be small."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [
                nn.ModuleList([nn.Linear(FEATURES, WIDE), nn.Linear(WIDE, WIDE)]),
                nn.ModuleDict({"block": nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh()), "out": nn.Linear(WIDE, 3)}),
            ]
        )

    def forward(self, inputs: Tensor) -> Tensor:
        narrow, wide = self.stages[0]  # type: ignore[misc]
        hidden = wide(narrow(inputs).tanh())
        out: Tensor = self.stages[1]["out"](self.stages[1]["block"](hidden))  # type: ignore[index]
        return out


class NetTask(Task):
    """Trains it, with a number of its own where wanted."""

    def __init__(self, *, number: bool = False, units: bool = False) -> None:
        super().__init__(optimizer=OptimizerConfig(name="sgd", lr=0.1))
        torch.manual_seed(1)
        self.model = Net()
        self.scale = nn.Parameter(torch.ones(() if number else 1))
        if units:
            self.shard_units = lambda: [self.model.stages[0]]

    def forward(self, batch: Any) -> Tensor:
        return self.scale * self.model(batch["inputs"])

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch["labels"], reduction="none")


def train(folder: str) -> None:
    """Two steps; and what is refused."""
    for settings, words in (
        ({}, None),
        ({"number": True}, "parameter scale is a single number, shape"),
        ({"units": True}, "returns a ModuleList, which has no forward"),
    ):
        trainer = Trainer(
            run_dir=folder, max_steps=2, parallel=ParallelConfig(strategy="fsdp"), progress_bar=False, accelerator="cpu"
        )
        batches = MicroBatches(trainer.global_rank, 1, micro_batches=2, steps=2)
        if words is None:
            trainer.fit(NetTask(**settings), train_dataloaders=batches)
            assert trainer.global_step == 2
        else:
            with pytest.raises(ConfigError, match=words):
                trainer.fit(NetTask(**settings), train_dataloaders=batches)


def test_blocks_in_lists_of_lists_are_found() -> None:
    task = NetTask()
    stages: Any = task.model.stages
    assert shard_units(task) == [stages[0][1], stages[1]["block"]]


def test_they_train_and_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    run_ranks(2, train, str(tmp_path / "run"), folder=tmp_path / "logs").ok()
