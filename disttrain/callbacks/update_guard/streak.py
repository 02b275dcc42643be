"""Streaks of skipped steps, and the batches that a rollback skips for them. Pure functions and small, saveable state.

Steps are numbered from 1; a checkpoint of step 8 includes the updates of steps 1 to 8. A step is skipped because it was
judged bad, or because an earlier rollback planned it. Planned ones do not count towards the limit, but a streak that
directly follows them starts at the first of them: so its rollback reaches further back than the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from disttrain.checkpoint.format.marker import Committed


@dataclass
class Streak:
    """The current run of consecutive skipped steps.

    Once it is too long, it only grows by further skipped steps directly after it, until the run acts on it.

    Attributes:
        patience: number of bad steps from which it is too long.
        first: its first step; 0 if the last step was not skipped.
        last: its last step.
        bad: its steps that were judged bad.
    """

    patience: int
    first: int = 0
    last: int = 0
    bad: list[int] = field(default_factory=list)

    @property
    def too_long(self) -> bool:
        """Whether the run must act on it."""
        return len(self.bad) >= self.patience

    def add(self, step: int, *, left_out: bool, planned: bool) -> None:
        """Add the next step."""
        if self.too_long and not (left_out and step == self.last + 1):
            return
        if not left_out:
            self.clear()
            return
        self.first, self.last = self.first or step, step
        if not planned:
            self.bad.append(step)

    def clear(self) -> None:
        """End the streak."""
        self.first = self.last = 0
        self.bad.clear()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return {"first": self.first, "last": self.last, "bad": list(self.bad)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what a checkpoint stored."""
        self.first, self.last, self.bad = int(state["first"]), int(state["last"]), [int(step) for step in state["bad"]]


@dataclass(frozen=True)
class Rollback:
    """A return to an earlier checkpoint.

    Attributes:
        from_step: the step at which it was decided.
        to_step: the step of the checkpoint.
        first_skipped: the first step that is skipped from then on.
        last_skipped: the last one.
    """

    from_step: int
    to_step: int
    first_skipped: int
    last_skipped: int

    def as_dict(self) -> dict[str, int]:
        """Return plain numbers for a file."""
        return asdict(self)


def roll_back(streak: Streak, *, from_step: int, to_step: int, margin: int) -> Rollback:
    """Return the rollback for a streak: skip it and up to ``margin`` steps before it, as far as they are replayed."""
    return Rollback(from_step, to_step, max(to_step + 1, streak.first - margin), streak.last)


def planned_steps(rollbacks: Iterable[Rollback]) -> set[int]:
    """Return all steps to skip."""
    return {step for each in rollbacks for step in range(each.first_skipped, each.last_skipped + 1)}


def merged(one: Sequence[Rollback], other: Iterable[Rollback]) -> list[Rollback]:
    """Return the rollbacks of two records of one run, without duplicates."""
    return [*one, *(each for each in other if each not in one)]


def targets(found: Sequence[Committed], *, first: int, margin: int) -> list[Committed]:
    """Return the checkpoints that a streak can be rolled back to, in order of preference.

    Those from before the margin come first, newest first; then those within the margin, oldest first.

    Args:
        found: the existing checkpoints, oldest first.
        first: the streak's first step.
        margin: number of steps before it that are suspect too.
    """
    before = [entry for entry in found if entry.global_step < first]
    clean = [entry for entry in before if entry.global_step < first - margin]
    return [*reversed(clean), *before[len(clean) :]]
