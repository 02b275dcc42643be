"""End an attempt such that the next one follows in the same process.

A run is a series of attempts. Most end with their process, and a launcher or the user starts the next one. If all ranks
are healthy, :meth:`disttrain.trainer.Trainer.fit` starts it itself: after a callback has raised :class:`AttemptOver` on
all ranks, or a run with a single rank has run out of memory. Lightning's set-up is torn down as after any fit, and the
next attempt is set up from the given checkpoint, by the same code as a resume in a new process. No cost otherwise.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from torchmetrics import Metric

from disttrain.parallel.model.fsdp_internals import abandon_pass


class AttemptOver(Exception):  # noqa: N818 - not a failure: the next attempt follows
    """Ends an attempt on all ranks; the next one resumes from a checkpoint.

    Args:
        checkpoint: the checkpoint to resume from.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"the next attempt resumes from {checkpoint}")
        self.checkpoint = checkpoint


Modes = Sequence[tuple[nn.Module, bool]]
"""Modules, and whether each is in training mode."""


def modes_of(module: nn.Module) -> Modes:
    """Return the training mode of a module and all its submodules, for :func:`put_right`."""
    return [(inner, inner.training) for inner in module.modules()]


def put_right(module: nn.Module, modes: Modes) -> None:
    """Clean up after a pass that an exception interrupted, so that the module can start another one.

    Args:
        module: the module that was trained.
        modes: its modes before; an interrupted validation leaves all modules in evaluation mode.
    """
    gc.collect()  # frames hold activations, and are part of reference cycles
    abandon_pass(module)
    for inner, training in modes:
        inner.training = training
        if isinstance(inner, Metric):  # a new process would not have what it has accumulated
            inner.reset()


def free_frames(error: BaseException) -> None:
    """Clear the local variables in the frames of an error, and of those that caused it, to free memory."""
    one: BaseException | None = error
    while one is not None:
        traceback.clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__
