"""An exponential moving average of the weights for evaluation, sharded like the weights.

After each optimizer step, every rank updates its shard of the averages from its shard of the weights: ``average = decay
* average + (1 - decay) * weight`` (Polyak & Juditsky 1992, doi:10.1137/0330046, with exponentially decaying weights).
The update is elementwise: if the weights are bit-identical in all layouts, so are the averages. Checkpoints store them
as separate tensors, group ``ema``, which load in any layout.

Only trained parameters are averaged. Frozen parameters and buffers, such as the running statistics of batch norms, are
evaluated as they are.

Cost: one more copy of a rank's trained parameters (float32 if they are narrower) and one pass over it per step, without
collectives or device synchronization; during an evaluation, another copy for the training weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from disttrain.checkpoint.format.groups import parameters_by_name
from disttrain.errors import ConfigError
from disttrain.parallel.model.fsdp_internals import reshard
from disttrain.strategies.build import strategy_of

GROUP: Final = "ema"


class EMA(Callback):
    """Keeps an exponential moving average of the weights and evaluates with it.

    Validation, test and prediction run with the averages; afterwards, even after an exception, the training weights are
    restored bit-identically. A checkpoint saved during an evaluation holds the training weights as its model. When a
    checkpoint is loaded for evaluation, or the best weights are restored at the end of a run, the averages are loaded.

    Args:
        decay: share of the old average kept at each update, in [0, 1).
        warmup: keep less at first: ``min(decay, (1 + n) / (10 + n))`` at update n, counted from 0 (the rule of
            TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``), so that the initial weights fade quickly.
        evaluate: evaluate with the averages; otherwise they are only maintained and saved.
        every_steps: optimizer steps between two updates.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self, *, decay: float = 0.9999, warmup: bool = True, evaluate: bool = True, every_steps: int = 1
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema.decay is {decay}", hint="use a value from 0 to below 1, such as 0.999")
        if every_steps < 1:
            raise ConfigError(f"ema.every_steps is {every_steps}", hint="use at least 1")
        self.decay, self.warmup, self.evaluated, self.every_steps = decay, warmup, evaluate, every_steps
        self.updates = 0
        """Updates of the averages so far, including earlier attempts."""
        self._trainer: pl.Trainer | None = None  # set while training
        self._module: nn.Module | None = None
        self._step = 0  # the last optimizer step included in the averages
        self._resumed = False
        self._trained: dict[str, nn.Parameter] = {}
        self._averages: dict[str, Tensor] = {}
        self._aside: list[tuple[Tensor, Tensor]] | None = None  # (parameter, its training weights) during an evaluation

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, resharded under FSDP, each under its first name."""
        assert self._module is not None, "the callback is not set up"
        reshard(self._module)
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name, parameter in parameters_by_name(self._module):
            if parameter.requires_grad:
                found.setdefault(id(parameter), (name, parameter))
        return dict(found.values())

    # Updating the averages.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Register the averages to be saved in and loaded from checkpoints."""
        groups = strategy_of(trainer).tensor_groups
        # One of an earlier fit or attempt is gone: configure_callbacks returns another one each time.
        if groups.get(GROUP, self) is not self and groups[GROUP] in trainer.callbacks:  # type: ignore[attr-defined]
            raise ConfigError("trainer.callbacks has more than one EMA", hint="keep one of them")
        groups[GROUP] = self
        self._module = pl_module

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from the weights; a checkpoint that is resumed overwrites the averages later."""
        self._trainer, self._resumed, self.updates = None, False, 0
        self._start()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart the averages from the weights, unless they were resumed."""
        if not self._resumed:
            self._start()  # another hook may have changed the weights since
        self._trainer, self._step = trainer, trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after an optimizer step."""
        self._follow()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the training weights."""
        self._put_back()
        self._trainer = None

    @torch.no_grad()
    def _start(self) -> None:
        self._trained = self._parameters()
        self._averages = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._trained.items()
        }

    @torch.no_grad()
    def _follow(self) -> None:
        """Update the averages, unless they include the last step already."""
        if self._trainer is None or self._trainer.global_step == self._step:
            return
        self._step = self._trainer.global_step
        if self._step % self.every_steps:
            return
        if not self._averages:  # weights were loaded in the middle of training
            self._start()
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        pairs = [(_local(average), _local(self._trained[name])) for name, average in self._averages.items()]
        alike = [(average, weight) for average, weight in pairs if average.dtype == weight.dtype]
        if alike:
            averages, weights = zip(*alike, strict=True)
            torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, weight in pairs:
            if average.dtype != weight.dtype:  # the average is wider: in bf16 small updates would vanish
                average.lerp_(weight.to(average.dtype), 1 - decay)
        self.updates += 1

    # Evaluating.

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate with the averages."""
        self._put_in()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate with the averages."""
        self._put_in()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Predict with the averages."""
        self._put_in()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the training weights."""
        self._put_back()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the training weights."""
        self._put_back()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the training weights."""
        self._put_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the training weights after a failed evaluation."""
        self._put_back()

    @torch.no_grad()
    def _put_in(self) -> None:
        if not self.evaluated or not self._averages or self._aside is not None:
            return
        parameters, self._aside = self._parameters(), []
        for name, average in self._averages.items():
            weight = _local(parameters[name])
            self._aside.append((weight, weight.clone()))
            weight.copy_(_local(average))

    @torch.no_grad()
    def _put_back(self) -> None:
        aside, self._aside = self._aside, None
        if aside is None:
            return
        self._parameters()  # reshards, which frees gathered copies of the averages
        for weight, kept in aside:
            weight.copy_(kept)

    # Saving and loading: implements disttrain.checkpoint.format.groups.TensorGroup.

    def tensors(self) -> dict[str, Tensor]:
        """Return this rank's averages; empty once weights were loaded for evaluation."""
        self._follow()  # the callback that saves may run before this one's hook
        return dict(self._averages)

    def state(self) -> dict[str, Any]:
        """Return the progress of the warm-up."""
        return {"updates": self.updates}

    @torch.no_grad()
    def resume(self, found: set[str], state: dict[str, Any]) -> None:
        """Restore a checkpoint's averages; any that it lacks start from its weights."""
        self._resumed, self.updates = True, state.get("updates", 0)
        missing = [name for name in self._averages if name not in found]
        for name in missing:
            _local(self._averages[name]).copy_(_local(self._trained[name]))
        if missing:
            which = (
                "no averaged weights" if not found else f"no averages of {len(missing)} parameters ({missing[0]}, ...)"
            )
            warnings.warn(f"the checkpoint has {which}: they start from its weights", stacklevel=2)

    def replaced(self, found: bool) -> None:
        """Drop the averages: the module now holds the weights to evaluate."""
        self._averages, self._aside = {}, None
        if self.evaluated and not found:
            warnings.warn("the checkpoint has no averaged weights: its training weights are evaluated", stacklevel=2)

    @contextmanager
    def training_weights(self) -> Iterator[None]:
        """Hold the training weights in the module within the context."""
        evaluating = self._aside is not None
        self._put_back()
        try:
            yield
        finally:
            if evaluating:
                self._put_in()


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor as a view; without gradients, this is free."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
