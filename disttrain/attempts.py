"""The end of an attempt that the next one follows in the same process.

A run is a series of attempts. Most end with their process, and a launcher or a person starts the next one. Where all
ranks are healthy, :meth:`disttrain.trainer.Trainer.fit` starts it itself: a callback raises :class:`AttemptOver` on all
ranks, Lightning's set-up is torn down as after any fit, and the next attempt is set up from the checkpoint named, by
the same code as a resume in a new process. No cost otherwise.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerStatus


class AttemptOver(Exception):  # noqa: N818 - not a failure: the next attempt follows
    """Ends an attempt on all ranks; the next one starts from a checkpoint.

    Args:
        checkpoint: what it resumes from.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"the next attempt resumes from {checkpoint}")
        self.checkpoint = checkpoint


def finish(trainer: pl.Trainer) -> None:
    """End a fit in the midst of it, in the order in which Lightning ends one that is done. A collective.

    Lightning's own way out of an exception calls ``on_exception`` and marks the loggers' runs as failed; this one has
    not failed.
    """
    trainer._teardown()
    call._call_teardown_hook(trainer)
    trainer.state.status, trainer.state.stage = TrainerStatus.FINISHED, None
