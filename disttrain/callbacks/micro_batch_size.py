"""``data.micro_batch_size: auto``: the largest micro batch that fits into the memory of every rank.

Training begins with all samples that a rank takes of a global batch. A rank that runs out of memory writes down where
and with which size, in ``<run_dir>/memory``, and the attempt ends. The next attempt takes the largest size of at most
half the samples that divides a rank's share, and resumes from the last checkpoint, or starts over where there is none:
to the bit, it is a run that was started from there with the smaller size. One rank alone starts the next attempt in its
own process, for which it saves a checkpoint before the first step. Of several, the one that has failed ends with exit
code 77, and the others by the lost connection, since they may wait for it in any collective; their launcher starts them
again, or a person does.

The size goes into checkpoints too, so that a run that is resumed elsewhere begins with it, and into ``run.json``. A
resume with another size than before is told where the gradient may depend on it, since the module is no ``Task``. Cost:
a checkpoint before the first step on one rank; nothing in a step.
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
    """Where a rank ran out of memory.

    Attributes:
        rank: which one.
        step: optimizer steps done before.
        phase: in what, in words.
        size: samples of the micro batch.
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
    """Chooses the micro batch size of an attempt, and ends one in which memory did not suffice for it.

    Args:
        record: the run's record.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._shortages: list[Shortage] = []  # of the attempts before; rank 0's
        self._phase = ""  # of the training under way; empty before it has begun

    def choose(self, trainer: pl.Trainer, checkpoint: str | Path | None) -> None:
        """Limit the size to what has not failed in this run, before the data are set up. A collective.

        Args:
            trainer: its data module is attached, and its ranks have met.
            checkpoint: what is loaded next; its run may have found a size elsewhere.
        """
        self._phase, data = "", sharded_data(trainer)
        if data is None or not data.finds_micro_batch_size:
            return
        limits: list[int] = []
        with raise_together():
            if trainer.is_global_zero:
                self._shortages = read_shortages(self._record.run_dir / FOLDER)
                limits = [max(1, shortage.size // 2) for shortage in self._shortages]
                with suppress(CheckpointError):  # whoever loads it says what is wrong
                    saved = read_meta(Path(checkpoint))["trainer"] if checkpoint else {}
                    limits += [int(saved.get(type(data).__qualname__, {}).get("micro_batch_size", 0))]
        limits = [limit for limit in trainer.strategy.broadcast(limits) if limit]
        if limits:
            data.limit_micro_batch_size(min(limits))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have one rank alone save what it starts from: nothing else in its process is as it was then.

        Raises:
            ConfigError: a smaller micro batch would be another step to the module.
        """
        data, checkpoints = sharded_data(trainer), self._record.checkpoints
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
        """Warn of another micro batch size where the gradient may depend on it."""
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
        """Record the size, and the shortages that led to it."""
        data = sharded_data(trainer)
        if data is None or not data.finds_micro_batch_size:
            return
        self._phase = "start of training"
        if not trainer.is_global_zero:
            return
        known = {event.get("text") for event in self._record.record.get("events", [])}
        for shortage in self._shortages:
            # Later ones may have taken it further down since.
            told = f"{shortage}; the next attempt takes at most {max(1, shortage.size // 2)}"
            if told not in known:
                tell(told)
                self._record.event(trainer.global_step, "memory", told)
        self._record.note_micro_batch_size(data.micro_batch_size)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A forward pass follows."""
        self._enter("forward pass")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """A backward pass follows."""
        self._enter("backward pass")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Clipping and an optimizer's step follow."""
        self._enter("optimizer step")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs, saves and the next batch follow."""
        self._enter("time between two micro batches")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Micro batches of an evaluation follow."""
        self._enter("validation")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say what an evaluation wants that no training tries again with a smaller size."""
        data = sharded_data(trainer)
        evaluates = not self._phase and (trainer.evaluating or trainer.predicting)
        if data is not None and data.finds_micro_batch_size and evaluates and is_out_of_memory(exception):
            tell(
                f"rank {trainer.global_rank} ran out of memory in an evaluation, whose micro batches have"
                f" {data.evaluation_batch_size} samples\n  hint: set data.micro_batch_size to a smaller number"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What follows has no micro batches."""
        self._phase = ""

    def next_attempt(self, trainer: pl.Trainer, error: Exception) -> AttemptOver | None:
        """What follows an error in training: another attempt, or None where memory is not what it lacked.

        Args:
            trainer: it trains; this rank alone may have failed.
            error: what its loops have raised.

        Raises:
            OutOfMemoryError: the ranks have to be started again.
            DisttrainError: no size is left to try.
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
        """What ends this rank, and says who starts the run again."""
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
    """What the ranks of a run have written down, by rank. What cannot be read is passed over."""
    return sorted(_read(folder), key=lambda shortage: (shortage.rank, -shortage.size))


def _read(folder: Path) -> Iterator[Shortage]:
    for path in folder.glob("rank-*.json"):
        with suppress(OSError, ValueError, TypeError):
            yield Shortage(**read_record(path))


def _write(folder: Path, shortage: Shortage) -> None:
    """Write down a shortage, each in a file of its own."""
    make_folder(folder)
    write_atomically(folder / f"rank-{shortage.rank:05d}-size-{shortage.size}.json", to_json(asdict(shortage)) + "\n")


def _restarts_left() -> bool:
    """Whether torchrun starts ranks again that fail now."""
    done, most = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return done.isdigit() and most.isdigit() and int(done) < int(most)
