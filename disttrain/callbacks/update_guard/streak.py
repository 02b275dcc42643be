"""Which steps in a row were left out, and which batches a rollback leaves out for it. Pure, and small enough to save.

Steps are numbered from 1; a checkpoint of step 8 holds the updates of steps 1 to 8. A step is left out because it was
judged bad, or because an earlier rollback planned it. Planned ones do not count towards the limit, but a streak that
follows them begins with them: so its rollback goes back further than the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from disttrain.checkpoint.format.marker import Committed


@dataclass
class Streak:
    """The steps in a row without an update that a run has come to.

    Once it is too long it stays as it is, but for further bad steps right after it, until it is acted upon.

    Attributes:
        patience: bad steps from which on it is too long.
        first: its first step; 0 where the last step was updated.
        last: its last step.
        bad: its steps that were judged bad.
    """

    patience: int
    first: int = 0
    last: int = 0
    bad: list[int] = field(default_factory=list)

    @property
    def too_long(self) -> bool:
        """Whether something is to be done about it."""
        return len(self.bad) >= self.patience

    def add(self, step: int, *, left_out: bool, planned: bool) -> None:
        """Take account of the next step."""
        if self.too_long and not (left_out and step == self.last + 1):
            return
        if not left_out:
            self.clear()
            return
        self.first, self.last = self.first or step, step
        if not planned:
            self.bad.append(step)

    def clear(self) -> None:
        """Forget it."""
        self.first = self.last = 0
        self.bad.clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {"first": self.first, "last": self.last, "bad": list(self.bad)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on with what a checkpoint stored."""
        self.first, self.last, self.bad = int(state["first"]), int(state["last"]), [int(step) for step in state["bad"]]


@dataclass(frozen=True)
class Rollback:
    """A return to a checkpoint.

    Attributes:
        from_step: the step at which it was decided.
        to_step: step of the checkpoint.
        first_skipped: the first step that is left out from then on.
        last_skipped: the last one.
    """

    from_step: int
    to_step: int
    first_skipped: int
    last_skipped: int

    def as_dict(self) -> dict[str, int]:
        """Plain numbers for a file."""
        return asdict(self)


def roll_back(streak: Streak, *, from_step: int, to_step: int, margin: int) -> Rollback:
    """The rollback for a streak: it leaves out the streak and, as far as they are replayed, ``margin`` steps before."""
    return Rollback(from_step, to_step, max(to_step + 1, streak.first - margin), streak.last)


def planned_steps(rollbacks: Iterable[Rollback]) -> set[int]:
    """All steps that are to be left out."""
    return {step for each in rollbacks for step in range(each.first_skipped, each.last_skipped + 1)}


def merged(one: Sequence[Rollback], other: Iterable[Rollback]) -> list[Rollback]:
    """The rollbacks of two records of one run, each once."""
    return [*one, *(each for each in other if each not in one)]


def targets(found: Sequence[Committed], *, first: int, margin: int) -> list[Committed]:
    """The checkpoints that a streak can be rolled back to, in the order of preference.

    Those from before the margin, the newest first; where there is none, those of the margin, the oldest first.

    Args:
        found: the checkpoints that there are, oldest first.
        first: the streak's first step.
        margin: steps before it that are suspect too.
    """
    before = [entry for entry in found if entry.global_step < first]
    clean = [entry for entry in before if entry.global_step < first - margin]
    return [*reversed(clean), *before[len(clean) :]]
