"""Stop a run whose ranks would diverge because a gradient is not reduced.

The check itself is in :mod:`disttrain.parallel.model.trained_parameters`.
"""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer


class ReductionCheck(Callback):
    """Asks the strategy before each optimizer step whether all its gradients were reduced. Cost: a few comparisons."""

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the optimizer's gradients, which are complete at this point."""
        check = getattr(trainer.strategy, "check_reduced", None)
        if check is not None:
            check(optimizer)
