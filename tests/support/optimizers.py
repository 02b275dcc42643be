"""A module with parameters of every fate, trained by any optimizer and schedule, whole or resumed from the middle."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from disttrain import ParallelConfig, ShardedDataModule, Trainer
from disttrain.callbacks.checkpointing.callback import Checkpointing
from tests.support.features import write_features

STEPS, THAWED, EPOCH = 13, 7, 8


class Odd(Optimizer):
    """Momentum, kept with state of every kind that a checkpoint can hold, and a count beside the state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "ratio": (0.5, None), "label": "odd"})
        self.calls = 0

    def step(self, closure: Any = None) -> Any:
        """Step by what the state holds, so that any loss of it shows in the weights."""
        loss = closure() if closure is not None else None
        self.calls += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"count": 0, "mode": "heavy", "seen": [], "flag": True, "nothing": None, "scale": 0.5}
                    state |= {
                        "wide": torch.zeros_like(p, dtype=torch.float64),
                        "number": torch.tensor([0], dtype=torch.int64),
                    }
                assert state["mode"] == "heavy"
                assert state["wide"].dtype == torch.float64
                assert state["number"].dtype == torch.int64
                assert state["nothing"] is None
                assert state["flag"] is True
                state["count"] += 1
                state["number"] += 1
                state["seen"] = [*state["seen"], (state["count"], p.grad.detach().sum().reshape(1))][-2:]
                state["wide"].mul_(state["scale"]).add_(p.grad)
                pull = 1 + 0.01 * (state["count"] + self.calls + int(state["number"])) * len(state["seen"])
                p.data.add_(state["wide"].to(p.dtype), alpha=-group["lr"] * pull)
        return loss

    def state_dict(self) -> Any:
        """With the count."""
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state_dict: Any) -> None:
        """With the count."""
        self.calls = state_dict["calls"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "calls"})


class Fates(pl.LightningModule):
    """Layers that are trained, shared, unused, frozen, thawed at step 7, and frozen from there on.

    Args:
        optimizer: makes one from parameters; two halves get one each where ``two``.
        schedule: makes a schedule of it.
        manual: optimize by hand.
        two: use two optimizers.
        sparse: begin with an embedding of sparse gradients.
        every: parameters for the optimizer: all, or those of matrices.
        fates: have all the fates; else everything is trained.
    """

    def __init__(
        self,
        optimizer: Callable[..., Optimizer],
        schedule: Callable[[Optimizer], Any] | None = None,
        *,
        interval: str = "step",
        manual: bool = False,
        two: bool = False,
        sparse: bool = False,
        matrices: bool = False,
        fates: bool = True,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.make, self.make_schedule, self.interval = optimizer, schedule, interval
        self.automatic_optimization = not manual
        self.two, self.matrices, self.fates = two, matrices, fates
        self.table = nn.Embedding(16, 6, sparse=True) if sparse else None
        self.first, self.late, self.early, self.still = (nn.Linear(6, 6) for _ in range(4))
        self.spare = nn.Linear(2, 2)
        self.head = nn.Linear(6, 3)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        if fates:
            self.still.requires_grad_(False)
            self.late.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table is not None:
            rows = (x[:, :3].abs() * 5).long().clamp(max=15)
            return self.table(rows).sum(1)[:, :3]
        for layer in (self.first, self.tied, self.late, self.early, self.still):
            x = x + 0.3 * torch.tanh(layer(x))
        out: Tensor = self.head(x)
        return out

    def loss(self, batch: Any) -> Tensor:
        """Of a micro batch."""
        return F.cross_entropy(self(batch["features"]), batch["label"])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Change fates at a step, which a resumed run may have passed."""
        if self.fates and self.trainer.global_step == THAWED:
            self.late.requires_grad_(True)
            self.early.requires_grad_(False)
            self.early.zero_grad()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()
        schedules = self.lr_schedulers()
        for schedule in schedules if isinstance(schedules, list) else [schedules] if schedules else []:
            schedule.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), sync_dist=True, batch_size=len(batch["label"]))

    def configure_optimizers(self) -> Any:
        if self.table is not None:
            parameters = [self.table.weight]
        elif self.matrices:
            parameters = [p for p in self.parameters() if p.ndim == 2]
        else:
            parameters = list(self.parameters())
        parts = [parameters[::2], parameters[1::2]] if self.two else [parameters]
        made = []
        for part in parts:
            optimizer = self.make(part)
            entry: dict[str, Any] = {"optimizer": optimizer}
            if self.make_schedule is not None:
                schedule = self.make_schedule(optimizer)
                plateau = isinstance(schedule, lr_scheduler.ReduceLROnPlateau) and self.interval == "step"
                entry["lr_scheduler"] = {"scheduler": schedule, "interval": self.interval, "monitor": "val/loss"}
                entry["lr_scheduler"] |= {"frequency": 3} if plateau else {}
            made.append(entry)
        return made if self.two else made[0]


def data(folder: Path, *, size: int = 4, micro: int = 4) -> ShardedDataModule:
    """Epochs of 8 steps."""
    shards = {name: folder / f"{name}.tar" for name in ("train", "val")}
    for name, samples in (("train", size * EPOCH + 1), ("val", 9)):
        if not shards[name].exists():
            write_features(folder, name, samples)
    return ShardedDataModule(
        **{name: str(path) for name, path in shards.items()},  # type: ignore[arg-type]
        fields={"features": "features.npy", "label": "cls"},
        global_batch_size=size,
        micro_batch_size=micro,
    )


def fit(
    module: pl.LightningModule,
    run_dir: Path,
    loaded: ShardedDataModule,
    *,
    resume: Path | None = None,
    parallel: ParallelConfig | None = None,
    steps: int = STEPS,
    validate: int = 3,
    every: int = 1,
    **settings: Any,
) -> Trainer:
    """Train, and keep a checkpoint of every so many steps."""
    trainer = Trainer(
        run_dir=str(run_dir),
        max_steps=steps,
        validate_every_steps=validate,
        parallel=parallel,
        progress_bar=False,
        log_every_steps=100,
        callbacks=[Checkpointing(every_steps=every, keep_last=100, save="sync")],
        seed=1,
        **settings,
    )
    trainer.fit(module, datamodule=loaded, ckpt_path=resume)
    return trainer


def checkpoint(run_dir: Path, step: int) -> Path:
    """That of a step."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def classes(module: Any, base: type) -> dict[str, type]:
    """All of a base's classes that a module of PyTorch offers."""
    return {
        name: kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, base) and kind is not base and not name.startswith("_")
    }


__all__ = ["Fates", "Odd", "checkpoint", "classes", "data", "fit", "lr_scheduler"]
