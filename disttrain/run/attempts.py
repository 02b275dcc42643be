"""The end of an attempt that the next one follows in the same process.

A run is a series of attempts. Most end with their process, and a launcher or a person starts the next one. Where all
ranks are healthy, :meth:`disttrain.trainer.Trainer.fit` starts it itself: a callback raises :class:`AttemptOver` on all
ranks, or one rank alone has run out of memory; Lightning's set-up is torn down as after any fit, and the next attempt
is set up from the checkpoint named, by the same code as a resume in a new process. No cost otherwise.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from disttrain.parallel.model.fsdp_internals import abandon_pass


class AttemptOver(Exception):  # noqa: N818 - not a failure: the next attempt follows
    """Ends an attempt on all ranks; the next one starts from a checkpoint.

    Args:
        checkpoint: what it resumes from.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"the next attempt resumes from {checkpoint}")
        self.checkpoint = checkpoint


Modes = Sequence[tuple[nn.Module, bool]]
"""Modules, and whether each is in training mode."""


def modes_of(module: nn.Module) -> Modes:
    """The mode of a module and of all in it, for :func:`put_right`."""
    return [(inner, inner.training) for inner in module.modules()]


def put_right(module: nn.Module, modes: Modes) -> None:
    """Free what a pass has left that an exception has broken off, and let a module begin another one.

    Args:
        module: which was trained.
        modes: those before; a validation that was broken off leaves all in evaluation mode.
    """
    gc.collect()  # the frames are parts of cycles, and hold activations
    abandon_pass(module)
    for inner, training in modes:
        inner.training = training


def free_frames(error: BaseException) -> None:
    """Free what the frames hold that an error, and those that it was raised from, have passed through."""
    one: BaseException | None = error
    while one is not None:
        traceback.clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__
