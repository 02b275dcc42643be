"""A training that runs out of memory where a test says so."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from disttrain import Task


def lack() -> RuntimeError:
    """What the CPU's allocator raises, really."""
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("there was memory for it")


class Shortage(Callback):
    """Fails in a phase of training on one rank, for micro batches of more samples than the limit.

    Args:
        phase: ``copy``, ``forward``, ``backward``, ``optimizer`` or ``validation``.
        limit: samples that memory suffices for.
        step: from which step on.
        rank: on which rank.
    """

    def __init__(self, phase: str, limit: int, *, step: int = 0, rank: int = 0) -> None:
        self.phase, self.limit, self.step, self.rank = phase, limit, step, rank

    def _check(self, trainer: pl.Trainer, phase: str, size: int) -> None:
        if phase != self.phase or trainer.global_rank != self.rank:
            return
        if trainer.global_step >= self.step and size > self.limit:
            raise lack()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Fail before the forward pass, in the optimizer's step, or in a layer's hook."""
        size = len(batch["features"])
        self._check(trainer, "copy", size)
        handles: list[Any] = []

        def forward(*unused: Any) -> None:
            handles[0].remove()
            self._check(trainer, "forward", size)

        def backward(*unused: Any) -> None:
            handles[1].remove()
            self._check(trainer, "backward", size)

        layer = next(module for module in pl_module.modules() if isinstance(module, nn.Linear))
        handles += [layer.register_forward_hook(forward), layer.register_full_backward_pre_hook(backward)]
        if self.phase == "optimizer":
            optimizer: Any = trainer.optimizers[0]
            handles.append(optimizer.register_step_post_hook(lambda *_: self._check(trainer, "optimizer", size)))

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Fail in a validation of the training."""
        if not trainer.sanity_checking:
            self._check(trainer, "validation", len(batch["features"]))


class NormedTask(Task):
    """Blocks with batch norms and dropout, which depend on the micro batch."""

    ballast: ClassVar[int] = 0
    """Copies of each sample that a forward pass keeps, in 24 bytes each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.2)) for _ in range(2)
        )
        self.head = nn.Linear(6, 3)

    def shard_units(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def forward(self, batch: Any) -> Tensor:
        hidden = batch["features"]
        for block in self.blocks:
            hidden = block(hidden)
        out: Tensor = self.head(hidden)
        if self.ballast and self.training:
            return out + 0.0 * batch["features"].repeat(1, self.ballast).sum()
        return out

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch["label"], reduction="none")

    def loss_weights(self, batch: Any) -> Tensor:
        weights: Tensor = 1.0 + batch["label"].float()
        return weights

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)
