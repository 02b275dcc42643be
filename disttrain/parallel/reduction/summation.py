"""A mixin with which a Lightning strategy sums gradients in a fixed tree: ``reduction: tree``.

The mixin intercepts every backward pass. It starts each with the same gradient in all layouts, a power of two. It
collects the gradients of all micro batches of a step except the last, and lets the strategy reduce with the last. The
optimizer then sees the mean over the step's micro batches, as with any strategy, but with the same bits on any number
of ranks, given the same micro batches.

Cost: see :mod:`disttrain.parallel.reduction.exchange`, plus one pass over the gradients if the number of micro batches
is not a power of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from disttrain.errors import ConfigError
from disttrain.lightning.internals import ends_step
from disttrain.parallel.config import ParallelConfig, ReductionName
from disttrain.parallel.determinism import check_ordered_sums
from disttrain.parallel.gradients import scale_gradients
from disttrain.parallel.model.trained_parameters import class_name
from disttrain.parallel.ranks import data_ranks
from disttrain.parallel.reduction.exchange import PartialSums
from disttrain.parallel.reduction.tree import plan_tree

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object


class SummationMixin(_Base):
    """Sums gradients as configured; list it before the base in a Lightning strategy."""

    config: ParallelConfig
    _sums: PartialSums | None = None
    _of_step: list[tuple[str, Any]]  # the trainable parameters in the current step
    _looked: bool = False  # whether the first micro batch's kernels were checked

    @property
    def reduction(self) -> ReductionName:
        """The configured ``parallel.reduction``."""
        return self.config.reduction

    # To be defined by strategies.

    def _trained(self) -> list[tuple[str, Any]]:
        """Return names and trainable parameters, in a fixed order."""
        raise NotImplementedError

    def _take(self, parameter: Any) -> Tensor | None:
        """Return and clear a parameter's gradient after a backward pass without reduction."""
        raise NotImplementedError

    def _reduced(self, parameters: list[tuple[str, Any]]) -> None:
        """Complete the reduction after the last backward pass of a step."""
        raise NotImplementedError

    # Implementation.

    def _start_tree(self, trainer: pl.Trainer) -> PartialSums:
        """Check that the run supports tree reduction; call once the ranks are known."""
        module = self.lightning_module
        assert module is not None
        if not module.automatic_optimization:
            raise ConfigError(
                f"parallel.reduction is tree, and {class_name(module)} steps its optimizers by itself",
                hint="set parallel.reduction to fast, or leave automatic_optimization on",
            )
        if trainer.precision in ("16-mixed", "bf16-true", "16-true"):
            raise ConfigError(
                f"parallel.reduction is tree, and trainer.precision is {trainer.precision}",
                hint="use bf16-mixed or 32-true, whose gradients are float32, or set parallel.reduction to fast",
            )
        self._sums = PartialSums(data_ranks(trainer).rank)
        return self._sums

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run a backward pass whose initial gradient does not depend on the layout."""
        if self._sums is not None:
            if not self._looked:
                check_ordered_sums(closure_loss, self.root_device)
                self._looked = True
            accumulation = self._trainer().accumulate_grad_batches
            plan = plan_tree(data_ranks(self._trainer()).size, accumulation)
            if self._sums.count == 0:
                self._sums.start(plan)
                self._of_step = self._trained()  # in every step: callbacks may freeze and unfreeze layers
            # Undo Lightning's division of the loss by the accumulation, exactly.
            kwargs["gradient"] = torch.full_like(closure_loss, accumulation * 2.0**-plan.scale_exponent)
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Add this micro batch's gradients to the tree; after the last one, complete the step's reduction."""
        super().post_backward(closure_loss)
        sums = self._sums
        if sums is None:
            return
        parameters = self._of_step
        if not ends_step(self._trainer()):
            sums.add([_present(name, self._take(parameter)) for name, parameter in parameters])
            return
        if sums.count != sums.plan.accumulation - 1:
            raise ConfigError(
                f"parallel.reduction is tree, and a step had {sums.count + 1} micro batches of"
                f" {sums.plan.accumulation}: the loader's length is no multiple of the accumulation",
                hint="use disttrain's data module or drop the rest, or set parallel.reduction to fast",
            )
        self._reduced(parameters)
        plan = sums.plan
        sums.start(plan)
        if plan.num_leaves != 2**plan.scale_exponent:
            mean = 2.0**plan.scale_exponent / plan.num_leaves
            factor = torch.full((), mean, dtype=torch.float64, device=self.root_device)
            scale_gradients(self._trainer().lightning_module.parameters(), factor)

    def _finish_alone(self, gradients: list[tuple[str, Tensor | None]]) -> None:
        """On a single rank, add the kept partial sums to the last micro batch's gradients, in place."""
        assert self._sums is not None
        found = [_present(name, gradient) for name, gradient in gradients]
        with torch.no_grad():
            self._sums.finish(range(len(found)), found)

    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer


def _present(name: str, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise ConfigError(
            f"parallel.reduction is tree, and parameter {name} got no gradient from a micro batch",
            hint="freeze it (requires_grad=False) or use it in every forward pass, or set parallel.reduction to fast",
        )
    return gradient
