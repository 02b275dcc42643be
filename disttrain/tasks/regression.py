"""Regression by mean squared error, with exact RMSE, MAE and R2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from disttrain.data.loader import Batch
from disttrain.errors import ConfigError
from disttrain.optim import OptimizerConfig, ScheduleConfig
from disttrain.tasks.base import Task, tensor_field


class RegressionTask(Task):
    """Trains a model that gives one number a sample, by mean squared error.

    Inputs and target are standardized with constants that are part of the model (they are saved with it);
    the loss is that of the standardized target, the metrics are in the target's own unit.

    Args:
        model: maps the input, shape (samples, features), to shape (samples, 1).
        input: name of the input field.
        target: name of the target field, shape (samples,).
        input_mean: mean of each feature in the training data; 0 by default.
        input_std: its standard deviation; 1 by default.
        target_mean: mean of the training targets.
        target_std: their standard deviation.
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
        input: str = "features",
        target: str = "target",
        input_mean: Sequence[float] = (0.0,),
        input_std: Sequence[float] = (1.0,),
        target_mean: float = 0.0,
        target_std: float = 1.0,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule)
        if min(*input_std, target_std, 1.0) <= 0:
            raise ConfigError("a standard deviation is not positive", mend="leave out constant features")
        self.model = model
        self.input, self.target = input, target
        for name, value in (
            ("input_mean", torch.tensor(list(input_mean))),
            ("input_std", torch.tensor(list(input_std))),
            ("target_mean", torch.tensor(target_mean)),
            ("target_std", torch.tensor(target_std)),
        ):
            self.register_buffer(name, value.float())

    def forward(self, batch: Batch) -> Tensor:
        """Standardized predictions, shape (samples,)."""
        features = (tensor_field(batch, self.input).float() - self.input_mean) / self.input_std
        out: Tensor = self.model(features)
        return out.squeeze(-1)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Squared error of each sample in units of the target's variance, shape (samples,)."""
        target = (tensor_field(batch, self.target).float() - self.target_mean) / self.target_std
        squared: Tensor = (outputs.float() - target).square()
        return squared

    def build_metrics(self) -> Mapping[str, Metric]:
        """Root mean squared error, mean absolute error, and the share of variance explained."""
        return {"rmse": MeanSquaredError(squared=False), "mae": MeanAbsoluteError(), "r2": R2Score()}

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
