"""Which checkpoints a guard over updates needs kept, so that there is one to roll back to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from disttrain.checkpoint.format.retention import Keep


@dataclass(frozen=True)
class Guarded:
    """What a guard over updates asks of whoever keeps checkpoints.

    Attributes:
        streak_begins: gives the first of the steps in a row that were left out up to now, or 0.
        margin: steps before a streak that are suspect too; None where the run does not go back.
    """

    streak_begins: Callable[[], int]
    margin: int | None

    def widen(self, keep: Keep, step: int) -> Keep:
        """What to keep at a step, beside what the user asks for."""
        # The next step may be the first of a streak.
        before = 0 if self.margin is None else max(1, step + 1 - self.margin)
        return replace(keep, below_step=self.streak_begins(), before_step=before)
