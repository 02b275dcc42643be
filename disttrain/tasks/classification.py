"""Classification by cross-entropy, with label smoothing and exact accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from disttrain.data.decode.allowed_values import Allowed, classes
from disttrain.data.loader.batches import Batch
from disttrain.errors import ConfigError
from disttrain.optim import OptimizerConfig, ScheduleConfig
from disttrain.tasks.base import Task, tensor_field


class ClassificationTask(Task):
    """Trains a model that outputs logits, with cross-entropy.

    Args:
        model: maps the input, shape (samples, ...), to logits, shape (samples, num_classes).
        num_classes: number of classes.
        input: name of the input field.
        target: name of the label field, int64, shape (samples,); a sample with a label out of range is a bad sample.
        scale: factor on the input, which is converted to float32 (bfloat16 with ``bf16-true``).
        label_smoothing: share of the target distributed evenly over all classes (Szegedy et al. 2016).
        optimizer: the optimizer.
        schedule: the learning-rate schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        input: str = "image",
        target: str = "label",
        scale: float = 1.0,
        label_smoothing: float = 0.0,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing is {label_smoothing}", hint="use a value from 0 to below 1")
        self.model = model
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.input, self.target, self.scale = input, target, scale

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, shape (samples, num_classes)."""
        logits: Tensor = self.model(tensor_field(batch, self.input).to(torch.get_default_dtype()) * self.scale)
        return logits

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return each sample's cross-entropy in float32, shape (samples,); label smoothing applies in training only."""
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(
            outputs.float(), tensor_field(batch, self.target), reduction="none", label_smoothing=smoothing
        )

    def allowed_values(self) -> Mapping[str, Allowed]:
        """Allow labels from 0 to ``num_classes - 1``."""
        return {self.target: classes(self.num_classes)}

    def build_metrics(self) -> Mapping[str, Metric]:
        """Return accuracy over all samples and macro-averaged F1."""
        return {
            "accuracy": MulticlassAccuracy(self.num_classes, average="micro"),
            "f1": MulticlassF1Score(self.num_classes, average="macro"),
        }

    def update_metrics(self, metrics: Mapping[str, Metric], outputs: Any, batch: Batch) -> None:
        """Count the predicted classes."""
        predicted = outputs.argmax(dim=1)
        for metric in metrics.values():
            metric.update(predicted, batch[self.target])

    def predict(self, outputs: Tensor, batch: Batch) -> dict[str, Any]:
        """Return the predicted class and its probability."""
        probability, predicted = torch.softmax(outputs.float(), dim=1).max(dim=1)
        return {"class": predicted, "probability": probability}
