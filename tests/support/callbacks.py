"""Callbacks that tests add to real runs."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from disttrain.checkpoint import checksum, staging, store, write


class KillAt(Callback):
    """Kills its own process, without any chance to clean up, at the start of a micro batch.

    Args:
        step: optimizer steps done before.
        micro_batch: micro batch of the step that follows.
    """

    def __init__(self, step: int, micro_batch: int = 0) -> None:
        self.step, self.micro_batch = step, micro_batch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Die here."""
        if trainer.global_step == self.step and batch_idx % trainer.accumulate_grad_batches == self.micro_batch:
            os.kill(os.getpid(), signal.SIGKILL)


class KillInSave(Callback):
    """Kills its own process inside a save, in the thread that saves.

    Args:
        place: ``staging``, ``writing``, ``renaming``, ``marking``, ``latest`` or ``pruning``: before that is done.
        step: optimizer steps done when the save begins, or more.
        rank: which rank, where several come to that place.
    """

    PLACES: ClassVar[dict[str, tuple[Any, str]]] = {
        "staging": (staging.Stage, "_buffer"),
        "writing": (checksum.SummedFile, "write"),
        "renaming": (write, "open_directory"),
        "marking": (write, "write_marker"),
        "latest": (write, "write_synced"),
        "pruning": (store, "remove"),
    }

    def __init__(self, place: str, step: int, rank: int = 0) -> None:
        self.place, self.step, self.rank = place, step, rank

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay the trap."""
        if trainer.global_rank != self.rank:
            return
        owner, name = self.PLACES[self.place]
        known: Callable[..., Any] = getattr(owner, name)

        def trapped(*arguments: Any, **more: Any) -> Any:
            if trainer.global_step >= self.step:
                os.kill(os.getpid(), signal.SIGKILL)
            return known(*arguments, **more)

        setattr(owner, name, trapped)


class StopAt(Callback):
    """Stops its own process at the start of a step, as a debugger or a suspended machine would, until it is woken.

    Args:
        step: optimizer steps done before.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sleep here."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGSTOP)
            self.step = -1


class FailInSave(Callback):
    """Has the disk quota of one rank used up for the save that begins at a step.

    Args:
        step: optimizer steps done when that save begins.
        rank: which rank.
    """

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay the trap."""
        if trainer.global_rank != self.rank:
            return
        known = write.dcp_save

        def failing(tensors: Any, *arguments: Any, storage_writer: Any, **more: Any) -> Any:
            if f"step-{self.step:08d}" not in str(storage_writer.path):
                return known(tensors, *arguments, storage_writer=storage_writer, **more)
            checksum.SummedFile.write = _over_quota  # type: ignore[method-assign]
            try:
                return known(tensors, *arguments, storage_writer=storage_writer, **more)
            finally:
                checksum.SummedFile.write = _written  # type: ignore[method-assign]

        write.dcp_save = failing


_written = checksum.SummedFile.write


def _over_quota(self: checksum.SummedFile, data: Any, /) -> int:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
