"""Regression by mean squared error, with exact RMSE, MAE and R2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from disttrain.data.decode.allowed_values import FINITE, Allowed
from disttrain.data.loader.batches import Batch
from disttrain.data.module import sharded_data
from disttrain.data.reader.sample_reader import Reader
from disttrain.errors import DataError
from disttrain.optim import OptimizerConfig, ScheduleConfig
from disttrain.tasks.base import Task, tensor_field
from disttrain.tasks.metrics import ExplainedShare

_CHUNK: Final = 4096


class RegressionTask(Task):
    """Trains a model that outputs one number per sample, with mean squared error.

    Inputs and target are standardized with the mean and standard deviation of the *training* split, which are buffers
    of the model and saved with it. The loss is computed on the standardized target; metrics are in the target's
    original unit. Computing the statistics costs one pass over the training split at setup.

    Args:
        model: maps the input, shape (samples, num_features), to shape (samples, 1).
        num_features: number of features.
        input: name of the input field.
        target: name of the target field, shape (samples,); a sample with NaN or infinity in it or in the input is a
            bad sample.
        standardize: standardize inputs and target; if false, use the data unchanged.
        optimizer: the optimizer.
        schedule: the learning-rate schedule.
    """

    input_mean: Tensor
    input_std: Tensor
    target_mean: Tensor
    target_std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        num_features: int,
        input: str = "features",
        target: str = "target",
        standardize: bool = True,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule)
        self.model = model
        self.input, self.target, self.standardize = input, target, standardize
        # On the CPU even if the model is built on the meta device: they are filled before the model is allocated.
        self.register_buffer("input_mean", torch.zeros(num_features, device="cpu"))
        self.register_buffer("input_std", torch.ones(num_features, device="cpu"))
        self.register_buffer("target_mean", torch.zeros((), device="cpu"))
        self.register_buffer("target_std", torch.ones((), device="cpu"))

    def setup(self, stage: str) -> None:
        """Compute the standardization from the training split; evaluations load it from the checkpoint."""
        data = sharded_data(self.trainer)
        if stage == "fit" and self.standardize and data is not None:
            reader = data.reader("train")
            if data.hooks.transform is None:  # a transform may replace non-finite values
                reader.require(self.allowed_values())
            self.fit_standardization(reader, skip_bad=data.skip_bad)

    def fit_standardization(self, reader: Reader, *, skip_bad: bool = False) -> None:
        """Compute mean and standard deviation of inputs and target over all samples of a reader.

        Args:
            reader: reads the training split.
            skip_bad: skip bad samples instead of raising.

        Raises:
            DataError: the number of features is not as declared, or they are not finite.
        """
        firsts = range(0, len(reader.index), _CHUNK)
        columns = torch.cat([_columns(reader, first, self.input, self.target, skip_bad=skip_bad) for first in firsts])
        if columns.shape[1] != len(self.input_mean) + 1:
            raise DataError(
                f"field {self.input!r} has {columns.shape[1] - 1} features, but num_features is {len(self.input_mean)}",
                hint="set num_features to the number of features in the data",
            )
        mean, std = columns.mean(dim=0), columns.std(dim=0, correction=0)
        if not bool((mean + std).isfinite().all()):
            raise DataError(
                f"fields {self.input!r} and {self.target!r} have no finite mean and standard deviation",
                hint="they are computed before data.hooks.transform: repair the data, or set standardize to false",
            )
        std = torch.where(std > 0, std, torch.ones_like(std))  # constant columns become zero
        self.input_mean.copy_(mean[:-1])
        self.input_std.copy_(std[:-1])
        self.target_mean.copy_(mean[-1])
        self.target_std.copy_(std[-1])

    def forward(self, batch: Batch) -> Tensor:
        """Return standardized predictions, shape (samples,)."""
        features = (tensor_field(batch, self.input).to(torch.get_default_dtype()) - self.input_mean) / self.input_std
        out: Tensor = self.model(features)
        return out.squeeze(-1)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return each sample's squared error in units of the target's variance, shape (samples,)."""
        target = (tensor_field(batch, self.target).float() - self.target_mean) / self.target_std
        squared: Tensor = (outputs.float() - target).square()
        return squared

    def allowed_values(self) -> Mapping[str, Allowed]:
        """Allow only finite inputs and targets: NaN would spread to the weights."""
        return {self.input: FINITE, self.target: FINITE}

    def build_metrics(self) -> Mapping[str, Metric]:
        """Return root mean squared error, mean absolute error and R2."""
        return {"rmse": MeanSquaredError(squared=False), "mae": MeanAbsoluteError(), "r2": ExplainedShare()}

    def update_metrics(self, metrics: Mapping[str, Metric], outputs: Any, batch: Batch) -> None:
        """Compare predictions with targets, in the target's original unit."""
        predicted = self._in_unit(outputs)
        for metric in metrics.values():
            metric.update(predicted, batch[self.target].float())

    def predict(self, outputs: Tensor, batch: Batch) -> dict[str, Any]:
        """Return predictions in the target's original unit."""
        return {"prediction": self._in_unit(outputs)}

    def _in_unit(self, outputs: Tensor) -> Tensor:
        return outputs.float() * self.target_std + self.target_mean


def _columns(reader: Reader, first: int, *names: str, skip_bad: bool) -> Tensor:
    """Return features and target of one chunk of samples side by side, float64, shape (samples, features + 1)."""
    ids = np.arange(first, min(first + _CHUNK, len(reader.index)), dtype=np.int64)
    read = reader.samples(ids, mark_bad=skip_bad)
    good = [place for place in range(len(ids)) if place not in read.bad]
    return torch.cat([tensor_field(read.fields, name)[good].double()[:, None].flatten(1) for name in names], dim=1)
