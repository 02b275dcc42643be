"""What Lightning's users try first, and what they are told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, ModelCheckpoint, StochasticWeightAveraging, TQDMProgressBar
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from disttrain import Checkpointing, ClassificationTask, HooksConfig, ShardedDataModule, Trainer
from disttrain.callbacks.lightning_advice import refuse_callbacks
from disttrain.callbacks.progress import StepProgress
from disttrain.errors import CheckpointError, ConfigError
from disttrain.models import MLP
from tests.support import foreign
from tests.support.features import write_features
from tests.support.hooks import weigh_and_filter

NUMBERS = foreign.Numbers(16)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"devices": 2}, "'devices'\n.*torchrun"),
        ({"strategy": "ddp"}, "'strategy'\n.*ParallelConfig"),
        ({"accumulate_grad_batches": 4}, "micro_batch_size"),
        ({"gradient_clip_val": 0.5}, "gradient_clip_norm"),
        ({"val_check_interval": 0.5}, "validate_every_steps"),
        ({"default_root_dir": "x"}, "run_dir"),
        ({"max_epoch": 3}, "did you mean 'max_epochs'"),
        ({"callbacks": [ModelCheckpoint()]}, r"callback ModelCheckpoint.*\n.*disttrain.Checkpointing\(monitor"),
        ({"callbacks": [BatchSizeFinder()]}, "callback BatchSizeFinder.*\n.*micro_batch_size='auto'"),
        ({"callbacks": [StochasticWeightAveraging(0.1)]}, "callback StochasticWeightAveraging averages.*\n.*EMA"),
        ({"callbacks": [TQDMProgressBar()], "progress_bar": False}, "progress_bar is false.* TQDMProgressBar"),
    ],
)
def test_what_has_another_name_here_is_named(tmp_path: Path, argument: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Trainer(run_dir=str(tmp_path), **argument)


def test_a_given_progress_bar_is_the_one_shown(tmp_path: Path) -> None:
    trainer = Trainer(run_dir=str(tmp_path), callbacks=[TQDMProgressBar()])
    assert isinstance(trainer.progress_bar_callback, TQDMProgressBar)
    assert not any(isinstance(callback, StepProgress) for callback in trainer.callbacks)  # type: ignore[attr-defined]


class LearningRate(foreign.Plain):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"lr": 0.1})


def test_the_tuner_is_refused(tmp_path: Path) -> None:
    trainer = foreign.trainer_of(tmp_path, max_steps=2)
    with pytest.raises(ConfigError, match="callback LearningRateFinder is of lightning's Tuner"):
        Tuner(trainer).lr_find(LearningRate(), DataLoader(NUMBERS, batch_size=4))


def test_without_a_best_checkpoint_the_monitor_is_named(tmp_path: Path) -> None:
    trainer, module = foreign.trainer_of(tmp_path, max_steps=2), foreign.Evaluated()
    batches = DataLoader(NUMBERS, batch_size=4)
    trainer.fit(module, batches, batches)
    with pytest.raises(ConfigError, match=r"no checkpoint of this run is the best one\n.*Checkpointing a monitor"):
        trainer.test(module, batches, ckpt_path="best", verbose=False)
    for which in ("best", "last"):
        with pytest.raises(ConfigError, match=rf"ckpt_path is '{which}', which fit .*\n.*resume=.auto."):
            trainer.fit(module, batches, batches, ckpt_path=which)
    weights = foreign.whole(module)
    fresh, untrained = foreign.trainer_of(tmp_path), foreign.Evaluated()
    fresh.test(untrained, batches, "last", verbose=False)
    assert torch.equal(foreign.whole(untrained), weights)
    with pytest.raises(CheckpointError, match="holds no committed checkpoint"):
        foreign.trainer_of(tmp_path / "none").test(untrained, batches, ckpt_path="last", verbose=False)
    (folder,) = (tmp_path / "checkpoints").glob("step-*")
    with pytest.raises(CheckpointError, match=r"is a folder\n.*disttrain checkpoints export"):
        ClassificationTask.load_from_checkpoint(folder)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_by_hand_needs_whole_batches_and_its_own_clipping(tmp_path: Path, digits: Path) -> None:
    for settings, words in (
        ({}, r"each of which its training_step would make a step of\n.*micro_batch_size to 32,"),
        ({"gradient_clip_norm": 0.5}, r"gradient_clip_norm is 0.5, but ByHand optimizes by hand"),
    ):
        data = ShardedDataModule(train=str(digits / "train.json"), global_batch_size=32, micro_batch_size=8)
        trainer = foreign.trainer_of(tmp_path, max_steps=2, **settings)
        with pytest.raises(ConfigError, match=words):
            trainer.fit(foreign.ByHand(), datamodule=data)


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but")
def test_a_task_says_which_batches_it_takes(tmp_path: Path) -> None:
    task = ClassificationTask(MLP(foreign.FEATURES, out_features=foreign.CLASSES), num_classes=foreign.CLASSES)
    batches = DataLoader(NUMBERS, batch_size=4)
    for loop in ("fit", "test", "predict"):
        trainer = foreign.trainer_of(tmp_path, max_steps=2)
        with pytest.raises(ConfigError, match=r"ClassificationTask is a disttrain.Task, but its loader returns a list"):
            getattr(trainer, loop)(task, batches)


def test_a_module_that_does_not_weigh_its_losses_is_told_once(tmp_path: Path) -> None:
    shard = write_features(tmp_path, "train", 12)
    task = ClassificationTask(
        MLP(foreign.FEATURES, out_features=foreign.CLASSES), num_classes=foreign.CLASSES, input="features"
    )
    filtering: dict[str, Any] = {"hooks": HooksConfig(weigh_and_filter)}
    for module, settings, times in (
        (foreign.Plain(), filtering, 1),
        (task, filtering | {"on_bad_sample": "skip"}, 0),
    ):
        fields: Any = {"features": "features.npy", "label": "cls"}
        data = ShardedDataModule(train=shard, fields=fields, global_batch_size=4, micro_batch_size=4, **settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            foreign.trainer_of(tmp_path, max_steps=2, log_every_steps=1).fit(module, datamodule=data)
        told = [str(warning.message) for warning in caught if "__weight__" in str(warning.message)]
        assert len(told) == times
        assert all(text.startswith("Plain is not a disttrain.Task: multiply its losses by batch['__w") for text in told)


class Digits(pl.LightningModule):
    """Predicts in a form of its own, from batches in a form of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["image"].flatten(1).float(), batch["label"]

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.layer(batch[0])
        return logits.argmax(dim=1), {"logits": logits}


