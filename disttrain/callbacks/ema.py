"""An exponential moving average of the weights, sharded as they are, for evaluation.

After each optimizer step every rank moves its own part of the averages towards its own part of the weights:
``average = decay * average + (1 - decay) * weight`` (Polyak & Juditsky 1992, doi:10.1137/0330046, with weights that
fade). It is elementwise, so where the weights have the same bits in all layouts, the averages have too. They are saved
in checkpoints as tensors of their own, group ``ema``, and go on in any layout.

Only parameters that are trained are averaged. Buffers, such as the running statistics of batch norms, are evaluated
as training has left them; so are frozen parameters.

Cost: one more copy of a rank's trained parameters (in float32 where they are narrower) and one pass over it a step, no
collective and no wait for the device; in an evaluation another copy, of the weights that are put aside.
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

    Validation, test and prediction run with the averages; the training weights come back afterwards, to the bit, after
    an exception too. A checkpoint taken meanwhile holds the training weights as its model. What is loaded from a
    checkpoint to be evaluated, best weights at the end of a run included, are its averages.

    Args:
        decay: share of the old average that is kept at an update, from 0 to below 1.
        warmup: keep less at first: ``min(decay, (1 + n) / (10 + n))`` at update n, counted from 0 (the rule of
            TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``), so that the start weights fade soon.
        evaluate: evaluate with the averages; else they are only kept and saved.
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
        """Updates of the averages so far, those of earlier attempts included."""
        self._trainer: pl.Trainer | None = None  # while it trains
        self._module: nn.Module | None = None
        self._step = 0  # optimizer steps that the averages know of
        self._resumed = False
        self._trained: dict[str, nn.Parameter] = {}
        self._averages: dict[str, Tensor] = {}
        self._aside: list[tuple[Tensor, Tensor]] | None = None  # (parameter, its training weights) in an evaluation

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, sharded where they can be, each under its first name."""
        assert self._module is not None, "the callback is not set up"
        reshard(self._module)
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name, parameter in parameters_by_name(self._module):
            if parameter.requires_grad:
                found.setdefault(id(parameter), (name, parameter))
        return dict(found.values())

    # When the averages move.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have the averages saved and loaded with checkpoints."""
        groups = strategy_of(trainer).tensor_groups
        if groups.setdefault(GROUP, self) is not self:
            raise ConfigError("trainer.callbacks has more than one EMA", hint="keep one of them")
        self._module = pl_module

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from the weights; a checkpoint that is resumed fills the averages after this."""
        self._trainer, self._resumed, self.updates = None, False, 0
        self._start()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is averaged before the first step."""
        if not self._resumed:
            self._start()  # another hook may have changed the weights
        self._trainer, self._step = trainer, trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after an optimizer step."""
        self._follow()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the training weights in the module."""
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
        """Update the averages, unless they know of the last step already."""
        if self._trainer is None or self._trainer.global_step == self._step:
            return
        self._step = self._trainer.global_step
        if self._step % self.every_steps:
            return
        if not self._averages:  # weights were loaded in the midst of a training
            self._start()
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        pairs = [(_local(average), _local(self._trained[name])) for name, average in self._averages.items()]
        alike = [(average, weight) for average, weight in pairs if average.dtype == weight.dtype]
        if alike:
            averages, weights = zip(*alike, strict=True)
            torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, weight in pairs:
            if average.dtype != weight.dtype:  # a narrow average would stand still: its steps round to nothing
                average.lerp_(weight.to(average.dtype), 1 - decay)
        self.updates += 1

    # What is evaluated.

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
        """Go back to the training weights."""
        self._put_back()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go back to the training weights."""
        self._put_back()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go back to the training weights."""
        self._put_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Go back to the training weights where an evaluation has failed."""
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
        self._parameters()  # no gathered copies of the averages stay behind
        for weight, kept in aside:
            weight.copy_(kept)

    # What is saved and loaded: disttrain.checkpoint.format.groups.TensorGroup.

    def tensors(self) -> dict[str, Tensor]:
        """This rank's part of the averages; empty once the module has been filled to be evaluated."""
        self._follow()  # whatever callback it is that saves, and however early in a step's hooks
        return dict(self._averages)

    def state(self) -> dict[str, Any]:
        """How far the warm-up has come."""
        return {"updates": self.updates}

    @torch.no_grad()
    def resume(self, found: set[str], state: dict[str, Any]) -> None:
        """Go on with a checkpoint's averages; those that it lacks start from its weights."""
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
        """The module holds what is to be evaluated, so these averages are not put in its place."""
        self._averages, self._aside = {}, None
        if self.evaluated and not found:
            warnings.warn("the checkpoint has no averaged weights: its training weights are evaluated", stacklevel=2)

    @contextmanager
    def training_weights(self) -> Iterator[None]:
        """Inside, the module holds the training weights."""
        evaluating = self._aside is not None
        self._put_back()
        try:
            yield
        finally:
            if evaluating:
                self._put_in()


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; writing to it writes to the tensor. Without gradients, it costs nothing."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
