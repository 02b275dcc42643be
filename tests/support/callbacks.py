"""Callbacks that tests add to real runs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from disttrain.callbacks.update_guard import callback
from disttrain.checkpoint import cleanup
from disttrain.checkpoint.format import checksum, writer
from disttrain.checkpoint.remote.copies import Mirror
from disttrain.checkpoint.saving import staging
from disttrain.tasks.base import Task


class KillAt(Callback):
    """Kills its own process, without any chance to clean up, at the start of a micro batch.

    Args:
        step: optimizer steps done before.
        micro_batch: micro batch of the step that follows.
        rank: which rank dies; all by default, at the moment at which the first of them comes there, since a rank
            that outlives another by a moment would end by itself, of the lost connection.
        once: only in the first attempt that comes there.
    """

    def __init__(self, step: int, micro_batch: int = 0, *, rank: int | None = None, once: bool = False) -> None:
        self.step, self.micro_batch, self.rank, self.once = step, micro_batch, rank, once

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Die here."""
        if self.rank not in (None, trainer.global_rank):
            return
        if trainer.global_step == self.step and batch_idx % trainer.accumulate_grad_batches == self.micro_batch:
            marker = Path(trainer.default_root_dir) / f"killed-{trainer.global_rank}"
            if self.once and marker.exists():
                return
            marker.touch()
            if self.rank is None and trainer.world_size > 1:
                for process in _siblings():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def _siblings() -> list[int]:
    """The other ranks: the processes that the one which started this one has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if int(parent) == os.getppid() and state != "Z" and int(stat.parent.name) != os.getpid():
            found.append(int(stat.parent.name))
    return found


class SignalAt(Callback):
    """Sends a signal to its own process at a place of a run.

    Args:
        phase: ``setup``, ``sanity``, ``start`` (of training), ``train`` (a micro batch), ``validation`` (a batch),
            ``save`` or ``end`` (of training).
        signal: name of the signal, such as ``SIGTERM``.
        step: optimizer steps done before, where the phase has any.
        ranks: which ranks get it; all by default.
        skew: seconds that each rank is later than the one before it.
    """

    def __init__(
        self, phase: str, *, signal: str = "SIGTERM", step: int = 0, ranks: list[int] | None = None, skew: float = 0
    ) -> None:
        self.phase, self.number, self.step, self.ranks, self.skew = phase, signal, step, ranks, skew
        self.done = False

    def _at(self, trainer: pl.Trainer, phase: str) -> None:
        if self.done or phase != self.phase or trainer.global_step != self.step:
            return
        self.done = True
        if self.ranks is None or trainer.global_rank in self.ranks:
            time.sleep(self.skew * trainer.global_rank)
            os.kill(os.getpid(), signal.Signals[self.number])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """While training is set up."""
        if stage == "fit":
            self._at(trainer, "setup")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the first step."""
        self._at(trainer, "start")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """At a step's second micro batch, where there is one."""
        accumulation = trainer.accumulate_grad_batches
        if batch_idx % accumulation == min(1, accumulation - 1):
            self._at(trainer, "train")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """In the sanity check, or at the second batch of a validation."""
        if trainer.sanity_checking or batch_idx == 1:
            self._at(trainer, "sanity" if trainer.sanity_checking else "validation")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """While a checkpoint is made."""
        self._at(trainer, "save")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last step."""
        self._at(trainer, "end")


class Slowly(Callback):
    """Makes every micro batch take longer, so that something can happen in the middle of a short run.

    Args:
        seconds: how much longer.
        rank: on which rank; all by default.
    """

    def __init__(self, seconds: float, *, rank: int | None = None) -> None:
        self.seconds, self.rank = seconds, rank

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Wait."""
        if self.rank in (None, trainer.global_rank):
            time.sleep(self.seconds)


