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
    """Trains a model that gives one number a sample, by mean squared error.

    Inputs and target are standardized by the mean and standard deviation of the *training* split, which are
    part of the model and saved with it. The loss is that of the standardized target; the metrics are in the
    target's own unit. Fitting them costs one pass over the training split when a fit is set up.

    Args:
        model: maps the input, shape (samples, num_features), to shape (samples, 1).
        num_features: number of features.
        input: name of the input field.
        target: name of the target field, shape (samples,); NaN or infinity there or in the input makes a bad sample.
        standardize: fit mean and standard deviation; without, data is used as it is.
        optimizer: which optimizer.
        schedule: how its learning rate moves.
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
        # On the CPU even where the model is built on the meta device: they are filled before it gets its memory.
        self.register_buffer("input_mean", torch.zeros(num_features, device="cpu"))
        self.register_buffer("input_std", torch.ones(num_features, device="cpu"))
        self.register_buffer("target_mean", torch.zeros((), device="cpu"))
        self.register_buffer("target_std", torch.ones((), device="cpu"))

    def setup(self, stage: str) -> None:
        """Fit the standardization on the training split; an evaluation takes it from the checkpoint."""
        data = sharded_data(self.trainer)
        if stage == "fit" and self.standardize and data is not None:
            reader = data.reader("train")
            if data.hooks.transform is None:  # which might replace what is not finite
                reader.require(self.allowed_values())
            self.fit_standardization(reader, skip_bad=data.skip_bad)

    def fit_standardization(self, reader: Reader, *, skip_bad: bool = False) -> None:
        """Take mean and standard deviation of inputs and target over all samples of a reader.

        Args:
            reader: of the training split.
            skip_bad: leave bad samples out instead of raising.

        Raises:
            DataError: the features are not as many as declared, or not finite.
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
        std = torch.where(std > 0, std, torch.ones_like(std))  # a constant column stays at zero
        self.input_mean.copy_(mean[:-1])
        self.input_std.copy_(std[:-1])
        self.target_mean.copy_(mean[-1])
        self.target_std.copy_(std[-1])

    def forward(self, batch: Batch) -> Tensor:
        """Standardized predictions, shape (samples,)."""
        features = (tensor_field(batch, self.input).to(torch.get_default_dtype()) - self.input_mean) / self.input_std
        out: Tensor = self.model(features)
        return out.squeeze(-1)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Squared error of each sample in units of the target's variance, shape (samples,)."""
        target = (tensor_field(batch, self.target).float() - self.target_mean) / self.target_std
        squared: Tensor = (outputs.float() - target).square()
        return squared

    def allowed_values(self) -> Mapping[str, Allowed]:
        """Finite inputs and targets: a NaN would poison the weights."""
        return {self.input: FINITE, self.target: FINITE}

    def build_metrics(self) -> Mapping[str, Metric]:
        """Root mean squared error, mean absolute error, and the share of variance explained."""
        return {"rmse": MeanSquaredError(squared=False), "mae": MeanAbsoluteError(), "r2": ExplainedShare()}

    def update_metrics(self, metrics: Mapping[str, Metric], outputs: Any, batch: Batch) -> None:
        """Compare predictions with targets, in the target's own unit."""
        predicted = self._in_unit(outputs)
        for metric in metrics.values():
            metric.update(predicted, batch[self.target].float())

    def predict(self, outputs: Tensor, batch: Batch) -> dict[str, Any]:
        """The prediction in the target's own unit."""
        return {"prediction": self._in_unit(outputs)}

    def _in_unit(self, outputs: Tensor) -> Tensor:
        return outputs.float() * self.target_std + self.target_mean


def _columns(reader: Reader, first: int, *names: str, skip_bad: bool) -> Tensor:
    """Some samples' features and target side by side, float64, shape (samples, features + 1)."""
    ids = np.arange(first, min(first + _CHUNK, len(reader.index)), dtype=np.int64)
    read = reader.samples(ids, mark_bad=skip_bad)
    good = [place for place in range(len(ids)) if place not in read.bad]
    return torch.cat([tensor_field(read.fields, name)[good].double()[:, None].flatten(1) for name in names], dim=1)
