"""Lightning's classes with public names for what disttrain overrides in them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.types import Optimizable
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class TrainerBase(pl.Trainer):
    """A trainer that says where a run begins and ends."""

    def around_run(self, run: Callable[[], Any]) -> Any:
        """Fit or evaluate, from the set-up to the teardown.

        Args:
            run: does it.
        """
        return run()

    def around_teardown(self, teardown: Callable[[], None]) -> None:
        """Release what a run has held, whether it failed or not.

        Args:
            teardown: does it.
        """
        teardown()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # The state, and so what runs, is known here; fit() and the like are too early for that.
        return self.around_run(lambda: super(TrainerBase, self)._run(*args, **kwargs))

    def _teardown(self) -> None:
        self.around_teardown(super()._teardown)


class StrategyBase(DDPStrategy):
    """Lightning's DDP, from which both of disttrain's strategies take environment, launcher and set-up."""

    @property
    def timeout(self) -> timedelta | None:
        """How long a collective may take."""
        return self._timeout

    def backend_name(self) -> str:
        """PyTorch's name of the backend of the process group."""
        return str(super()._get_process_group_backend())

    def synchronize_layers(self) -> None:
        """Apply ``Trainer(sync_batchnorm=True)`` of Lightning's own trainer; nothing under disttrain's."""
        if self._layer_sync:
            assert self.model is not None
            self.model = self._layer_sync.apply(self.model)

    def _get_process_group_backend(self) -> str:
        return self.backend_name()

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        # On the stream that trains: Lightning 2.6.6 wraps on another one, which the nodes that gather gradients then
        # stay on, and every backward pass waits for it (https://github.com/Lightning-AI/pytorch-lightning/pull/21746).
        return DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)


class PrecisionBase(MixedPrecision):
    """Lightning's mixed precision, whose parts can be called one by one."""

    def before_step(self, model: pl.LightningModule, optimizer: Optimizable) -> None:
        """Call ``on_before_optimizer_step``, then clip; Lightning does so once the backward passes are done."""
        self._after_closure(model, optimizer)