class HangAt(Callback):
    """Makes a rank hang before a step, in a run that has not hung yet.

    Args:
        step: optimizer steps done before.
        how: ``loop`` (user code that never ends), ``start`` (the same when training starts), ``collective`` (one that
            no other rank is in), ``stop`` (SIGSTOP) or ``lock`` (code of C that holds Python's lock).
        rank: which rank.
    """

    def __init__(self, step: int, how: str, *, rank: int = 1) -> None:
        self.step, self.how, self.rank = step, how, rank

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hang before the first batch."""
        while self.how == "start" and trainer.global_rank == self.rank:
            sum(range(1000))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hang here."""
        if trainer.global_step != self.step or trainer.global_rank != self.rank:
            return
        if (Path(trainer.default_root_dir) / "hangs").exists():
            return
        if self.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.how == "lock":
            ctypes.PyDLL(None).sem_wait(ctypes.create_string_buffer(64))  # a semaphore of 0: signals do not end it
        elif self.how == "collective":
            dist.barrier()
        while self.how == "loop":
            sum(range(1000))


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
        "renaming": (writer, "open_directory"),
        "marking": (writer, "write_marker"),
        "latest": (writer, "write_synced"),
        "pruning": (cleanup, "remove"),
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
            if self._is_due(trainer, arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return known(*arguments, **more)

        setattr(owner, name, trapped)

    def _is_due(self, trainer: pl.Trainer, arguments: tuple[Any, ...]) -> bool:
        return trainer.global_step >= self.step


class KillInCopy(KillInSave):
    """Kills its own process while a checkpoint is copied to remote storage.

    Args:
        place: ``uploading`` or ``committing``: before that is done.
        step: the first checkpoint that it is done to is of this step or a later one.
        rank: which rank.
    """

    PLACES: ClassVar[dict[str, tuple[Any, str]]] = {"uploading": (Mirror, "upload"), "committing": (Mirror, "commit")}

    def _is_due(self, trainer: pl.Trainer, arguments: tuple[Any, ...]) -> bool:
        return int(arguments[1][5:13]) >= self.step


class KillAtReplace(Callback):
    """Kills its own process when a file is about to be replaced by a new one that lies beside it.

    Args:
        name: of the file.
    """

    def __init__(self, name: str) -> None:
        known = os.replace

        def trapped(source: Any, target: Any, **more: Any) -> None:
            if Path(target).name == name:
                os.kill(os.getpid(), signal.SIGKILL)
            known(source, target, **more)

        os.replace = trapped


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
        known = writer.dcp_save

        def failing(tensors: Any, *arguments: Any, storage_writer: Any, **more: Any) -> Any:
            if f"step-{self.step:08d}" not in str(storage_writer.path):
                return known(tensors, *arguments, storage_writer=storage_writer, **more)
            checksum.SummedFile.write = _over_quota  # type: ignore[method-assign]
            try:
                return known(tensors, *arguments, storage_writer=storage_writer, **more)
            finally:
                checksum.SummedFile.write = _written  # type: ignore[method-assign]

        writer.dcp_save = failing


_written = checksum.SummedFile.write


def _over_quota(self: checksum.SummedFile, data: Any, /) -> int:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


class LeaveOut(Callback):
    """Leaves out the updates of some steps by itself, knowing nothing of the guard.

    Args:
        steps: which, counted from 1.
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Take the gradients away."""
        if trainer.global_step + 1 in self.steps:
            for parameter in pl_module.parameters():
                parameter.grad = None


class KillInRollback(Callback):
    """Kills its own process at a place of the first rollback.

    Args:
        place: ``deleted``, after the first later checkpoint was; ``before-record`` or ``recorded``, around the writing
            of the record, all on rank 0; ``restore``, before the state is loaded, or ``replay``, in a step after that,
            on all ranks.
        step: optimizer steps done before, for ``replay``.
    """

    def __init__(self, place: str, step: int = -1) -> None:
        self.place, self.step, self.rolled_back = place, step, False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the trap; or die here, when the attempt after the rollback is set up."""
        if stage != "fit":
            return
        self.rolled_back = (Path(trainer.default_root_dir) / callback.FOLDER / "rollbacks.json").exists()
        if self.rolled_back and self.place == "restore":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.place == "deleted":
            cleanup.remove = self._trap(cleanup.remove, before=False)
        elif self.place in ("before-record", "recorded"):
            callback.write_rollbacks = self._trap(callback.write_rollbacks, before=self.place == "before-record")

    def _trap(self, function: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
        def trapped(*arguments: Any) -> None:
            if not before:
                function(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        return trapped

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Or here."""
        if self.place == "replay" and self.rolled_back and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class SkewedNorm(Callback):
    """Has one rank see a much larger gradient norm than the others see, in one step.

    Args:
        step: which, counted from 1.
        rank: whose.
    """

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Get between the task and the guard."""
        if not isinstance(pl_module, Task) or pl_module.judge is None or trainer.global_rank != self.rank:
            return
        judge = pl_module.judge
        if trainer.global_step + 1 == self.step:
            pl_module.judge = lambda optimizer, loss, norm: judge(optimizer, loss, norm * 1e9)
        elif trainer.global_step == self.step:
            pl_module.judge = next(one for one in trainer.callbacks if isinstance(one, callback.UpdateGuard))._judge  # type: ignore[attr-defined]
