"""``data.micro_batch_size: auto``: find the largest micro batch that fits into the memory of every rank.

Training starts with a rank's whole share of a global batch as one micro batch. A rank that runs out of memory records
where and at which size in ``<run_dir>/memory``, and the attempt ends. The next attempt uses the largest size that
divides a rank's share and is at most half the failed one, and resumes from the last checkpoint, or starts over if there
is none; the result is bit-identical to a run started from there with the smaller size. A single rank starts the next
attempt in its own process, for which it saves a checkpoint before the first step. With several ranks, the one that
failed exits with code 77 and the others end with a lost connection, since they may be waiting for it in any collective;
then their launcher, or the user, restarts them.

The size is also stored in ``run.json`` and in checkpoints, so that a run resumed elsewhere starts with it. If a resume
uses another size and the module is not a ``Task``, a warning says that the gradient may depend on it. Cost: one
checkpoint before the first step on a single rank; nothing per step.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from disttrain.callbacks.records.run_record import RunRecord
from disttrain.checkpoint.format.reader import read_meta
from disttrain.data.module import MICRO_BATCHES_OF, sharded_data
from disttrain.distributed.exit_codes import VARIABLE, note_ending
from disttrain.distributed.synchronize_errors import raise_together
from disttrain.errors import CheckpointError, ConfigError, DisttrainError, OutOfMemoryError
from disttrain.parallel.memory_errors import is_out_of_memory
from disttrain.parallel.model.fsdp_internals import can_abandon_pass
from disttrain.parallel.model.trained_parameters import class_name
from disttrain.run.attempts import AttemptOver
from disttrain.slurm.requeue import have_script_requeue, is_to_be_requeued
from disttrain.system.files import make_folder, to_json, write_atomically
from disttrain.system.reading import read_record
from disttrain.system.terminal import tell
from disttrain.tasks.base import Task

FOLDER: Final = "memory"
_SMALLER: Final = (
    "use parallel.strategy: fsdp and more ranks, parallel.activation_checkpointing: blocks, a narrower precision, or a"
    " smaller model"
)


@dataclass(frozen=True)
class Shortage:
    """An out-of-memory error of one rank.

    Attributes:
        rank: the rank.
        step: optimizer steps done before.
        phase: what the rank was doing, in words.
        size: samples in the micro batch.
    """

    rank: int
    step: int
    phase: str
    size: int

    def __str__(self) -> str:
        return (
            f"step {self.step}: out of memory on rank {self.rank} in the {self.phase} with micro_batch_size {self.size}"
        )


class MicroBatchSearch(Callback):
    """Chooses the micro batch size of an attempt, and ends the attempt if it does not fit into memory.

    Args:
        record: the run's record.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._shortages: list[Shortage] = []  # of earlier attempts; on rank 0 only
        self._phase = ""  # of training; empty before it starts and after it ends

    def choose(self, trainer: pl.Trainer, checkpoint: str | Path | None) -> None:
        """Limit the size to what has not failed in this run, before the data are set up. Collective.

        Args:
            trainer: its data module is attached and its process group exists.
            checkpoint: the checkpoint that is loaded next; its run may have found a size elsewhere.
        """
        self._phase, data = "", sharded_data(trainer)
        if data is None or not data.finds_micro_batch_size:
            return
        limits: list[int] = []
        with raise_together():
            if trainer.is_global_zero:
                self._shortages = read_shortages(self._record.run_dir / FOLDER)
                limits = [max(1, shortage.size // 2) for shortage in self._shortages]
                with suppress(CheckpointError):  # reported when it is loaded
                    saved = read_meta(Path(checkpoint))["trainer"] if checkpoint else {}
                    limits += [int(saved.get(type(data).__qualname__, {}).get("micro_batch_size", 0))]
        limits = [limit for limit in trainer.strategy.broadcast(limits) if limit]
        if limits:
            data.limit_micro_batch_size(min(limits))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let a single rank save its initial state, which its process could not rebuild for another attempt.

        Raises:
            ConfigError: the module uses manual optimization, so a smaller micro batch would change its steps.
        """
        data, checkpoints = sharded_data(trainer), self._record.checkpoints
        if checkpoints is not None:
            checkpoints.saves_start = False
        if stage != "fit" or data is None or not data.finds_micro_batch_size:
            return
        if not pl_module.automatic_optimization:
            raise ConfigError(
                f"data.micro_batch_size is auto, and {class_name(pl_module)} steps its optimizers by itself",
                hint="leave automatic_optimization on, or set data.micro_batch_size to a number",
            )
        if checkpoints is not None:
            checkpoints.saves_start = trainer.world_size == 1 and data.micro_batch_size > 1

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Warn if the micro batch size changed and the gradient may depend on it."""
        data = sharded_data(trainer)
        if data is None or isinstance(pl_module, Task) or trainer.state.fn != TrainerFn.FITTING:
            return
        saved = checkpoint.get(type(data).__qualname__, {})
        before = saved.get(MICRO_BATCHES_OF, saved.get("micro_batch_size"))
        if before not in (None, data.micro_batch_size) and trainer.is_global_zero:
            warnings.warn(
                f"data.micro_batch_size was {before} and is {data.micro_batch_size}: {class_name(pl_module)} is no"
                " disttrain.Task, so a loss that it averages over unequal weights has another gradient from here on",
                stacklevel=2,
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the size and the shortages that led to it."""
        data = sharded_data(trainer)
        if data is None or not data.finds_micro_batch_size:
            return
        self._phase = "start of training"
        if not trainer.is_global_zero:
            return
        known = {event.get("text") for event in self._record.record.get("events", [])}
        for shortage in self._shortages:
            # "at most": later shortages may have reduced it further.
            told = f"{shortage}; the next attempt takes at most {max(1, shortage.size // 2)}"
            if told not in known:
                tell(told)
                self._record.event(trainer.global_step, "memory", told)
        self._record.note_micro_batch_size(data.micro_batch_size)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Enter the forward pass."""
        self._enter("forward pass")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Enter the backward pass."""
        self._enter("backward pass")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Enter the optimizer step, including clipping."""
        self._enter("optimizer step")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Enter the time between micro batches: logging, saving and loading the next batch."""
        self._enter("time between two micro batches")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter a validation, whose micro batches have another size."""
        self._enter("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave a validation: what follows has the size of training."""
        self._enter("time between two micro batches")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Print a hint after an out-of-memory error in an evaluation outside training, which is not retried."""
        data = sharded_data(trainer)
        evaluates = not self._phase and (trainer.evaluating or trainer.predicting)
        if data is not None and data.finds_micro_batch_size and evaluates and is_out_of_memory(exception):
            tell(
                f"rank {trainer.global_rank} ran out of memory in an evaluation, whose micro batches have"
                f" {data.evaluation_batch_size} samples\n  hint: set data.micro_batch_size to a smaller number"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave training: what follows has no micro batches."""
        self._phase = ""

    def next_attempt(self, trainer: pl.Trainer, error: Exception) -> AttemptOver | None:
        """Return the attempt that follows an error in training, or None if the error was not a lack of memory.

        Args:
            trainer: the trainer, still in training; only this rank may have failed.
            error: the exception raised by its loops.

        Raises:
            OutOfMemoryError: the ranks have to be restarted.
            DisttrainError: no smaller size is left to try.
        """
        data = sharded_data(trainer)
        if not self._phase or data is None or not is_out_of_memory(error):
            return None
        size = data.evaluation_batch_size if self._phase == "validation" else data.micro_batch_size
        shortage = Shortage(trainer.global_rank, trainer.global_step, self._phase, size)
        if size == 1:
            raise DisttrainError(str(shortage), hint=_SMALLER) from error
        _write(self._record.run_dir / FOLDER, shortage)
        checkpoints = self._record.checkpoints
        if trainer.world_size == 1 and checkpoints is not None and can_abandon_pass(trainer.lightning_module):
            checkpoints.settle(trainer)
            if target := checkpoints.newest or trainer.ckpt_path:
                return AttemptOver(Path(target))
        raise self._restart(shortage) from error

    def _restart(self, shortage: Shortage) -> OutOfMemoryError:
        """Return the error that ends this rank and says how the run is restarted."""
        note_ending(OutOfMemoryError.exit_code, message=str(shortage))
        if is_to_be_requeued():
            return OutOfMemoryError(f"{shortage}; {have_script_requeue(self._record.run_dir)}")
        if VARIABLE in os.environ or _restarts_left():
            return OutOfMemoryError(f"{shortage}; the launcher starts all ranks again, with at most half of that")
        flag = " with --resume auto" if self._record.start.resume != "auto" else ""
        return OutOfMemoryError(
            str(shortage),
            hint=f"start the same command again{flag}: it takes at most half of that by itself, and resumes from the"
            " last checkpoint if there is one; `disttrain launch` and `torchrun --max-restarts 9` do so by themselves",
        )

    def _enter(self, phase: str) -> None:
        if self._phase:
            self._phase = phase


def read_shortages(folder: Path) -> list[Shortage]:
    """Return the shortages that the ranks of a run have recorded, by rank; unreadable files are skipped."""
    return sorted(_read(folder), key=lambda shortage: (shortage.rank, -shortage.size))


def _read(folder: Path) -> Iterator[Shortage]:
    for path in folder.glob("rank-*.json"):
        with suppress(OSError, ValueError, TypeError):
            yield Shortage(**read_record(path))


def _write(folder: Path, shortage: Shortage) -> None:
    """Record a shortage in its own file."""
    make_folder(folder)
    write_atomically(folder / f"rank-{shortage.rank:05d}-size-{shortage.size}.json", to_json(asdict(shortage)) + "\n")


def _restarts_left() -> bool:
    """Return whether torchrun will restart failing ranks."""
    done, most = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return done.isdigit() and most.isdigit() and int(done) < int(most)
