"""Lightning's classes, with public names for the protected methods that disttrain overrides."""

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
    """Lightning's trainer with public hooks around a run and its teardown."""

    def around_run(self, run: Callable[[], Any]) -> Any:
        """Fit or evaluate, from set-up to teardown.

        Args:
            run: Lightning's implementation.
        """
        return run()

    def around_teardown(self, teardown: Callable[[], None]) -> None:
        """Release a run's resources, whether it failed or not.

        Args:
            teardown: Lightning's implementation.
        """
        teardown()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # Overridden here because trainer.state and trainer.lightning_module are set, unlike in fit(), test() etc.
        return self.around_run(lambda: super(TrainerBase, self)._run(*args, **kwargs))

    def _teardown(self) -> None:
        self.around_teardown(super()._teardown)


class StrategyBase(DDPStrategy):
    """Lightning's DDP; both of disttrain's strategies use its environment, launcher and setup."""

    @property
    def timeout(self) -> timedelta | None:
        """How long a collective may take."""
        return self._timeout

    def backend_name(self) -> str:
        """PyTorch's name for the process group's backend."""
        return str(super()._get_process_group_backend())

    def synchronize_layers(self) -> None:
        """Apply ``sync_batchnorm=True`` of Lightning's own trainer; does nothing under disttrain's."""
        if self._layer_sync:
            assert self.model is not None
            self.model = self._layer_sync.apply(self.model)

    def _get_process_group_backend(self) -> str:
        return self.backend_name()

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        # On the current stream. Lightning 2.6.6 wraps on a side stream; autograd then runs gradient accumulation on
        # that stream, so every backward pass waits for it (https://github.com/Lightning-AI/pytorch-lightning/pull/21746).
        return DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)


class PrecisionBase(MixedPrecision):
    """Lightning's mixed precision with public access to a part of its optimizer step."""

    def before_step(self, model: pl.LightningModule, optimizer: Optimizable) -> None:
        """Call ``on_before_optimizer_step``, then clip, as Lightning does after the backward pass."""
        self._after_closure(model, optimizer)
