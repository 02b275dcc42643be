"""A monitored metric: its name, whether lower or higher is better, and how to look it up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, Literal
from weakref import WeakKeyDictionary

import lightning.pytorch as pl

from disttrain.errors import ConfigError, nearest

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Monitor:
    """A validation metric and whether lower or higher is better.

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
            raise ConfigError(f"mode of monitor {self.name!r} is {self.mode!r}", hint="use 'min' or 'max'")
        if self.min_delta < 0:
            raise ConfigError(f"min_delta of monitor {self.name!r} is {self.min_delta}", hint="use 0 or more")

    @property
    def worst(self) -> float:
        """The value that any finite one improves on."""
        return math.inf if self.mode == "min" else -math.inf

    def better(self, value: float, than: float) -> bool:
        """Return whether ``value`` improves on ``than`` by more than ``min_delta``; NaN never does."""
        if self.mode == "min":
            return value < than - self.min_delta
        return value > than + self.min_delta

    def value(self, trainer: pl.Trainer) -> float | None:
        """Return rank 0's current value on all ranks, or None if this validation did not log it. Collective.

        Raises:
            ConfigError: no metric of that name was ever logged; the message lists those that were.
        """
        metrics, seen = trainer.callback_metrics, _SEEN.setdefault(trainer, _Seen())
        if self.name not in metrics and self.name not in seen.logged | seen.expected:
            names = sorted(name for name in metrics if isinstance(name, str))
            listed = f"metrics there are: {', '.join(names)}" if names else "no metrics were logged"
            raise ConfigError(
                f"the monitored metric {self.name!r} is not logged in validation; {listed}",
                hint=f"set the monitor to one of them; {nearest(self.name, names)}",
            )
        value: float | None = None
        # Lightning keeps a metric in callback_metrics until it is logged again, so compare identities, not names.
        if self.name in metrics and metrics[self.name] is not seen.before.get(self.name):
            seen.logged.add(self.name)
            value = float(metrics[self.name])
        elif self.name in metrics and self.name not in seen.logged:
            value = float(metrics[self.name])  # logged in training, never in a validation
        return trainer.strategy.broadcast(value)


@dataclass
class _Seen:
    """What a trainer's validations have logged.

    Attributes:
        before: the metrics at the start of this validation.
        logged: monitored metrics that some validation has logged.
        expected: those that validations of this run logged in an earlier process.
    """

    before: dict[str, object] = field(default_factory=dict)
    logged: set[str] = field(default_factory=set)
    expected: set[str] = field(default_factory=set)


_SEEN: Final[WeakKeyDictionary[pl.Trainer, _Seen]] = WeakKeyDictionary()


def begin_validation(trainer: pl.Trainer) -> None:
    """Note the current metrics, so that :meth:`Monitor.value` can tell new ones apart; call before each validation."""
    _SEEN.setdefault(trainer, _Seen()).before = dict(trainer.callback_metrics)


def expect(trainer: pl.Trainer, name: str) -> None:
    """Allow the first validations of a resumed run not to log a metric that earlier ones have logged."""
    _SEEN.setdefault(trainer, _Seen()).expected.add(name)
