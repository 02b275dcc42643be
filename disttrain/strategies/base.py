"""Overrides of Lightning's strategy methods that DDP and FSDP share.

Loaders are accepted or rejected (:mod:`disttrain.data.loader.user_loaders`), padding is removed from predictions
(:mod:`disttrain.data.loader.padding`), and an optimizer may only step parameters that the strategy reduces
(:mod:`disttrain.parallel.model.trained_parameters`). With manual optimization, backward passes run inside the training
step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from disttrain.data.loader.loaders import EvaluationLoader
from disttrain.data.loader.padding import Rows, real_outputs, rows_of
from disttrain.data.loader.user_loaders import accept
from disttrain.distributed.process_group import JoiningMixin
from disttrain.errors import ConfigError
from disttrain.parallel.clipping import ClippingMixin
from disttrain.parallel.config import ParallelConfig
from disttrain.parallel.model.activation_checkpointing import checkpoint_blocks
from disttrain.parallel.model.compile import compile_blocks
from disttrain.parallel.model.fsdp_internals import BackwardInside, reshard
from disttrain.parallel.model.meta_init import leave_meta
from disttrain.parallel.model.sync_batchnorm import sync_batch_norms
from disttrain.parallel.model.trained_parameters import check_members, class_name
from disttrain.parallel.reduction.summation import SummationMixin
from disttrain.strategies.checkpointing import CheckpointMixin
from disttrain.tasks.base import Task


class BaseStrategy(CheckpointMixin, SummationMixin, ClippingMixin, JoiningMixin):
    """Base class of both strategies."""

    config: ParallelConfig
    seed: int
    _rows: Rows | None = None
    _in_backward = _went_backward = False
    _handles: Sequence[RemovableHandle] = ()
    _outside = False
    """Whether parameters received gradients outside :meth:`backward`, where DDP does not reduce them."""
    _manual: BackwardInside | None = None

    @cached_property
    def _sizes(self) -> WeakKeyDictionary[Optimizer, tuple[int, ...]]:
        """Number of parameters per group of each optimizer, when last checked."""
        return WeakKeyDictionary()

    def process_dataloader(self, dataloader: object) -> object:
        """Reject a loader that would not divide its samples among the ranks; make it resumable. Collective."""
        return accept(dataloader, self._trainer(), seed=self.seed)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Record which rows of a micro batch are real, before the module may change the batch's structure."""
        self._rows = rows_of(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's predictions without those for padding."""
        outputs, module = super().predict_step(*args, **kwargs), self._module()
        if isinstance(module, Task):
            return outputs
        rows = rows_of(args[0]) or self._rows
        loop, loader = self._trainer().predict_loop, self._trainer().predict_dataloaders
        if rows is None and isinstance(loader, EvaluationLoader):
            raise ConfigError(
                f"on_before_batch_transfer of {class_name(module)} takes __count__ out of the batch, which says how"
                " many samples are real",
                hint="change the batch in on_after_batch_transfer, or leave __count__ and __weight__ in it",
            )
        pads = isinstance(loader, EvaluationLoader) and loader.pads
        return real_outputs(outputs, rows, module, check=pads and loop.batch_progress.current.ready == 1)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run a backward pass, and record that one ran."""
        self._in_backward = self._went_backward = True
        try:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        finally:
            self._in_backward = False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the training step, including the backward passes of manual optimization."""
        with self._manual.inside() if self._manual is not None else nullcontext():
            return super().training_step(*args, **kwargs)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """End FSDP's forward pass, if the training step is still running."""
        super().pre_backward(closure_loss)
        if self._manual is not None:
            self._manual.before_backward(closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Begin FSDP's next forward pass."""
        super().post_backward(closure_loss)
        if self._manual is not None:
            self._manual.after_backward()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return this rank's part of an optimizer's state, by parameter name."""
        # A forward pass may have left parameters gathered; the optimizers hold the sharded ones.
        if self._manual is not None:
            self._manual.release()
        elif isinstance(self.model, FSDPModule):
            reshard(self.model)
        return super().optimizer_state(optimizer)

    def check_reduced(self, optimizer: Optimizer) -> None:
        """Before an optimizer step, reject anything that would make the ranks diverge.

        Raises:
            ConfigError: it would step parameters whose gradients were not reduced over the ranks.
        """
        sizes = tuple(len(group["params"]) for group in optimizer.param_groups)
        if self._sizes.get(optimizer) != sizes:
            self._sizes[optimizer] = sizes
            check_members(optimizer, dict(self._reducible()), self._module())
        if self.world_size == 1 and not isinstance(self.model, FSDPModule):
            return
        if not self._module().automatic_optimization and (self._outside or not self._went_backward):
            raise ConfigError(
                f"{class_name(self._module())} calls loss.backward(), whose gradients the ranks do not reduce",
                hint="call self.manual_backward(loss) in its place",
            )
        if name := self._unreduced():
            raise ConfigError(
                f"parameter {name} of {class_name(self._module())} has a gradient that was not reduced over the"
                f" {self.world_size} ranks, which would drift apart",
                hint="freeze and thaw layers between two steps, such as in on_train_epoch_start, and call every layer"
                " inside of training_step or forward; with several optimizers by hand set"
                " parallel.find_unused_parameters to true",
            )

    def teardown(self) -> None:
        """Free the device."""
        self._watch_gradients(())
        if self.lightning_module is not None:
            leave_meta(self.lightning_module)
        super().teardown()

    def _change_for_training(self, module: nn.Module) -> None:
        """Modify layers as configured: once, before the module is wrapped or sharded."""
        if self.config.sync_batchnorm and self.world_size > 1:
            sync_batch_norms(module)
        if self.config.activation_checkpointing != "none":
            checkpoint_blocks(module, self.config.activation_checkpointing)
        if self.config.compile == "blocks":
            compile_blocks(module, self.root_device)

    def _watch_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Record whether these parameters get gradients outside :meth:`backward`; stop watching earlier ones."""

        def note(_: Tensor) -> None:
            self._outside = self._outside or not self._in_backward

        for handle in self._handles:
            handle.remove()
        self._handles = [p.register_post_accumulate_grad_hook(note) for p in parameters]  # type: ignore[no-untyped-call]

    def _drive_backward(self) -> BackwardInside:
        manual = BackwardInside(self.model)  # type: ignore[arg-type]
        for optimizer in self.optimizers:
            optimizer.register_step_post_hook(lambda *_: manual.after_step())
        return manual

    def _reducible(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters whose gradients are reduced, or will be once they are trained."""
        raise NotImplementedError

    def _unreduced(self) -> str:
        """Return the name of a parameter whose gradient was not reduced, or an empty string."""
        raise NotImplementedError
