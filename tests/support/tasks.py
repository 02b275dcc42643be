"""Tasks that tests name in a configuration."""

from __future__ import annotations

from torch import nn

from disttrain import ClassificationTask, OptimizerConfig


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
