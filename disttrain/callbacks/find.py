"""Looking up a callback of a trainer by its class."""

from __future__ import annotations

from typing import TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

T = TypeVar("T", bound=Callback)


def find_callback(trainer: pl.Trainer, kind: type[T]) -> T | None:
    """The trainer's first callback of that class, or None."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