class Mean(Digits):
    """Predicts one value for a batch."""

    calls = 0

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        return self.layer(batch[0]).mean()


@pytest.mark.filterwarnings("ignore:You have overridden:UserWarning")  # Lightning says whose hook it calls
def test_predictions_are_of_samples_alone(tmp_path: Path, digits: Path) -> None:
    fields: Any = {"image": "image.npy", "label": "cls"}
    data = ShardedDataModule(test=str(digits / "test.json"), fields=fields, micro_batch_size=17)
    parts = foreign.trainer_of(tmp_path).predict(Digits(), data)
    assert parts is not None
    samples = len(data.reader("predict").index)
    assert samples % 17, "nothing was filled up"
    assert sum(len(part[0]) for part in parts) == samples  # type: ignore[arg-type]
    assert sum(len(part[1]["logits"]) for part in parts) == samples  # type: ignore[call-overload]
    assert Checkpointing().best_model_path == ""
    module = Mean()
    with pytest.raises(ConfigError, match=r"predict_step of Mean returned a tensor of shape \(\) for a micro batch"):
        foreign.trainer_of(tmp_path).predict(module, data)
    assert module.calls == 1, "it is refused at the end alone"


def test_a_step_hook_of_another_base_class_is_refused() -> None:
    class Steps(pl.Callback):
        def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            raise AssertionError

    with pytest.raises(ConfigError, match="Steps defines on_step_end, but is not a disttrain"):
        refuse_callbacks([Steps()])
