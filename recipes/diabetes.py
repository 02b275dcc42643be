"""Progression of diabetes after a year (scikit-learn's 442 patients, 10 measurements) by a small network.

Tabular regression with few samples, so regularized three ways: dropout, L2 (Adam's weight decay is added to
the gradient), and early stopping. Features and target are standardized by the training split alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from disttrain.models import MLP
from disttrain.optim import OptimizerConfig, ScheduleConfig
from disttrain.tasks import RegressionTask


class DiabetesTask(RegressionTask):
    """Predicts disease progression from ten measurements.

    Args:
        hidden: sizes of the network's hidden layers.
        dropout: probability of zeroing a hidden unit.
        optimizer: which optimizer.
        schedule: how its learning rate moves.
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (32,),
        dropout: float = 0.1,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
    ) -> None:
        super().__init__(
            MLP(10, hidden=hidden, out_features=1, dropout=dropout),
            num_features=10,
            optimizer=optimizer or OptimizerConfig(name="adam", lr=3e-3, weight_decay=1e-2),
            schedule=schedule,
        )
