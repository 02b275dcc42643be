"""The list of the best checkpoints: who is on it, best first, and whether the first is still there.

The list is part of a checkpoint, so it names one before that is written, and takes it back where the save fails. A
resumed run knows it again, also where it names checkpoints of another folder: nothing worse takes their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from disttrain.callbacks.checkpointing.monitor import Monitor
from disttrain.checkpoint.format import reader
from disttrain.errors import CheckpointError


class Rated(NamedTuple):
    """A checkpoint and its metric.

    Attributes:
        value: of the monitored metric.
        step: of the checkpoint.
        name: of its directory.
    """

    value: float
    step: int
    name: str


class BestList:
    """The best few checkpoints.

    Args:
        size: how many at most.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: list[Rated] = []
        self._before: list[Rated] = []

    @property
    def first(self) -> Rated | None:
        """The best one."""
        return self._entries[0] if self._entries else None

    @property
    def names(self) -> list[str]:
        """Names of all directories on the list, best first."""
        return [entry.name for entry in self._entries]

    def admits(self, value: float, monitor: Monitor) -> bool:
        """Whether a value is among the best."""
        if len(self._entries) < self.size:
            return monitor.better(value, monitor.worst)
        return monitor.better(value, self._entries[-1].value)

    def begin(self) -> None:
        """Remember the list as it is, for :meth:`undo`."""
        self._before = list(self._entries)

    def add(self, entry: Rated, monitor: Monitor) -> None:
        """Put a checkpoint on the list if its value is among the best; of equal values the earlier step is first."""
        if self.admits(entry.value, monitor):
            sign = 1 if monitor.mode == "min" else -1
            self._entries = sorted([*self._entries, entry], key=lambda one: (sign * one.value, one.step))[: self.size]

    def undo(self) -> None:
        """Go back to what :meth:`begin` remembered."""
        self._entries = self._before

    def clear(self) -> None:
        """Forget all."""
        self._entries = []

    def state(self) -> list[list[object]]:
        """The list, for a checkpoint."""
        return [list(entry) for entry in self._entries]

    def load(self, state: Sequence[Sequence[object]]) -> None:
        """Take over what :meth:`state` said."""
        read = [Rated(float(str(value)), int(str(step)), str(name)) for value, step, name in state]
        self._entries = read[: self.size]

    def is_first_in(self, directory: Path) -> bool:
        """Whether the best one is in a folder; one of its name there may be of another course of the run."""
        if self.first is None:
            return False
        try:
            found = reader.check(directory / self.first.name)
        except CheckpointError:
            return False
        metric = found.about.metric
        return found.global_step == self.first.step and (metric is None or metric.value == self.first.value)
