"""What a resume says of settings that changed since the checkpoint, and a schedule that is too short for the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR, StepLR
from torch.utils.data import DataLoader

from disttrain import EMA, Checkpointing, ShardedDataModule, Trainer
from disttrain.errors import ConfigError
from disttrain.system.reading import read_run
from tests.support.features import write_features
from tests.support.tasks import PlainFeatures

Schedule = Callable[[Optimizer], Any]


class Scheduled(PlainFeatures):
    """Plain features with a learning rate and a schedule of its own."""

    def __init__(self, lr: float = 0.1, schedule: Schedule | None = None, momentum: float = 0) -> None:
        super().__init__()
        self.lr, self.schedule, self.momentum = lr, schedule, momentum

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


def fit(folder: Path, module: Scheduled, *, steps: int, resume: str = "auto", **settings: Any) -> Scheduled:
    callbacks = [Checkpointing(), *settings.pop("callbacks", ())]
    trainer = Trainer(run_dir=str(folder), max_steps=steps, progress_bar=False, callbacks=callbacks, **settings)
    start = trainer.find_start(resume)
    fields: dict[str, Any] = {"features": "features.npy", "label": "cls"}
    shard = write_features(folder.parent, "a", 40, classes=2)
    data = ShardedDataModule(train=[shard], fields=fields, global_batch_size=8, micro_batch_size=8)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(start.checkpoint) if start.checkpoint else None)
    finally:
        dist.destroy_process_group()
    return module


def one_cycle(steps: int) -> Schedule:
    return lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=steps)


def in_turn(turn: int) -> Schedule:
    return lambda optimizer: SequentialLR(optimizer, [LinearLR(optimizer), StepLR(optimizer, 9)], [turn])


CHANGED = "changed since the checkpoint, and so from here on"
KEPT = "kept as the checkpoint has it"
SAYS = "the configuration says"


@pytest.mark.parametrize(
    ("first", "second", "more", "said"),
    [
        ({}, {}, {}, None),
        ({}, {"lr": 0.01}, {}, f"{KEPT}: lr of group 0 of optimizer 0: 0.1 ({SAYS} 0.01);"),
        ({}, {}, {"precision": "bf16-true"}, f"{CHANGED}: trainer.precision was 32-true, is bf16-true"),
        ({}, {"momentum": 0.9}, {}, f"{KEPT}: momentum of group 0 of optimizer 0: 0 ({SAYS} 0.9);"),
        (
            {},
            {},
            {"gradient_clip_value": 0.5, "callbacks": [EMA(decay=0.9)]},
            f"{CHANGED}: trainer.gradient_clip_value was None, is 0.5",
        ),
        (
            {"schedule": lambda optimizer: StepLR(optimizer, 3, 0.5)},
            {"schedule": lambda optimizer: StepLR(optimizer, 3, 0.1)},
            {},
            f"{KEPT}: gamma of StepLR 0: 0.5 ({SAYS} 0.1)",
        ),
        (
            {"schedule": lambda optimizer: CosineAnnealingLR(optimizer, 2)},
            {"schedule": lambda optimizer: CosineAnnealingLR(optimizer, 4)},
            {},
            f"{KEPT}: T_max of CosineAnnealingLR 0: 2 ({SAYS} 4)",
        ),
        (
            {"schedule": in_turn(1)},
            {"schedule": in_turn(3)},
            {},
            f"{KEPT}: _milestones of SequentialLR 0: [1] ({SAYS} [3])",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:the checkpoint has no averaged weights")
def test_what_changed_is_said_once(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    first: dict[str, Any],
    second: dict[str, Any],
    more: dict[str, Any],
    said: str | None,
) -> None:
    run = tmp_path / "run"
    fit(run, Scheduled(**first), steps=2)
    capsys.readouterr()
    fit(run, Scheduled(**second), steps=4, resume=str(run), **more)
    text = capsys.readouterr().err
    assert text.count(CHANGED) + text.count(KEPT) == (said is not None), text
    if said is not None:
        assert said in text, text
        assert any(said in event["text"] for event in read_run(run)["events"])


@pytest.mark.parametrize(("cycle", "steps"), [(3, 4), (4, 6)])
def test_a_cycle_that_ends_before_the_run_is_refused_at_its_start(tmp_path: Path, cycle: int, steps: int) -> None:
    run, resume = tmp_path / "run", "auto"
    if cycle == 4:  # a complete run, which is extended; its cycle comes back with the checkpoint
        fit(run, Scheduled(schedule=one_cycle(4)), steps=4)
        resume = str(run)
    with pytest.raises(ConfigError, match=f"OneCycleLR ends after {cycle} steps .* this run would take {steps}"):
        fit(run, Scheduled(schedule=one_cycle(steps if cycle == 4 else cycle)), steps=steps, resume=resume)


@pytest.mark.filterwarnings("ignore:.*(many workers|no `val_dataloader`)")
def test_a_cycle_is_compared_with_the_epochs_of_a_custom_loader(tmp_path: Path) -> None:
    batches = DataLoader([{"features": torch.ones(6), "label": 0}] * 12, batch_size=4)  # type: ignore[arg-type]
    for cycle in (6, 5):
        trainer = Trainer(run_dir=tmp_path / str(cycle), max_epochs=2, progress_bar=False)
        with pytest.raises(ConfigError, match=r"after 5 .* would take 6") if cycle == 5 else nullcontext():
            trainer.fit(Scheduled(schedule=one_cycle(cycle)), batches)
        dist.destroy_process_group()
