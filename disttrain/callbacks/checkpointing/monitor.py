"""A monitored metric: its name, which way is better, and how it is looked up."""

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
            raise ConfigError(f"mode of monitor {self.name!r} is {self.mode!r}", hint="use 'min' or 'max'")
        if self.min_delta < 0:
            raise ConfigError(f"min_delta of monitor {self.name!r} is {self.min_delta}", hint="use 0 or more")

    @property
    def worst(self) -> float:
        """A value that every finite one is better than."""
        return math.inf if self.mode == "min" else -math.inf

    def better(self, value: float, than: float) -> bool:
        """Whether ``value`` improves on ``than`` by more than ``min_delta``; NaN never does."""
        if self.mode == "min":
            return value < than - self.min_delta
        return value > than + self.min_delta

    def value(self, trainer: pl.Trainer) -> float | None:
        """Its present value, that of rank 0 on all ranks; None where this validation did not log it. A collective.

        Raises:
            ConfigError: no metric of that name was logged; the message lists those that were.
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
        # Lightning keeps what an earlier validation logged, under the same name, until another one logs it.
        if self.name in metrics and metrics[self.name] is not seen.before.get(self.name):
            seen.logged.add(self.name)
            value = float(metrics[self.name])
        elif self.name in metrics and self.name not in seen.logged:
            value = float(metrics[self.name])  # a metric of training, which no validation has ever logged
        return trainer.strategy.broadcast(value)


@dataclass
class _Seen:
    """What a trainer's validations have logged.

    Attributes:
        before: the metrics as this validation found them.
        logged: the monitored ones that a validation has logged.
        expected: those that validations of this run have logged in an earlier process.
    """

    before: dict[str, object] = field(default_factory=dict)
    logged: set[str] = field(default_factory=set)
    expected: set[str] = field(default_factory=set)


_SEEN: Final[WeakKeyDictionary[pl.Trainer, _Seen]] = WeakKeyDictionary()


def begin_validation(trainer: pl.Trainer) -> None:
    """To be called before a validation, so that :meth:`Monitor.value` can tell its metrics from earlier ones."""
    _SEEN.setdefault(trainer, _Seen()).before = dict(trainer.callback_metrics)


def expect(trainer: pl.Trainer, name: str) -> None:
    """Let validations of a resumed run do without a metric that validations before it have logged."""
    _SEEN.setdefault(trainer, _Seen()).expected.add(name)
