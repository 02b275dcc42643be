"""Tasks that tests name in a configuration."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from disttrain import ClassificationTask, OptimizerConfig, ScheduleConfig


class BatchNormDigits(ClassificationTask):
    """Digits by a network with batch norms, whose running statistics each rank gathers from its own samples."""

    def __init__(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(72, 10),
        )
        super().__init__(model, num_classes=10, scale=1 / 16, optimizer=OptimizerConfig(name="sgd", lr=0.05))


class PlainDigits(ClassificationTask):
    """Digits by a small network without kinks, trained by SGD; what the planted mistakes below are made in."""

    def __init__(self, lr: float = 0.05) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        super().__init__(model, num_classes=10, scale=1 / 16, optimizer=OptimizerConfig(name="sgd", lr=lr))


class TeacherDigits(PlainDigits):
    """Has a teacher, which follows the weights in the module's own last hook of a step."""

    teacher: Tensor

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.register_buffer("teacher", torch.zeros(10))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.teacher.lerp_(self.model[3].bias.detach(), 0.1)


class RankDependentDigits(PlainDigits):
    """A planted mistake: the loss depends on the rank."""

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        return super().losses(outputs, batch) * (1.0 + 0.1 * self.global_rank)


class UnkeyedDropoutDigits(PlainDigits):
    """A planted mistake: dropout that draws from NumPy."""

    def forward(self, batch: Any) -> Any:
        keep = torch.from_numpy((np.random.random(10) > 0.3).astype(np.float32))
        return super().forward(batch) * (keep if self.training else 1.0)


class JitteryDigits(PlainDigits):
    """A planted mistake: losses that are not the same twice, by less than a tolerance, as of a kernel with atomics."""

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        return super().losses(outputs, batch) * (1.0 + 1e-6 * os.urandom(1)[0] / 256)


class MeanOfMeansDigits(pl.LightningModule):
    """A planted mistake: a weighted loss that is averaged over each micro batch by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = nn.functional.cross_entropy(self.model(batch["image"] / 16.0), batch["label"], reduction="none")
        weights = 1.0 + batch["label"].float()
        return (losses * weights).sum() / weights.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class FeatureTask(ClassificationTask):
    """Two classes by six features, with momentum, whose state a spoilt step would spoil too."""

    def __init__(self, lr: float = 0.05, cosine: bool = False) -> None:
        model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
        optimizer = OptimizerConfig(name="sgd", lr=lr, momentum=0.9)
        schedule = ScheduleConfig(name="cosine" if cosine else "constant")
        super().__init__(model, num_classes=2, input="features", optimizer=optimizer, schedule=schedule)


class LossSpikeTask(FeatureTask):
    """A sample whose features are far too large raises the loss and not the gradient."""

    def forward(self, batch: Any) -> Any:
        return super().forward({**batch, "features": batch["features"].clamp(-3, 3)})

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        return super().losses(outputs, batch) + 1e4 * (batch["features"].abs() > 1e3).any(dim=1)


class PlainFeatures(pl.LightningModule):
    """The same as any LightningModule, which knows nothing of disttrain; or one that optimizes by hand."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not by_hand
        self.model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(batch["features"]), batch["label"])
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
