"""Metrics of the base task, as torchmetrics modules whose states add up over ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.regression import R2Score


class WeightedMean(Metric):
    """``sum(w_i * v_i) / sum(w_i)`` over all samples of all ranks, summed in float64.

    NaN if the weights sum to zero.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("weight", zero.clone(), dist_reduce_fx="sum")

    def update(self, total: Tensor, weight: Tensor) -> None:
        """Add a weighted sum of values and the sum of its weights, both scalars."""
        self.total += total
        self.weight += weight

    def compute(self) -> Tensor:
        """Return the mean, a float64 scalar."""
        return self.total / self.weight


class ExplainedShare(R2Score):
    """R2, the share of the target's variance that the predictions explain; NaN for fewer than two samples.

    torchmetrics raises in that case, which would end a run with such a small evaluation split.
    """

    def compute(self) -> Tensor:
        """Return R2, a scalar: 1 is perfect, 0 is as good as predicting the mean, negative is worse."""
        if self.total < 2:
            return torch.full((), torch.nan, device=self.device)
        value: Tensor = super().compute()
        return value
