"""The dry save before the first step finds what could not be saved or resumed, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EMAWeightAveraging,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn

from disttrain import Checkpointing, DisttrainError, ShardedDataModule, Trainer
from disttrain.checkpoint.format.reader import committed, read_meta
from tests.support.features import write_features


class Net(pl.LightningModule):
    """Two layers, by hand; counts its steps."""

    def __init__(self, extra: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return nn.functional.cross_entropy(self.head(self.backbone(batch["features"]).tanh()), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Adds(Net):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["more"] = torch.zeros(1)


class Replaces(Net):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: value.clone() for name, value in checkpoint["state_dict"].items()}


class Removes(Net):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in [name for name in checkpoint["state_dict"] if name.startswith("backbone")]:
            del checkpoint["state_dict"][name]


class FillsItsBackbone(Removes):
    """A frozen backbone from elsewhere, which checkpoints need not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.backbone.requires_grad_(False)
        for parameter in self.backbone.parameters():
            parameter.data.fill_(0.1)


class Versioned(nn.Linear):
    """Has an extra state."""

    def get_extra_state(self) -> Any:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 1}


class FillsMore(FillsItsBackbone):
    """Its backbone has an extra state, which the hook takes out by its prefix, too."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Versioned(6, 8).requires_grad_(False)
        for parameter in self.backbone.parameters():
            parameter.data.fill_(0.1)


class SparseBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(2).to_sparse())


class KeepsThing(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"recent": [1, self]}


class KeepsThingFromTheStart(Callback):
    """Has nothing to save before training starts, and fails when it is asked."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.thing = [self]

    def state_dict(self) -> dict[str, Any]:
        return {"thing": self.thing}


class Failing(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.steps == 2:
            raise ZeroDivisionError("the user's own")
        return super().training_step(batch, batch_idx)


class SavesOnException(Callback):
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "last-words")


