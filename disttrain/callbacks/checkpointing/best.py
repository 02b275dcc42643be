"""The ranked list of the best checkpoints.

The list is part of each checkpoint, so it includes a checkpoint before that is written, and removes it again if the
save fails. A resumed run restores the list, even if its checkpoints are in another folder: no worse one takes their
place.
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
    """The best few checkpoints, best first.

    Args:
        size: the maximum number of entries.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: list[Rated] = []
        self._before: list[Rated] = []

    @property
    def first(self) -> Rated | None:
        """The best checkpoint, or None."""
        return self._entries[0] if self._entries else None

    @property
    def names(self) -> list[str]:
        """Directory names of all checkpoints on the list, best first."""
        return [entry.name for entry in self._entries]

    def admits(self, value: float, monitor: Monitor) -> bool:
        """Return whether a value is good enough for the list."""
        if len(self._entries) < self.size:
            return monitor.better(value, monitor.worst)
        return monitor.better(value, self._entries[-1].value)

    def begin(self) -> None:
        """Save the current list, for :meth:`undo`."""
        self._before = list(self._entries)

    def add(self, entry: Rated, monitor: Monitor) -> None:
        """Add a checkpoint if its value is among the best; equal values are ordered by step."""
        if self.admits(entry.value, monitor):
            sign = 1 if monitor.mode == "min" else -1
            self._entries = sorted([*self._entries, entry], key=lambda one: (sign * one.value, one.step))[: self.size]

    def undo(self) -> None:
        """Restore the list saved by :meth:`begin`."""
        self._entries = self._before

    def clear(self) -> None:
        """Remove all entries."""
        self._entries = []

    def state(self) -> list[list[object]]:
        """Return the list, to store in a checkpoint."""
        return [list(entry) for entry in self._entries]

    def load(self, state: Sequence[Sequence[object]]) -> None:
        """Restore what :meth:`state` returned."""
        read = [Rated(float(str(value)), int(str(step)), str(name)) for value, step, name in state]
        self._entries = read[: self.size]

    def is_first_in(self, directory: Path) -> bool:
        """Return whether the best checkpoint is in a folder, and not another one of the same name."""
        if self.first is None:
            return False
        try:
            found = reader.check(directory / self.first.name)
        except CheckpointError:
            return False
        metric = found.about.metric
        return found.global_step == self.first.step and (metric is None or metric.value == self.first.value)
