"""When a checkpoint is due: by steps, by epochs, by minutes.

Steps and epochs are the same on every rank. Minutes are measured by rank 0's clock, which is queried only at steps that
all ranks agree on: each answer includes the step of the next query, half of the remaining time ahead. So an interval of
any length costs a handful of broadcasts, and any other step costs a comparison.
"""

from __future__ import annotations

import time

import lightning.pytorch as pl

from disttrain.errors import ConfigError
from disttrain.lightning.internals import ends_epoch
from disttrain.lightning.position import epochs_done


class SaveTimes:
    """The steps at which a checkpoint is due.

    Args:
        every_steps: steps between two.
        every_epochs: epochs between two; by default 1 if neither steps nor minutes are given.
        every_minutes: minutes between two.
        keep_every_steps: steps between checkpoints that are kept permanently, which are due as well.
    """

    def __init__(
        self,
        *,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        every_minutes: float | None = None,
        keep_every_steps: int | None = None,
    ) -> None:
        for name, value in (("every_steps", every_steps), ("every_epochs", every_epochs)):
            if value is not None and value < 1:
                raise ConfigError(f"checkpoint.{name} is {value}", hint="use at least 1, or null for every epoch")
        if keep_every_steps is not None and keep_every_steps < 1:
            raise ConfigError(f"checkpoint.keep_every_steps is {keep_every_steps}", hint="use at least 1, or null")
        if every_minutes is not None and not every_minutes > 0:
            raise ConfigError(f"checkpoint.every_minutes is {every_minutes}", hint="use more than 0, or null")
        if every_steps is None and every_minutes is None and every_epochs is None:
            every_epochs = 1
        self.every_steps, self.every_epochs, self.every_minutes = every_steps, every_epochs, every_minutes
        self.keep_every_steps = keep_every_steps
        self._last_save = self._last_ask = time.monotonic()
        self._last_ask_step = self._next_ask_step = -1
        self._answer = (-1, False)  # (step, whether a checkpoint is due by the clock)
        self.questions = 0
        """How often rank 0's clock was queried, with one broadcast each."""

    def begin(self, step: int) -> None:
        """Start counting when training starts or resumes at a step."""
        self._last_save = self._last_ask = time.monotonic()
        self._last_ask_step, self._next_ask_step = step, step + 1

    def saved(self) -> None:
        """Restart the minute clock after a checkpoint."""
        self._last_save = time.monotonic()

    def due(self, trainer: pl.Trainer) -> bool:
        """Return whether a checkpoint is due at this step boundary, the same on all ranks. Collective."""
        step = trainer.global_step
        due = any(every is not None and step % every == 0 for every in (self.every_steps, self.keep_every_steps))
        if self.every_epochs is not None and ends_epoch(trainer):
            due = due or (epochs_done(trainer) + 1) % self.every_epochs == 0
        return self._due_by_clock(trainer) or due

    def _due_by_clock(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        if self.every_minutes is None or step < self._next_ask_step:
            return self._answer == (step, True)
        now = time.monotonic()
        left = self.every_minutes * 60 - (now - self._last_save)
        step_seconds = max(1e-6, (now - self._last_ask) / max(1, step - self._last_ask_step))
        ahead = left if left > 0 else self.every_minutes * 60
        due, steps = trainer.strategy.broadcast((left <= 0, max(1, int(ahead / 2 / step_seconds))))
        self.questions += 1
        self._last_ask, self._last_ask_step, self._next_ask_step = now, step, step + steps
        self._answer = (step, due)
        return bool(due)
