"""Robust statistics of recent gradient norms and losses, on the device, to detect spikes.

The baseline is the median, and a deviation is 1.4826 times the median absolute deviation. That is zero if more than
half of the values are equal, which would make any larger value a spike forever; so a deviation is at least a hundredth
of the baseline, and if the median absolute deviation is zero, the mean absolute deviation is used. Nothing here
synchronizes with the device.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

_NORMAL: Final = 1.4826
"""Times the median absolute deviation of normally distributed numbers, this is their standard deviation."""
_NORMAL_MEAN: Final = 1.2533
"""The same for the mean absolute deviation."""
_LEAST: Final = 0.01
"""Minimum deviation as a fraction of the baseline."""


class Usual:
    """The norms and losses of the last steps that were not skipped.

    Args:
        window: how many steps.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._recent = torch.full((2, window), math.nan, dtype=torch.float64)  # norms, losses
        self._accepted = torch.zeros((), dtype=torch.int64)

    def is_spike(self, norm: Tensor, loss: Tensor, *, deviations: float) -> Tensor:
        """Return whether either is this far above the baseline, as a boolean scalar on the device of ``loss``."""
        self._recent, self._accepted = self._recent.to(loss.device), self._accepted.to(loss.device)
        usual = self._recent.nanmedian(dim=1).values
        apart = (self._recent - usual[:, None]).abs()
        spread = apart.nanmedian(dim=1).values * _NORMAL
        spread = torch.where(spread > 0, spread, apart.nanmean(dim=1) * _NORMAL_MEAN)
        spread = torch.maximum(spread, _LEAST * usual.abs())
        # If all values were zero, there is no scale to judge by.
        limit = torch.where(spread > 0, usual + deviations * spread, math.inf)
        above = torch.stack((norm.double(), loss.double())) > limit
        return above.any() & (self._accepted >= self.window // 4)

    def add(self, norm: Tensor, loss: Tensor, *, but: Tensor) -> None:
        """Add a step, unless ``but`` is true (skipped). Two float64 scalars and a boolean one, on one device."""
        self._recent, self._accepted = self._recent.to(loss.device), self._accepted.to(loss.device)
        here = torch.arange(self.window, device=loss.device) == self._accepted % self.window
        self._recent = torch.where(here & ~but, torch.stack((norm, loss))[:, None], self._recent)
        self._accepted = self._accepted + ~but

    def state(self) -> dict[str, list[float]]:
        """Return what a checkpoint stores."""
        oldest = int(self._accepted) % self.window
        in_time = self._recent.roll(-oldest, dims=1).tolist()
        norms, losses = ([value for value in row if not math.isnan(value)] for row in in_time)
        return {"recent": norms, "recent_losses": losses}

    def load(self, state: dict[str, list[float]]) -> None:
        """Restore what a checkpoint stored."""
        losses = state.get("recent_losses", [])  # older checkpoints have none: start over
        recent = [state["recent"][-self.window :] if losses else [], losses[-self.window :]]
        self._recent.fill_(math.nan)
        self._recent[:, : len(recent[0])] = torch.tensor(recent, dtype=torch.float64)
        self._accepted.fill_(len(recent[0]))
