"""Tasks on their own: losses, weights, padding, metrics, standardization, and their errors."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain import ClassificationTask, RegressionTask, ShardedDataModule, Task
from disttrain.data.loader.batches import COUNT, ID, KEY, WEIGHT
from disttrain.data.loader.loaders import LoaderConfig
from disttrain.errors import ConfigError, DataError
from disttrain.models import MLP, ConvNet
from disttrain.tasks.metrics import ExplainedShare, WeightedMean
from tests.support.shards import npy, write_shard


def batch_of(count: int, size: int, **fields: Tensor) -> dict[str, Any]:
    """A batch with that many real samples."""
    return {
        **fields,
        KEY: [str(i) for i in range(size)],
        ID: torch.arange(size),
        WEIGHT: (torch.arange(size) < count).float(),
        COUNT: count,
    }


def classifier(**settings: Any) -> ClassificationTask:
    torch.manual_seed(0)
    return ClassificationTask(MLP(4, hidden=[5], out_features=3), num_classes=3, input="x", target="y", **settings)


def test_cross_entropy_and_its_smoothing_in_training_only() -> None:
    task = classifier(label_smoothing=0.1)
    batch = batch_of(6, 6, x=torch.randn(6, 4), y=torch.tensor([0, 1, 2, 0, 1, 2]))
    logits = task(batch)
    task.train()
    smooth = F.cross_entropy(logits, batch["y"], reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(task.losses(logits, batch), smooth)
    task.eval()
    torch.testing.assert_close(task.losses(logits, batch), F.cross_entropy(logits, batch["y"], reduction="none"))


def test_label_smoothing_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="label_smoothing is 1"):
        classifier(label_smoothing=1.0)


def test_padding_weighs_nothing_even_where_its_loss_is_not_a_number() -> None:
    task = classifier()
    x = torch.randn(4, 4)
    x[3] = torch.nan
    padded = batch_of(3, 4, x=x, y=torch.tensor([0, 1, 2, 0]))
    whole = batch_of(3, 3, x=x[:3], y=padded["y"][:3])
    total, weight = task._weighted(task(padded), padded)
    expected, three = task._weighted(task(whole), whole)
    torch.testing.assert_close(total, expected)
    assert weight == three == 3


class Given(Task):
    """A task whose losses and weights are those of the batch."""

    def losses(self, outputs: Any, batch: Any) -> Any:
        return batch["losses"]

    def loss_weights(self, batch: Any) -> Any:
        return batch.get("weights")


@pytest.mark.parametrize(
    ("losses", "what"),
    [
        (torch.tensor(0.5), r"Given.losses\(\) returned a single number, shape \(\), for a micro batch of 4 samples"),
        (torch.ones(20), r"a tensor of shape \(20,\), for .* shape \(4,\), or one per token, shape \(4, tokens\)"),
        ([0.5] * 4, "returned a list, for"),
    ],
)
def test_losses_that_are_not_one_a_sample_are_refused(losses: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as error:
        Given()._weighted(None, batch_of(4, 4, losses=losses))
    assert "reduction='none'" in str(error.value)


@pytest.mark.parametrize("shape", [(5,), (4, 5, 1), (3, 5), (4, 2)])
def test_weights_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    batch = batch_of(4, 4, losses=torch.ones(4, 5), weights=torch.ones(shape))
    with pytest.raises(ConfigError, match=r"loss_weights\(\) returned a tensor .*, but losses\(\) .* \(4, 5\)"):
        Given()._weighted(None, batch)


@pytest.mark.parametrize("shape", [(), (4,), (4, 1), (1, 5), (4, 5)])
def test_weights_a_sample_or_a_loss(shape: tuple[int, ...]) -> None:
    total, weight = Given()._weighted(
        None, batch_of(3, 4, losses=torch.full((4, 5), 2.0), weights=torch.full(shape, 0.5))
    )
    assert (float(total), float(weight)) == (15.0, 7.5)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_losses_are_summed_in_float32(kind: torch.dtype) -> None:
    """64 samples of 2,051 tokens: bfloat16 would make 131,072 of their weights, float16 infinity."""
    batch = batch_of(64, 64, losses=torch.ones(64, 2051, dtype=kind))
    total, weight = Given()._weighted(None, batch)
    assert float(total) == float(weight) == 131_264
    assert total.dtype == torch.float32


def test_predictions_leave_padding_out() -> None:
    task = classifier().eval()
    out = task.predict_step(batch_of(2, 4, x=torch.randn(4, 4), y=torch.zeros(4, dtype=torch.int64)), 0)
    assert out[KEY] == ["0", "1"]
    assert out["class"].shape == out["probability"].shape == (2,)


class NamedOutput(NamedTuple):
    logits: Any
    loss: Any


class DictOutput(OrderedDict[str, Any]):
    """As Hugging Face's ModelOutput, whose items are its attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("not of a ModelOutput")


