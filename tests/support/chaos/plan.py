"""Which faults a campaign injects, when and where: a pure function of its seed.

A campaign is one run that is brought down again and again. It is a list of attempts; each is what happens *between*
the attempt before and this one (a shard is gone, a checkpoint is damaged), faults that the attempt has to *survive*,
and the fault that *ends* it. Faults inside an attempt are :class:`Fault`: an act at an exact place of the code, on a
rank, at or after a step. Every attempt's step is at or after that of the one before, so each fault is met.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

STEPS: Final = 48  # two and a half epochs of 19 steps
EVERY: Final = 3  # a checkpoint
LAST_CALL: Final = STEPS - 4
"""A fault whose place did not come up until this step happens here, at the start of a micro batch."""

IN_SAVE: Final = ("staging", "writing", "meta", "renaming", "marking", "marked", "latest", "pruning", "pruned")
AT_START: Final = ("claiming", "clearing", "reading", "recording", "logging")
FAILING: Final = ("eio", "full", "read-only")
"""Acts that make a save fail."""
ON_ALL_RANKS: Final = ("step", "validation", "staging", "writing", "reading")
"""Places that every rank comes to; the others are rank 0's."""

Act = Literal[
    "kill", "kill-all", "kill-launcher", "terminate", "pause", "hang", "leave", "eio", "full", "read-only"
]  # fmt: skip
Between = Literal["shard", "truncate", "flip", "marker"]
"""A shard is gone for a start; the newest checkpoint's tensors are cut off or have a bit flipped, or its marker has."""


@dataclass(frozen=True)
class Layout:
    """Ranks and strategy."""

    ranks: int
    strategy: str

    def __str__(self) -> str:
        return f"{self.strategy} x{self.ranks}"


LAYOUTS: Final = tuple(Layout(ranks, strategy) for ranks in (1, 2, 4) for strategy in ("ddp", "fsdp"))


@dataclass(frozen=True)
class Fault:
    """An act at a place.

    Attributes:
        act: ``kill`` (SIGKILL to itself), ``kill-all`` (on every rank), ``kill-launcher`` (SIGKILL to the parent),
            ``terminate`` (SIGTERM to all ranks, each ``seconds`` later than the one before), ``pause`` (SIGSTOP, and
            SIGCONT after ``seconds``), ``hang`` (SIGSTOP for good), ``leave`` (SIGSTOP; woken once the next attempt
            has ended), ``eio`` (the call fails with EIO), ``full`` (the disk of checkpoints is full from here on) or
            ``read-only`` (that folder is).
        place: as :mod:`tests.support.chaos.trap` knows it.
        step: optimizer steps done before; in a save, its step; or later.
        rank: which rank.
        seconds: see the acts.
        survives: the attempt goes on after it.
    """

    act: Act
    place: str = "step"
    step: int = 0
    rank: int = 0
    seconds: float = 0.0
    survives: bool = False

    def __str__(self) -> str:
        act = f"{self.act} and go on" if self.survives and self.act != "pause" else self.act
        return f"{act}, {self.place}"

    @property
    def in_save(self) -> bool:
        """Whether its place is within a save."""
        return self.place in IN_SAVE

    @property
    def everywhere(self) -> bool:
        """Whether each rank does it."""
        return self.act in ("kill-all", "terminate")


@dataclass(frozen=True)
class Attempt:
    """One start of the run.

    Attributes:
        layout: what it runs on.
        between: what happens before it starts.
        faults: what happens in it; none but the last ends it. Empty: it goes on to the end.
    """

    layout: Layout
    between: tuple[Between, ...] = ()
    faults: tuple[Fault, ...] = ()


