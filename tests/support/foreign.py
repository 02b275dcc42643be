"""Modules, data sets and loaders as Lightning's users write them, which know nothing of disttrain."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from disttrain import Checkpointing, ParallelConfig, Trainer

FEATURES, CLASSES = 6, 3


class Numbers(Dataset[tuple[Tensor, Tensor, int]]):
    """Samples that know their number."""

    def __init__(self, samples: int = 48) -> None:
        draw = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(samples, FEATURES, generator=draw)
        self.labels = torch.randint(CLASSES, (samples,), generator=draw)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, int]:
        return self.inputs[number], self.labels[number], number


class Stream(IterableDataset[tuple[Tensor, Tensor, int]]):
    """The same, one after the other."""

    def __init__(self, samples: int = 48) -> None:
        self.numbers = Numbers(samples)

    def __iter__(self) -> Any:
        return (self.numbers[number] for number in range(len(self.numbers)))


class Plain(pl.LightningModule):
    """A backbone and a head, trained by ``training_step`` through its layers; notes the samples of each step."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.lr = lr
        self.backbone = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh())
        self.head = nn.Linear(8, CLASSES)
        self.seen: list[list[int]] = []

    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            inputs, labels = batch["features"], batch["label"]
        else:
            inputs, labels, numbers = batch
            self.seen.append(numbers.tolist())
        return F.cross_entropy(self.head(self.backbone(inputs)), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(self.backbone(batch["features"] if isinstance(batch, dict) else batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


class Evaluated(Plain):
    """With the other loops' steps."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


class ByHand(Plain):
    """The same by hand, as Lightning's documentation has it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Backward(ByHand):
    """A backward pass that Lightning does not know of."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class Adversaries(ByHand):
    """Two optimizers, of which each moves one part by a loss of both; the other is switched off meanwhile."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for number, optimizer in enumerate(self.optimizers()):  # type: ignore[arg-type]
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch) * (1.0 if number else -0.1)
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        parts = (self.backbone, self.head)
        return [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in parts], []


class HalfByHand(Adversaries):
    """One of two backward passes that Lightning does not know of."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = self.optimizers()  # type: ignore[misc]
        self.manual_backward(self.head(self.backbone(batch[0]).detach()).square().mean())
        second.step()
        self.loss(batch).backward()
        first.step()


class TwoBackwards(ByHand):
    """Two backward passes for one step, with no step between."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for _ in range(2):
            self.manual_backward(0.5 * self.loss(batch))
        optimizer.step()


class Own(Plain):
    """An optimizer over a layer that the module does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(CLASSES, CLASSES)]

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 0.1 * self.hidden[0](torch.ones(CLASSES) * (1 + self.global_rank)).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), *self.hidden[0].parameters()], lr=0.1)


class Thaw(BaseFinetuning):
    """Thaws the backbone at an epoch, with parameters of its own in the optimizer."""

    def __init__(self, epoch: int = 1) -> None:
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.05)


class Freeze(Callback):
    """Freezes the backbone at the second epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone.requires_grad_(False)


def trainer_of(folder: Path, *callbacks: Any, parallel: ParallelConfig | None = None, **settings: Any) -> Trainer:
    """A trainer on the CPU without a bar."""
    callbacks = (*callbacks, *(() if any(isinstance(c, Checkpointing) for c in callbacks) else (Checkpointing(),)))
    return Trainer(
        run_dir=str(folder),
        parallel=parallel,
        progress_bar=False,
        accelerator="cpu",
        callbacks=[*callbacks],
        **settings,
    )


def newest(trainer: Trainer) -> str | None:
    """The newest checkpoint in a trainer's folder, begun from; a run that came to its limit would not go on from it."""
    found = sorted((trainer.run_dir / "checkpoints").glob("step-*"))
    return trainer.find_start(str(found[-1]) if found else "never").checkpoint


def digest(module: nn.Module) -> str:
    """A hash of this rank's part of the weights."""
    sums = hashlib.sha256()
    for parameter in module.parameters():
        local: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        sums.update(local.detach().contiguous().numpy().tobytes())
    return sums.hexdigest()


def whole(module: nn.Module) -> Tensor:
    """All weights, end to end. A collective where they are sharded."""
    parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    return torch.cat([part.detach().reshape(-1) for part in parts])


Make = Callable[[], Any]
