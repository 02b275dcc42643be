"""``data.micro_batch_size: auto``: the largest micro batch that fits into the memory of every rank.

Training begins with all samples that a rank takes of a global batch. Where any rank runs out of memory, all ranks
throw the step away, take the largest size of at most half the samples that divides their share, and do the same step
again: samples, dropout, weights and statistics are those of a run that began with the smaller size. The size goes into
checkpoints, so that a resumed run begins with it, and into ``run.json``. A resume with another number than before is
told where the gradient may depend on it, since the module is no ``Task``.

A callback or module that keeps something of a micro batch may define ``on_step_thrown_away(trainer, pl_module)``.
Cost: see :mod:`disttrain.parallel.out_of_memory`; nothing where the size is a number.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from disttrain.callbacks.run_record import RunRecord
from disttrain.data.module import MICRO_BATCHES_OF, ShardedDataModule, sharded_data
from disttrain.errors import ConfigError, RankError
from disttrain.parallel.lockstep import DDPLockstep, FSDPLockstep
from disttrain.parallel.out_of_memory import OPTIMIZER, PHASES, MemoryGuard, StepThrownAway, is_out_of_memory
from disttrain.parallel.strategies import FSDP, strategy_of
from disttrain.parallel.trained import class_name
from disttrain.tasks.base import Task
from disttrain.terminal import tell


class MicroBatchSearch(Callback):
    """Goes down with the micro batch size where memory asks for it.

    Args:
        record: where to note it.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._guard: MemoryGuard | None = None
        self._data: ShardedDataModule | None = None
        self._copy: Any = None
        self._started = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Guard a training whose micro batch size is to be found. A collective there.

        Raises:
            ConfigError: a rank without memory could not keep step with the others.
        """
        data = sharded_data(trainer)
        if stage != "fit" or data is None or not data.finds_micro_batch_size:
            return
        _check(trainer, pl_module)
        assert isinstance(pl_module, Task)
        strategy = strategy_of(trainer)
        sharded = isinstance(strategy, FSDP)
        self._guard = strategy.memory_guard = MemoryGuard(
            pl_module,
            rank=trainer.global_rank,
            lockstep=FSDPLockstep(pl_module) if sharded else DDPLockstep(strategy, pl_module),
            skip=pl_module.skip_micro_batch,
            can_retry=sharded,
        )
        self._data, self._copy = data, data.transfer_batch_to_device
        data.transfer_batch_to_device = self._transfer(trainer)  # type: ignore[method-assign]
        loop: Any = trainer.fit_loop.epoch_loop
        if "advance" not in vars(loop):
            loop.advance = functools.partial(_advance, trainer, loop.advance)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Warn of another micro batch size where the gradient may depend on it."""
        data = sharded_data(trainer)
        if data is None or isinstance(pl_module, Task) or trainer.state.fn != TrainerFn.FITTING:
            return
        before = checkpoint.get(type(data).__qualname__, {}).get(MICRO_BATCHES_OF)
        if before not in (None, data.micro_batch_size) and trainer.is_global_zero:
            warnings.warn(
                f"data.micro_batch_size was {before} and is {data.micro_batch_size}: {class_name(pl_module)} is no"
                " disttrain.Task, so a loss that it averages over unequal weights has another gradient from here on",
                stacklevel=2,
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The module is wrapped by now."""
        if self._guard is not None:
            assert self._data is not None
            if not self._started:  # training may start once more, after a rollback
                self._guard.start()
                self._started = True
            if trainer.is_global_zero:
                self._record.note_micro_batch_size(self._data.micro_batch_size)

    def on_micro_batch_size(self, trainer: pl.Trainer, text: str) -> None:
        """Tell of a smaller size."""
        assert self._data is not None
        if trainer.is_global_zero:
            tell(text)
            self._record.event(trainer.global_step, "memory", text)
            self._record.note_micro_batch_size(self._data.micro_batch_size)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say what an evaluation wants, which cannot be done again with a smaller size."""
        data = sharded_data(trainer)
        if data is None or not data.finds_micro_batch_size or not is_out_of_memory(exception) or trainer.training:
            return
        tell(
            f"rank {trainer.global_rank} ran out of memory in an evaluation, whose micro batches have"
            f" {data.evaluation_batch_size} samples\n  mend: set data.micro_batch_size to a smaller number"
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Guard no more."""
        if self._guard is None or stage != "fit":
            return
        self._guard.close()
        self._started = False
        strategy_of(trainer).memory_guard = self._guard = None
        data: Any = self._data
        vars(data).pop("transfer_batch_to_device", None)
        loop: Any = trainer.fit_loop.epoch_loop
        vars(loop).pop("advance", None)

    def _transfer(self, trainer: pl.Trainer) -> Any:
        guard, copy = self._guard, self._copy
        assert guard is not None

        @functools.wraps(copy)
        def transfer_batch_to_device(batch: Any, device: Any, dataloader_idx: int) -> Any:
            def run() -> Any:
                return copy(batch, device, dataloader_idx)

            return guard.batch_to_device(run, batch) if trainer.training else run()

        return transfer_batch_to_device


def _advance(trainer: pl.Trainer, advance: Any, data_fetcher: Any) -> None:
    """One micro batch of the training loop, or the first one of a step that is done again."""
    while True:
        try:
            return advance(data_fetcher)  # type: ignore[no-any-return]
        except StepThrownAway as error:
            thrown = error.with_traceback(None)
        _go_down(trainer, thrown)
        _stand_at_step(trainer, data_fetcher)


def _go_down(trainer: pl.Trainer, thrown: StepThrownAway) -> None:
    """Undo the step, take a smaller size, and tell.

    Raises:
        RankError: there is none, or the step cannot be undone. On all ranks.
    """
    data, module, guard = sharded_data(trainer), trainer.lightning_module, strategy_of(trainer).memory_guard
    assert data is not None
    assert isinstance(module, Task)
    size, step = data.micro_batch_size, trainer.global_step
    what = (
        f"step {step}: out of memory on rank {thrown.rank} in the {PHASES[thrown.phase]} with micro_batch_size {size}"
    )
    if size == 1:
        raise RankError(
            what,
            mend="use parallel.strategy: fsdp and more ranks, parallel.activation_checkpointing: blocks, a narrower"
            " precision, or a smaller model",
        )
    if not guard.undo(thrown):
        assert thrown.phase == OPTIMIZER
        raise RankError(
            f"{what}, which had served before and on which that memory does not depend",
            mend="resume from the last checkpoint (--resume auto); if it happens again use parallel.strategy: fsdp and"
            " more ranks, or an optimizer with less state",
        )
    module.forget_step()
    module._current_fx_name = None  # Lightning resets it only where a hook returns
    for listener in (*trainer.callbacks, module):  # type: ignore[attr-defined]
        if hasattr(listener, "on_step_thrown_away"):
            listener.on_step_thrown_away(trainer, module)
    data.limit_micro_batch_size(size // 2)
    text = f"{what}; going on with {data.micro_batch_size}"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MicroBatchSearch):
            callback.on_micro_batch_size(trainer, text)


def _stand_at_step(trainer: pl.Trainer, data_fetcher: Any) -> None:
    """Let the training loop stand before the step again, with the accumulation and the loader of its new size."""
    data, fit = sharded_data(trainer), trainer.fit_loop
    assert data is not None
    loop, accumulation = fit.epoch_loop, trainer.accumulate_grad_batches
    step_in_epoch = loop.automatic_optimization.optim_progress.optimizer.step.current.completed
    for scope, steps in (("total", trainer.global_step), ("current", step_in_epoch)):
        counts = getattr(loop.batch_progress, scope)
        for name in ("ready", "started", "processed", "completed"):
            setattr(counts, name, steps * accumulation)
    loop.batch_progress.is_last_batch = False
    optimizer = loop.automatic_optimization.optim_progress.optimizer
    for progress in (optimizer.step, optimizer.zero_grad):
        for scope, steps in (("total", trainer.global_step), ("current", step_in_epoch)):
            counts = getattr(progress, scope)
            for name in ("ready", "started", "completed"):
                if hasattr(counts, name):
                    setattr(counts, name, steps)
    loop.restarting = False
    data_fetcher.teardown()  # ends the threads that read ahead
    fit._combined_loader = None
    fit.setup_data()
    assert fit._data_fetcher is not None
    data_fetcher.setup(fit._data_fetcher.combined_loader)
    iter(data_fetcher)
    data_fetcher.fetched += loop.batch_progress.current.ready
    fit._data_fetcher = data_fetcher  # the one that the loop under way holds
    loop.val_loop._combined_loader = None  # its micro batches are to be no larger


def _check(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse what a rank without memory cannot keep step in."""
    what = "data.micro_batch_size is auto, and "
    mend = "set data.micro_batch_size to a number"
    if not isinstance(module, Task):
        raise ConfigError(f"{what}{type(module).__name__} is no disttrain.Task", mend=f"derive it from Task, or {mend}")
    if not module.automatic_optimization:
        raise ConfigError(
            f"{what}{type(module).__name__} steps its optimizers by itself",
            mend=f"leave automatic_optimization on, or {mend}",
        )
    if any(isinstance(inner, nn.SyncBatchNorm) for inner in module.modules()):
        raise ConfigError(
            f"{what}{type(module).__name__} has a SyncBatchNorm, which waits for all ranks in the middle of a block",
            mend=f"use other norms, or {mend}",
        )
    config = strategy_of(trainer).config
    for name in ("find_unused_parameters", "static_graph", "sync_batchnorm"):
        if getattr(config, name):
            raise ConfigError(f"{what}parallel.{name} is true", mend=f"set {name} to false, or {mend}")
    if config.tensor != 1:
        raise ConfigError(f"{what}parallel.tensor is {config.tensor}", mend=f"set parallel.tensor to 1, or {mend}")
