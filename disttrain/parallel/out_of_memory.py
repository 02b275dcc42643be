"""Out of memory on one rank, told to all: what ``micro_batch_size: auto`` stands on.

A rank that fails alone would leave its peers in their next collective. So a rank that runs out of memory keeps quiet,
lets go of its activations, and takes part in the rest of the step empty-handed: in the same collectives in the same
order, with zeros (:mod:`disttrain.parallel.lockstep`). Before the optimizer steps, and once more after it, the ranks
agree whether one of them has failed; then :class:`StepThrownAway` is raised on all of them, and nothing has changed
that :meth:`MemoryGuard.undo` does not put back. Where the others cannot be told, because they wait in a collective that
this rank cannot reach or complete, it ends with :class:`OutOfStepError`, and they by the lost connection.

Cost: two reductions of one number over a group of their own a step, on the CPU, so the device is never waited for; a
Python hook a parameter (DDP) or a block (FSDP); a copy of the buffers a step; and, for the first steps with a new
size, a copy on the host of parameters and optimizer state. Nothing without a guard.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.errors import DisttrainError
from disttrain.parallel.agree import is_distributed, new_group
from disttrain.parallel.backup import BufferBackup, OptimizerBackup

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object

PHASES: Final = ("forward pass", "backward pass", "optimizer step")
FORWARD, BACKWARD, OPTIMIZER = range(3)

_UNSETTLED_STEPS: Final = 3
"""Steps until a size is taken to be settled: by then the optimizer's state exists and has been used."""
_MESSAGES: Final = (
    "can't allocate memory",
    "DefaultCPUAllocator",
    "CUDA error: out of memory",  # what is not allocated by PyTorch, such as the context of a library
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
)
"""What errors without a class of their own say. Not NCCL's: what fails inside a collective cannot be agreed on by ranks
that are waiting in it."""


class StepThrownAway(Exception):  # noqa: N818  # it ends a step, not a run
    """Some rank ran out of memory in this step, and no rank goes on with it. Raised on all ranks at one place.

    Args:
        phase: in which of :data:`PHASES`.
        rank: on which rank; the lowest of several.
    """

    def __init__(self, phase: int, rank: int) -> None:
        super().__init__(f"out of memory on rank {rank} in the {PHASES[phase]}")
        self.phase, self.rank = phase, rank


class OutOfStepError(DisttrainError):
    """This rank ran out of memory where it can neither go on nor tell the others, and ends."""


@contextmanager
def no_way_back(where: str) -> Iterator[None]:
    """Around what the other ranks wait in: lack of memory there ends this rank.

    Args:
        where: for the message.

    Raises:
        OutOfStepError: memory was lacking.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfStepError(
            f"rank {dist.get_rank() if is_distributed() else 0} ran out of memory {where}",
            mend="resume from the last checkpoint with a smaller data.micro_batch_size, with parallel.strategy: fsdp,"
            " or with more ranks",
        ) from error


class Lockstep(Protocol):
    """How a rank takes part in what is left of a micro batch without computing it."""

    def start(self) -> None:
        """Begin to watch the module; it is set up by now."""

    def begin(self) -> None:
        """A micro batch begins."""

    def learn(self) -> None:
        """A forward pass went well."""

    def finish_forward(self) -> None:
        """Take part in the collectives that are left of a forward pass."""

    def empty_loss(self) -> Tensor:
        """A loss whose backward pass takes part in all collectives, with zeros. Scalar."""

    def finish_backward(self) -> None:
        """Take part in the collectives that are left of a backward pass that failed, with zeros."""

    def close(self) -> None:
        """Watch no more."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on the device or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, dist.DistError):  # from within a collective, in which the other ranks wait
        return False
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