@dataclass
class ModelOutput(DictOutput):
    logits: Any = None
    loss: Any = None

    def __post_init__(self) -> None:
        for field in fields(self):
            self[field.name] = getattr(self, field.name)


@dataclass(frozen=True)
class DataOutput:
    logits: Any
    loss: Any


@pytest.mark.parametrize("kind", [NamedOutput, DictOutput, ModelOutput, DataOutput])
def test_outputs_of_any_kind_keep_it_when_padding_is_cut(kind: Any) -> None:
    class Own(Task):
        def forward(self, batch: Any) -> Any:
            return kind(logits=batch["x"], loss=torch.tensor(0.5))

        def losses(self, outputs: Any, batch: Any) -> Tensor:
            return (outputs.logits[:, 0] - batch["x"][:, 0]).abs()

        def predict(self, outputs: Any, batch: Any) -> dict[str, Any]:
            assert (type(outputs), outputs.loss) == (kind, torch.tensor(0.5))
            return {"logits": outputs.logits}

    task, x = Own(), torch.randn(8, 4)
    parts = [task.predict_step(batch_of(count, 4, x=x[first : first + 4]), 0) for first, count in ((0, 4), (4, 1))]
    assert torch.equal(torch.cat([part["logits"] for part in parts]), x[:5])
    batch = batch_of(1, 4, x=x[4:])
    assert task._weighted(*task._real(task(batch), batch))[1] == 1


@pytest.mark.parametrize(
    ("fields", "what"),
    [({"z": torch.zeros(2, 4)}, "no field 'x'"), ({"x": ["a", "b"], "y": torch.zeros(2)}, "'x' is a list")],
)
def test_a_field_that_is_missing_or_no_tensor_is_named(fields: Any, what: str) -> None:
    with pytest.raises(DataError, match=what):
        classifier()(batch_of(2, 2, **fields))