def deck(chance: random.Random, ranks: int, *, small_disk: bool = False, hangs: bool = False) -> list[Fault]:
    """One fault of each kind that ends an attempt, in a random order, without steps."""
    faults = [Fault("kill", place) for place in (*IN_SAVE, *AT_START, "step", "validation")]
    faults += [
        Fault("kill-all"),
        Fault("terminate", "step", seconds=0.4),
        Fault("terminate", "writing", seconds=0.4),
        Fault("leave", chance.choice(("renaming", "marking", "latest", "pruning"))),
        Fault("eio", chance.choice(("writing", "syncing"))),
    ]
    if hangs and ranks > 1:
        faults.append(Fault("hang"))
    if small_disk:
        faults += [Fault("full", "writing"), Fault("read-only", "saving")]
    chance.shuffle(faults)
    return faults


def in_save(chance: random.Random) -> list[Fault]:
    """A kill at each place of a save, in a random order, without steps."""
    return [Fault("kill", place) for place in chance.sample(IN_SAVE, len(IN_SAVE))]


def schedule(
    seed: int,
    layouts: Sequence[Layout],
    *,
    attempts: int,
    small_disk: bool = False,
    hangs: bool = False,
) -> list[Attempt]:
    """The attempts of a campaign; the last but one is killed after its last step, the last one goes on to the end.

    Args:
        seed: the same seed and arguments give the same schedule.
        layouts: of these each attempt takes one.
        attempts: how many are brought down before their last step.
        small_disk: whether the checkpoints are on a disk that can be filled and made read-only.
        hangs: whether ranks may be stopped for good.
    """
    chance = random.Random(f"{seed} {[str(layout) for layout in layouts]}")
    where = [chance.choice(layouts) for _ in range(attempts + 1)]
    ends: list[Fault] = []
    while len(ends) < attempts:
        ranks = min(layout.ranks for layout in layouts)
        ends += in_save(chance) if ends else deck(chance, ranks, small_disk=small_disk, hangs=hangs)
    ends = ends[:attempts]
    reading = next((n for n, end in enumerate(ends) if end.place == "reading"), attempts)
    if reading < attempts // 3:  # there may be nothing to read yet
        ends.append(ends.pop(reading))
    steps = sorted(chance.randrange(1, LAST_CALL - 2 * EVERY) for _ in range(attempts))
    # An attempt that survives a failed save runs with another setting than one that such a save ends.
    open_to = [n for n, end in enumerate(ends) if end.place not in AT_START and end.act not in FAILING]
    survived = _scattered(chance, ["pause", "eio", *(["full"] if small_disk else [])], open_to)
    between = _scattered(chance, ["shard", "truncate", "flip", "marker"], range(attempts // 3, attempts + 1))
    made = []
    for number, (end, step, layout) in enumerate(zip(ends, steps, where, strict=False)):
        acts = [_survived(chance, act) for act in survived.get(number, ())]
        faults = tuple(_placed(chance, fault, step, layout.ranks) for fault in (*acts, end))
        made.append(Attempt(layout, tuple(between.get(number, ())), faults))
    made.append(Attempt(where[-1], tuple(between.get(attempts, ())), (Fault("kill", "ending", STEPS),)))
    return [*made, Attempt(where[0])]


def _survived(chance: random.Random, act: Any) -> Fault:
    if act == "pause":
        return Fault("pause", chance.choice(("step", "writing", "marking")), seconds=1.0, survives=True)
    return Fault(act, "writing" if act == "full" else chance.choice(("writing", "syncing")), survives=True)


def _placed(chance: random.Random, fault: Fault, step: int, ranks: int) -> Fault:
    rank = chance.randrange(ranks) if fault.place in ON_ALL_RANKS else 0
    # Rank 0 alone has a process that goes on without the others' help, which is what has to be fenced off.
    return Fault(**{**asdict(fault), "step": step, "rank": 0 if fault.act == "leave" else rank})


def _scattered(chance: random.Random, kinds: Sequence[Any], where: Sequence[int]) -> dict[int, list[Any]]:
    """Each kind once in ten attempts, and at least once, at random ones of those."""
    found: dict[int, list[Any]] = {}
    for kind in kinds:
        for _ in range(max(1, len(where) // 10) if where else 0):
            found.setdefault(chance.choice(where), []).append(kind)
    return {number: sorted(kinds) for number, kinds in found.items()}