class MemoryGuard:
    """Keeps the ranks together where one of them runs out of memory.

    Args:
        module: the module that is trained.
        rank: this rank.
        lockstep: how to take part in collectives.
        skip: takes part in what the module itself gathers in a micro batch, given that batch's index.
        can_retry: whether a forward pass that failed before it reached the module may be begun once more.

    Making one is a collective: it makes a group.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        *,
        rank: int,
        lockstep: Lockstep,
        skip: Callable[[int], None],
        can_retry: bool,
    ) -> None:
        self.failed: int | None = None
        """In which of :data:`PHASES` this rank ran out of memory in this step."""
        self._rank, self._world_size = rank, dist.get_world_size() if is_distributed() else 1
        self._group = new_group(backend="gloo") if is_distributed() else None
        self._module, self._lockstep, self._skip, self._can_retry = module, lockstep, skip, can_retry
        self._buffers = BufferBackup(module)
        self._optimizer: OptimizerBackup | None = None
        self._quiet_steps = 0
        self._entered = self._stepping = False
        _watch_training_step(module)
        _watch_clipping(module)

    def start(self) -> None:
        """Begin to watch; called when the module is wrapped and on its device."""
        self._lockstep.start()

    def close(self) -> None:
        """Watch no more."""
        self._lockstep.close()
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
            self._group = None

    # Where an allocation may fail.

    def batch_to_device(self, copy: Callable[[], Any], batch: Any) -> Any:
        """Copy a batch to the device; where it does not fit, give it back as it was: the step will be thrown away."""
        if self.failed is None:
            try:
                return copy()
            except Exception as error:
                self._note(error, FORWARD)
            self._free()
        return batch

    def training_step(self, run: Callable[[], Any]) -> Any:
        """Run a forward pass with what wraps it."""
        self._entered = False
        try:
            return run()
        except Exception as error:
            if self._entered or not self._can_retry:
                raise
            self._note(error, FORWARD)
        self._free()
        return run()  # gathering the parameters has failed; now there is memory for it

    def forward(self, run: Callable[[], Any], batch_idx: int) -> Any:
        """Run the module's own training step, inside of what wraps it; where that fails, go on without it."""
        self._entered = True
        self._lockstep.begin()
        if batch_idx % self._module.trainer.accumulate_grad_batches == 0:
            self._buffers.take()
        if self.failed is None:
            try:
                loss = run()
                self._lockstep.learn()
                return loss
            except Exception as error:
                self._note(error, FORWARD)
            self._free()
        self._lockstep.finish_forward()
        self._skip(batch_idx)
        return self._lockstep.empty_loss()

    def backward(self, run: Callable[[], Tensor], loss: Tensor, post_backward: Callable[[Tensor], None]) -> Tensor:
        """Run a backward pass; where it fails, take part in what is left of it."""
        if self.failed is not None:
            return run()
        try:
            return run()
        except Exception as error:
            self._note(error, BACKWARD)
        loss.detach_()  # who holds the loss holds all activations
        self._free()
        self._lockstep.finish_backward()
        post_backward(loss)
        return loss

    def lacks_memory(self, error: Exception) -> bool:
        """Note that the exchange of gradients in a backward pass has failed, if it did for lack of memory."""
        found = is_out_of_memory(error)
        if found and self.failed is None:
            self.failed = BACKWARD
        return found

    def note_stepping(self) -> None:
        """Nothing is left of a step but the optimizer's own part, which waits for nobody."""
        self._stepping = True

    def step(self, run: Callable[[Callable[[], Any]], Any], closure: Callable[[], Any], optimizers: list[Any]) -> Any:
        """Run an optimizer step, whose closure ends with the backward pass.

        Raises:
            StepThrownAway: some rank has failed. A collective.
            OutOfStepError: this rank has failed while the others are in a collective.
        """
        # One rank alone keeps nobody waiting.
        self._stepping = self._world_size == 1

        def agreed() -> Any:
            result = closure()
            self._agree()
            if self._quiet_steps < _UNSETTLED_STEPS:
                self._optimizer = OptimizerBackup(self._module, optimizers)
            return result

        result = None
        try:
            result = run(agreed)
        except StepThrownAway:
            raise
        except Exception as error:
            if not self._stepping:
                with no_way_back("where the ranks cannot agree on a smaller micro batch: in clipping or in a hook"):
                    raise
            self._note(error, OPTIMIZER)
        if self.failed is not None:
            self._free()
        self._agree()
        self._optimizer = None
        self._quiet_steps += 1
        return result

    def undo(self, thrown: StepThrownAway) -> bool:
        """Put back what a thrown-away step has changed.

        Returns:
            Whether that was possible; it is not after an optimizer step with a settled size.
        """
        if thrown.phase == OPTIMIZER:
            if self._optimizer is None:
                return False
            self._optimizer.restore()
        self._optimizer = None
        self._buffers.restore()
        self._module.zero_grad(set_to_none=True)
        self.failed, self._quiet_steps = None, 0
        self._free()
        return True

    # How it is done.

    def _note(self, error: Exception, phase: int) -> None:
        """Remember that this rank failed; what is no lack of memory is raised again. The frames are let go of."""
        if not is_out_of_memory(error):
            raise  # noqa: PLE0704  # called where it is handled
        self.failed = phase
        traceback.clear_frames(error.__traceback__)

    def _free(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _agree(self) -> None:
        """Raise on all ranks if any has failed. A collective."""
        code = 0 if self.failed is None else (self.failed + 1) * self._world_size + self._world_size - 1 - self._rank
        if self._group is not None:
            told = torch.tensor(code)
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
            code = int(told)
        if code:
            phase, place = divmod(code, self._world_size)
            raise StepThrownAway(phase - 1, self._world_size - 1 - place)


class MemoryGuardMixin(_Base):
    """Runs a Lightning strategy's steps under a guard, where there is one; before :class:`SummationMixin`."""

    memory_guard: MemoryGuard | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass."""
        if self.memory_guard is None:
            return super().training_step(*args, **kwargs)
        step = super().training_step
        return self.memory_guard.training_step(lambda: step(*args, **kwargs))

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run a backward pass."""
        if self.memory_guard is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        run = super().backward
        return self.memory_guard.backward(
            lambda: run(closure_loss, optimizer, *args, **kwargs), closure_loss, self.post_backward
        )

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run a closure and step."""
        if self.memory_guard is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        run = super().optimizer_step
        return self.memory_guard.step(
            lambda agreed: run(optimizer, agreed, model, **kwargs), closure, [*self.optimizers]
        )


def _watch_clipping(module: pl.LightningModule) -> None:
    """Let a guard know when a module's last hook before the optimizer's step, which may wait for all ranks, is over."""
    original = module.configure_gradient_clipping
    if hasattr(original, "_is_watched"):
        return

    @functools.wraps(original)
    def configure_gradient_clipping(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        guard: MemoryGuard | None = getattr(module.trainer.strategy, "memory_guard", None)
        if guard is not None:
            guard.note_stepping()

    configure_gradient_clipping._is_watched = True  # type: ignore[attr-defined]
    module.configure_gradient_clipping = configure_gradient_clipping  # type: ignore[method-assign]


def _watch_training_step(module: pl.LightningModule) -> None:
    """Let a module's own training step run under its strategy's guard; FSDP and DDP then wrap the whole."""
    original = module.training_step
    if hasattr(original, "_is_watched"):
        return

    def training_step(*args: Any, **kwargs: Any) -> Any:
        guard: MemoryGuard | None = getattr(module.trainer.strategy, "memory_guard", None)
        if guard is None:
            return original(*args, **kwargs)
        batch_idx = kwargs["batch_idx"] if "batch_idx" in kwargs else args[1]
        return guard.forward(lambda: original(*args, **kwargs), batch_idx)

    training_step.__wrapped__ = original  # type: ignore[attr-defined]  # Lightning looks whether it is overridden
    training_step._is_watched = True  # type: ignore[attr-defined]
    module.training_step = training_step  # type: ignore[method-assign]