@pytest.fixture
def fit(tmp_path: Path) -> Iterator[Callable[..., Net]]:
    shard = write_features(tmp_path, "a", 40)

    def run(make: Callable[[], Net], *callbacks: Callback, steps: int = 2, resume: str = "auto") -> Net:
        trainer = Trainer(
            run_dir=str(tmp_path / "run"),
            max_steps=steps,
            progress_bar=False,
            callbacks=[Checkpointing(every_steps=2, save="sync", keep_last=9), *callbacks],
        )
        torch.manual_seed(0)
        module, start = make(), trainer.find_start(resume)
        fields: dict[str, Any] = {"features": "features.npy", "label": "cls"}
        data = ShardedDataModule(train=[shard], fields=fields, global_batch_size=8, micro_batch_size=4)
        trainer.fit(module, datamodule=data, ckpt_path=str(start.checkpoint) if start.checkpoint else None)
        return module

    yield run
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*\\.fit\\(ckpt_path=")  # Lightning, of OnExceptionCheckpoint
@pytest.mark.parametrize(
    ("make", "callbacks", "words"),
    [
        (lambda: Net(object()), [], ["hyper_parameters.extra (of type object)", "ignore=[...]"]),
        (Net, [KeepsThing()], ["callbacks.KeepsThing.recent.1 (of type", "state_dict()"]),
        (Net, [KeepsThingFromTheStart()], ["callbacks.KeepsThingFromTheStart.thing.0 (of type"]),
        (
            lambda: Net({frozenset({1}): 2}),
            [],
            ["hyper_parameters.extra.frozenset({1}) (of type frozenset, used as"],
        ),
        (SparseBuffer, [], ["model.graph, a sparse_coo tensor", "persistent=False"]),
        (Adds, [], ["on_save_checkpoint() of Adds adds more"]),
        (Replaces, [], ["on_save_checkpoint() of Replaces replaces backbone.weight"]),
        (Removes, [], ["removes backbone.weight and 1 more", "strict_loading = False"]),
        (Net, [StochasticWeightAveraging(0.1)], ["StochasticWeightAveraging", "disttrain.EMA"]),
        (Net, [EMAWeightAveraging()], ["EMAWeightAveraging", "disttrain.EMA"]),
        (Net, [ModelPruning("l1_unstructured")], ["ModelPruning", "weight_orig", "after training"]),
        (Net, [OnExceptionCheckpoint("x")], ["OnExceptionCheckpoint", "resumes from its last checkpoint"]),
    ],
)
def test_what_cannot_be_saved_or_resumed_is_found_before_the_first_step(
    fit: Callable[..., Net], tmp_path: Path, make: Callable[[], Net], callbacks: list[Callback], words: list[str]
) -> None:
    made: list[Net] = []

    def make_and_keep() -> Net:
        made.append(make())
        return made[0]

    with pytest.raises(DisttrainError) as caught:
        fit(make_and_keep, *callbacks)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not made or made[0].steps == 0  # some callbacks are refused with the trainer
    assert not committed(tmp_path / "run" / "checkpoints")[0]


def test_looking_changes_nothing(fit: Callable[..., Net], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same weights, and the same moments of Adam, as without the dry save; its counter stays at the steps done."""
    looked = fit(Net, steps=4)
    meta = read_meta(committed(tmp_path / "run" / "checkpoints")[0][-1].path)
    assert meta["trainer"]["hyper_parameters"] == {"extra": None}
    monkeypatch.setattr("disttrain.callbacks.rehearsal.strategy_of", lambda trainer: Blind())
    blind = fit(Net, steps=4, resume="never")
    assert all(torch.equal(value, blind.state_dict()[name]) for name, value in looked.state_dict().items())


class Blind:
    def rehearse(self) -> dict[str, Any]:
        return {}

    def examine(self, checkpoint: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("make", [FillsItsBackbone, FillsMore])
def test_weights_that_a_module_fills_itself_need_not_be_saved(
    fit: Callable[..., Net], tmp_path: Path, make: type[Net]
) -> None:
    whole = fit(make, steps=6)
    fit(make, steps=4, resume="never")
    resumed = fit(make, steps=6, resume=str(tmp_path / "run"))
    assert resumed.steps == 4, "two micro batches of two steps"
    assert all(torch.equal(value, dict(resumed.named_parameters())[name]) for name, value in whole.named_parameters())
    assert float(resumed.backbone.weight.min()) == float(resumed.backbone.weight.max()), "as it was filled"


class HeadFirst(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.head.parameters(), lr=0.01)


@pytest.mark.filterwarnings(
    "ignore:.*(as in the checkpoint|built without it|began without it|params in the optimizer|already)"
)
def test_a_backbone_that_was_thawed_resumes_to_the_bit(fit: Callable[..., Net], tmp_path: Path) -> None:
    """Five steps an epoch; thawed at step 5, resumed at step 8, in mid-epoch."""

    def thaws() -> Callback:
        return BackboneFinetuning(unfreeze_backbone_at_epoch=1)

    whole = fit(HeadFirst, thaws(), steps=12)
    fit(HeadFirst, thaws(), steps=8, resume="never")
    resumed = fit(HeadFirst, thaws(), steps=12, resume=str(tmp_path / "run"))
    assert resumed.steps == 8, "two micro batches of four steps"
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    torch.manual_seed(0)
    assert not torch.equal(HeadFirst().backbone.weight, resumed.backbone.weight), "the backbone was never trained"


class Sees(Net):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = {name: value.clone() for name, value in checkpoint["state_dict"].items()}


class Changes(Net):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["head.weight"] = torch.zeros(3, 8)


def test_a_module_may_look_at_the_weights_that_are_loaded_and_not_exchange_them(
    fit: Callable[..., Net], tmp_path: Path
) -> None:
    first = fit(Net)
    seen: Any = fit(Sees, steps=4, resume=str(tmp_path / "run"))
    assert all(torch.equal(value, seen.seen[name]) for name, value in first.state_dict().items())
    with pytest.raises(DisttrainError, match=r"on_load_checkpoint\(\) of Changes changes head.weight"):
        fit(Changes, steps=6, resume=str(tmp_path / "run"))


def test_what_is_saved_on_an_exception_does_not_take_its_place(
    fit: Callable[..., Net], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        fit(Failing, SavesOnException(), steps=4)
    assert "last-words is not saved: the run has failed in the midst of a step" in capsys.readouterr().err