def test_standardization_is_that_of_the_training_split(diabetes: Path) -> None:
    task = RegressionTask(MLP(10, out_features=1), num_features=10)
    data = ShardedDataModule(
        train=str(diabetes / "train.json"),
        fields={"features": "features.npy", "target": "target.npy"},
        global_batch_size=310,
        micro_batch_size=310,
    )
    data.setup("fit")
    task.fit_standardization(data.reader("train"))
    batch = next(iter(data.train_dataloader()))
    features, target = batch["features"].double(), batch["target"].double()
    torch.testing.assert_close(task.input_mean.double(), features.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(task.input_std.double(), features.std(0, correction=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(task.target_mean.double(), target.mean(), rtol=1e-5, atol=1e-5)
    assert set(task.state_dict()) >= {"input_mean", "input_std", "target_mean", "target_std"}

    wrong = RegressionTask(MLP(9, out_features=1), num_features=9)
    with pytest.raises(DataError, match="has 10 features, but num_features is 9"):
        wrong.fit_standardization(data.reader("train"))


def test_mean_squared_error_is_that_of_the_standardized_target() -> None:
    task = RegressionTask(nn.Linear(2, 1), num_features=2)
    task.target_mean.fill_(3.0)
    task.target_std.fill_(2.0)
    batch = batch_of(3, 3, features=torch.randn(3, 2), target=torch.tensor([1.0, 3.0, 7.0]))
    outputs = task(batch)
    torch.testing.assert_close(task.losses(outputs, batch), (outputs - torch.tensor([-1.0, 0.0, 2.0])) ** 2)
    torch.testing.assert_close(task.predict(outputs, batch)["prediction"], outputs * 2 + 3)


def test_weighted_mean_is_exact_in_double_precision() -> None:
    metric = WeightedMean()
    draw = torch.Generator().manual_seed(0)
    values, weights = (torch.rand(1000, generator=draw, dtype=torch.float64) for _ in range(2))
    for part, weight in zip(values.split(7), weights.split(7), strict=True):
        metric.update((part * weight).sum(), weight.sum())
    assert float(metric.compute()) == pytest.approx(float((values * weights).sum() / weights.sum()), rel=1e-14)


def test_explained_share_of_one_sample_is_not_a_number() -> None:
    metric = ExplainedShare()
    metric.update(torch.tensor([1.0]), torch.tensor([2.0]))
    assert torch.isnan(metric.compute())


def test_a_task_without_its_two_methods_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"Task must define forward\(batch\)"):
        Task()({})


def test_a_convnet_treats_every_sample_alone() -> None:
    torch.manual_seed(0)
    model = ConvNet(widths=(8, 16)).eval()
    images = torch.randn(5, 1, 8, 8)
    together = model(images)
    assert together.shape == (5, 10)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def regression_data(folder: Path, bad: float, **settings: Any) -> tuple[RegressionTask, ShardedDataModule]:
    samples = [
        {"__key__": f"s{n}", "x.npy": npy(np.full(2, n, np.float32)), "y.npy": npy(np.float32(bad if n == 3 else n))}
        for n in range(8)
    ]
    data = ShardedDataModule(
        train=write_shard(folder / "a.tar", samples),
        fields={"features": "x.npy", "target": "y.npy"},
        global_batch_size=8,
        loader=LoaderConfig(threads=0),
        **settings,
    )
    data.setup("fit")
    return RegressionTask(MLP(2, hidden=[2], out_features=1), num_features=2), data


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_target_that_is_not_finite_is_a_bad_sample(tmp_path: Path, bad: float) -> None:
    task, data = regression_data(tmp_path, bad)
    reader = data.reader("train")
    reader.require(task.allowed_values())
    with pytest.raises(DataError, match=r"sample 's3', field 'target' \(y\.npy\): .* is not a finite number"):
        task.fit_standardization(reader)
    task.fit_standardization(reader, skip_bad=True)
    good = [0.0, 1, 2, 4, 5, 6, 7]
    assert float(task.target_mean) == pytest.approx(sum(good) / 7)
    assert task.input_mean.tolist() == pytest.approx([sum(good) / 7] * 2)


def test_what_has_no_finite_mean_is_refused_where_a_transform_may_replace_it(tmp_path: Path) -> None:
    task, data = regression_data(tmp_path, math.nan)
    with pytest.raises(DataError, match="have no finite mean and standard deviation"):
        task.fit_standardization(data.reader("train"))


def test_a_metric_of_a_task_may_not_replace_its_loss() -> None:
    class Own(ClassificationTask):
        def build_metrics(self) -> Any:
            return {"loss": WeightedMean()}

    task = Own(MLP(2, hidden=[2], out_features=2), num_classes=2)
    task._trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match=r"Own.build_metrics\(\) has a metric 'loss'"):
        task.on_validation_epoch_start()


def test_predictions_may_not_have_reserved_names() -> None:
    class Own(ClassificationTask):
        def predict(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
            return {"__key__": ["other"] * len(outputs)}

    task = Own(MLP(2, hidden=[2], out_features=2), num_classes=2, input="x")
    with pytest.raises(ConfigError, match=r"what Own.predict\(\) returns has '__key__'"):
        task.predict_step(batch_of(2, 2, x=torch.zeros(2, 2)), 0)
