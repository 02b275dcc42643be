"""The end of an attempt that the next one follows in the same process.

A run is a series of attempts. Most end with their process, and a launcher or a person starts the next one. Where all
ranks are healthy, :meth:`disttrain.trainer.Trainer.fit` starts it itself: a callback raises :class:`AttemptOver` on all
ranks, Lightning's set-up is torn down as after any fit, and the next attempt is set up from the checkpoint named, by
the same code as a resume in a new process. No cost otherwise.
"""

from __future__ import annotations

from pathlib import Path


class AttemptOver(Exception):  # noqa: N818 - not a failure: the next attempt follows
    """Ends an attempt on all ranks; the next one starts from a checkpoint.

    Args:
        checkpoint: what it resumes from.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"the next attempt resumes from {checkpoint}")
        self.checkpoint = checkpoint
