"""When a checkpoint is due: by the clock with few questions, by epochs, at steps that are kept for good."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from disttrain.callbacks.checkpointing.schedule import SaveTimes
from disttrain.errors import ConfigError


class Loop:
    """As much of a trainer as the decision looks at: steps of an epoch of ten, and rank 0's word."""

    def __init__(self) -> None:
        self.global_step = 0
        self.strategy = SimpleNamespace(broadcast=lambda value: value)
        self.fit_loop = SimpleNamespace(epoch_loop=self, epoch_progress=self)
        self.batch_progress, self.num_training_batches, self.is_last_batch = self, 10, False

    @property
    def current(self) -> Any:
        return SimpleNamespace(processed=(self.global_step - 1) // 10, ready=(self.global_step - 1) % 10 + 1)


def due_steps(times: SaveTimes, steps: int) -> list[int]:
    loop: Any = Loop()
    times.begin(0)
    found = []
    for step in range(1, steps + 1):
        loop.global_step = step
        if times.due(loop):
            assert times.due(loop), "asked twice at one step, it says something else"
            found.append(step)
            times.saved()
    return found


@pytest.mark.parametrize("step_seconds", [0.01, 1.0, 45.0])
def test_minutes_take_few_questions(step_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    times, loop, saves = SaveTimes(every_minutes=10), Loop(), []
    times.begin(0)
    steps = round(7200 / step_seconds)
    for step in range(1, steps + 1):
        loop.global_step, now[0] = step, now[0] + step_seconds
        if times.due(loop):  # type: ignore[arg-type]
            saves.append(now[0])
            times.saved()
    gaps = [b - a for a, b in zip([0.0, *saves], saves, strict=False)]
    assert all(600 <= gap <= 600 + 1.01 * step_seconds for gap in gaps), f"minutes apart: {gaps}"
    assert len(saves) in (11, 12)
    # Half of what is left at a time: some log2(600 s / a step) questions an interval.
    assert times.questions <= 12 * 20, f"{times.questions} broadcasts in {steps} steps"


def test_epochs_and_steps_that_are_kept() -> None:
    assert due_steps(SaveTimes(), 30) == [10, 20, 30]
    assert due_steps(SaveTimes(every_epochs=2), 45) == [20, 40]
    assert due_steps(SaveTimes(every_steps=7), 30) == [7, 14, 21, 28]
    assert due_steps(SaveTimes(every_steps=7, every_epochs=2), 30) == [7, 14, 20, 21, 28]
    assert due_steps(SaveTimes(every_steps=7, keep_every_steps=15), 30) == [7, 14, 15, 21, 28, 30]


@pytest.mark.parametrize(
    "setting", [{"every_steps": 0}, {"every_epochs": 0}, {"every_minutes": 0.0}, {"keep_every_steps": -1}]
)
def test_intervals_that_cannot_be_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"checkpoint\.{next(iter(setting))} is"):
        SaveTimes(**setting)
