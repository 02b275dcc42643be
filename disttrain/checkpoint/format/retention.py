"""Choose which checkpoints of a folder to keep: the last few, the best few, and every N steps. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from disttrain.checkpoint.format.marker import Committed


@dataclass(frozen=True)
class Keep:
    """Retention rules.

    Attributes:
        last: how many of the newest to keep.
        best: names of directories to keep at any age.
        every_steps: keep checkpoints whose step is a multiple of this, for good.
        below_step: keep checkpoints before this step: the run may have to roll back to one.
        before_step: keep the newest checkpoint before this step, and the oldest at or after it, which takes over that
            role as the run advances: the run may have to roll back. Also keep what was the best at each kept
            checkpoint. 0 disables this.
    """

    last: int = 1
    best: Collection[str] = ()
    every_steps: int | None = None
    below_step: int = 0
    before_step: int = 0

    def superfluous(self, found: Sequence[Committed]) -> list[Committed]:
        """Return the entries of ``found`` (oldest first) that need not be kept."""
        kept = list(found[max(0, len(found) - self.last) :])
        if self.before_step:
            older = [entry for entry in found if entry.global_step < self.before_step]
            kept += [*older[-1:], *found[len(older) : len(older) + 1]]
        kept += [entry for entry in found if entry.path.name in self.best or entry.global_step < self.below_step]
        if self.every_steps:
            kept += [entry for entry in found if entry.global_step % self.every_steps == 0]
        if self.before_step:  # a rollback to a checkpoint also needs the ones that were the best at that time
            for last in {entry.global_step for entry in kept}:
                kept += best_of([entry for entry in found if entry.global_step <= last], len(self.best))
        return [entry for entry in found if entry not in kept]


def best_of(found: Sequence[Committed], number: int) -> list[Committed]:
    """Return the best few by the metric in their markers, comparing only the newest one's metric.

    A step counts once, with its newest checkpoint.
    """
    rated = {entry.global_step: entry for entry in found if entry.about.metric is not None}
    if not rated or number < 1:
        return []
    metric = rated[max(rated)].about.metric
    assert metric is not None
    sign = 1 if metric.mode == "min" else -1
    same = [entry for entry in rated.values() if entry.about.metric and entry.about.metric.name == metric.name]
    return sorted(same, key=lambda entry: (_rank(entry, sign), entry.global_step))[:number]


def _rank(entry: Committed, sign: int) -> float:
    value = entry.about.metric.value if entry.about.metric else math.nan
    return math.inf if math.isnan(value) else sign * value  # NaN has no order, so sorting with it is undefined
