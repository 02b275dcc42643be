"""What makes a Lightning strategy sum gradients in one tree: ``reduction: tree``.

The mixin sees every backward pass. It gives each the same starting value in all layouts, a power of two, takes the
gradients of all micro batches of a step but the last, and lets the strategy reduce with the last. What an optimizer
then sees is the mean over the step's micro batches, as with any strategy, but with the same bits for every number of
ranks whose micro batches are the same.

Cost: see :mod:`disttrain.parallel.reduction.exchange`; one more pass over the gradients where the number of micro
batches is no power of two.
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
    """Adds gradients as the configuration says; to be mixed into a Lightning strategy, before its base."""

    config: ParallelConfig
    _sums: PartialSums | None = None
    _of_step: list[tuple[str, Any]]  # the parameters that get gradients in the step under way
    _looked: bool = False  # at the kernels of the first micro batch

    @property
    def reduction(self) -> ReductionName:
        """How gradients are added."""
        return self.config.reduction

    # What a strategy does.

    def _trained(self) -> list[tuple[str, Any]]:
        """The parameters that get gradients, by name, in one order."""
        raise NotImplementedError

    def _take(self, parameter: Any) -> Tensor | None:
        """Take the gradient of a parameter after a backward pass without reduction."""
        raise NotImplementedError

    def _reduced(self, parameters: list[tuple[str, Any]]) -> None:
        """The last backward pass of a step is over: finish what it has not done."""
        raise NotImplementedError

    # How it is done.

    def _start_tree(self, trainer: pl.Trainer) -> PartialSums:
        """Check that the run can sum in a tree; called once the ranks are known."""
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
        """Run a backward pass whose starting value does not depend on the layout."""
        if self._sums is not None:
            if not self._looked:
                check_ordered_sums(closure_loss, self.root_device)
                self._looked = True
            accumulation = self._trainer().accumulate_grad_batches
            plan = plan_tree(data_ranks(self._trainer()).size, accumulation)
            if self._sums.count == 0:
                self._sums.start(plan)
                self._of_step = self._trained()  # anew for each step: a callback may freeze and thaw layers
            # Lightning has divided the loss by the accumulation; this makes it up, exactly.
            kwargs["gradient"] = torch.full_like(closure_loss, accumulation * 2.0**-plan.scale_exponent)
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Put the gradients of this micro batch where the tree wants them."""
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
        """For one rank: add what was kept to the last micro batch's gradients, in place."""
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
