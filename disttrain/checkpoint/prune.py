"""Which checkpoints of a folder are kept: the last few, the best few, and every N steps. A pure choice."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from disttrain.checkpoint.marker import Committed


@dataclass(frozen=True)
class Keep:
    """What to keep.

    Attributes:
        last: how many of the newest.
        best: names of directories to keep whatever their age.
        every_steps: keep those whose step is a multiple, for good.
        below_step: keep those of earlier steps than this: the run may have to go back to one.
        before_step: keep the newest of those of earlier steps than this, and the oldest of the others, which follows it
            in this when the run has gone on: it may yet have to go back; and what was the best at each that is kept.
            0 keeps none for that.
    """

    last: int = 1
    best: Collection[str] = ()
    every_steps: int | None = None
    below_step: int = 0
    before_step: int = 0

    def superfluous(self, found: Sequence[Committed]) -> list[Committed]:
        """Those of ``found``, oldest first, that need not be kept."""
        kept = list(found[max(0, len(found) - self.last) :])
        if self.before_step:
            older = [entry for entry in found if entry.global_step < self.before_step]
            kept += [*older[-1:], *found[len(older) : len(older) + 1]]
        kept += [entry for entry in found if entry.path.name in self.best or entry.global_step < self.below_step]
        if self.every_steps:
            kept += [entry for entry in found if entry.global_step % self.every_steps == 0]
        if self.before_step:  # to go back to one takes what was the best then, too
            for last in {entry.global_step for entry in kept}:
                kept += best_of([entry for entry in found if entry.global_step <= last], len(self.best))
        return [entry for entry in found if entry not in kept]


def best_of(found: Sequence[Committed], number: int) -> list[Committed]:
    """The best few by the metric that their markers hold; of one metric only, that of the newest.

    A step counts once, by its newest checkpoint.
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
    return math.inf if math.isnan(value) else sign * value  # a sort that meets a NaN is no sort
