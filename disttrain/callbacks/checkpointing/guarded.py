"""Which checkpoints the update guard needs kept for a rollback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from disttrain.checkpoint.format.retention import Keep


@dataclass(frozen=True)
class Guarded:
    """What the update guard requires of checkpointing.

    Attributes:
        streak_begins: returns the first step of the current streak of skipped updates, or 0.
        margin: steps before a streak that are suspect too; None if the run cannot roll back.
    """

    streak_begins: Callable[[], int]
    margin: int | None

    def widen(self, keep: Keep, step: int) -> Keep:
        """Return what to keep at a step, in addition to what the user asks for."""
        # The next step may be the first of a streak, so its rollback target must be kept now.
        before = 0 if self.margin is None else max(1, step + 1 - self.margin)
        return replace(keep, below_step=self.streak_begins(), before_step=before)
