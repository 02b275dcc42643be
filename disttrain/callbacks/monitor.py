"""A monitored metric: its name, which way is better, and how it is looked up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl

from disttrain.errors import ConfigError, nearest

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Monitor:
    """A validation metric and which way is better.

    Attributes:
        name: as logged, such as ``val/loss``.
        mode: ``min`` or ``max``.
        min_delta: a change must be larger than this to count.
    """

    name: str
    mode: Mode = "min"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ConfigError(f"mode of monitor {self.name!r} is {self.mode!r}", mend="use 'min' or 'max'")
        if self.min_delta < 0:
            raise ConfigError(f"min_delta of monitor {self.name!r} is {self.min_delta}", mend="use 0 or more")

    @property
    def worst(self) -> float:
        """A value that every finite one is better than."""
        return math.inf if self.mode == "min" else -math.inf

    def better(self, value: float, than: float) -> bool:
        """Whether ``value`` improves on ``than`` by more than ``min_delta``; NaN never does."""
        if self.mode == "min":
            return value < than - self.min_delta
        return value > than + self.min_delta

    def value(self, trainer: pl.Trainer) -> float:
        """Its present value, that of rank 0 on all ranks. A collective.

        Raises:
            ConfigError: no metric of that name was logged; the message lists those that were.
        """
        metrics = trainer.callback_metrics
        if self.name not in metrics:
            names = sorted(name for name in metrics if isinstance(name, str))
            listed = f"metrics there are: {', '.join(names)}" if names else "no metrics were logged"
            raise ConfigError(
                f"the monitored metric {self.name!r} is not logged in validation; {listed}",
                mend=f"set the monitor to one of them; {nearest(self.name, names)}",
            )
        value: float = trainer.strategy.broadcast(float(metrics[self.name]))
        return value
