"""A step whose loss or gradient is not finite, or far above the usual, changes nothing.

Loss and gradient norm of a step are sums over all ranks, the same numbers on each, so all ranks leave the update out
together or none does. The step still counts, its schedule moves on, and its samples are listed under
``<run_dir>/skipped``. Too many in a row end the run with one error. What is usual is the median of the norms of recent
steps; a spike is further above it than ``spikes`` robust deviations (1.4826 times the median absolute deviation).

Guarantee: which steps are skipped does not depend on the layout, but for norms within rounding of the threshold; the
state is part of checkpoints. Cost: the norm of the gradient, which is also logged. On CUDA with a fused optimizer the
device decides and nothing waits for it; other optimizers there wait once a step. Every ten steps the host looks at what
happened, with one reduction of one number. ``16-mixed`` has its own rule and is left alone.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from disttrain.callbacks.find import find_callback
from disttrain.callbacks.run_record import RunRecord
from disttrain.data.batches import KEY
from disttrain.errors import ConfigError, DisttrainError
from disttrain.parallel.ranks import data_ranks
from disttrain.tasks.base import Task

FOLDER: Final = "skipped"
_LOOK_EVERY: Final = 10
_NORMAL: Final = 1.4826
"""The median absolute deviation of normal numbers, times this, is their standard deviation."""


class UpdateGuard(Callback):
    """Leaves out updates that would harm the weights.

    Args:
        enabled: whether to look at all.
        spikes: robust deviations above the median of recent norms from which on an update is left out; 0 for never, so
            that only losses and gradients which are not finite are.
        window: steps that are recent. No spike is seen before a quarter of them.
        patience: updates left out in a row after which the run ends.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, *, enabled: bool = True, spikes: float = 0.0, window: int = 128, patience: int = 20) -> None:
        if spikes < 0 or (0 < spikes < 3):
            raise ConfigError(f"guard.spikes is {spikes}", mend="use 0 for none, or at least 3, such as 10")
        if window < 4 or patience < 1:
            raise ConfigError(
                f"guard.window is {window} and guard.patience {patience}",
                mend="use a window of 4 or more and a patience of 1 or more",
            )
        self.enabled, self.spikes, self.window, self.patience = enabled, spikes, window, patience
        self.skipped = 0
        """Updates left out in the run so far, as of the last look."""
        self._recent = torch.full((window,), math.nan, dtype=torch.float64)
        self._accepted = torch.zeros((), dtype=torch.int64)
        self._in_a_row = torch.zeros((), dtype=torch.int64)
        self._judged: tuple[Tensor, Tensor, Tensor] | None = None  # of the step under way: bad, loss, norm
        self._trainer: pl.Trainer | None = None
        self._found: list[tuple[int, int, float, float]] = []  # left out and not told yet: step, epoch, loss, norm
        self._unseen: list[tuple[int, int, Tensor]] = []  # step, epoch and those three, since the last look
        self._keys: dict[int, list[str]] = {}  # samples of this rank by step, since the last look
        self._fused: Optimizer | None = None

    def state_dict(self) -> dict[str, Any]:
        """What is usual, and how many were left out."""
        self._learn()  # a checkpoint may be taken before this callback's turn
        self._see()
        oldest = int(self._accepted) % self.window
        in_time = [*self._recent[oldest:].tolist(), *self._recent[:oldest].tolist()]
        recent = [value for value in in_time if not math.isnan(value)]
        return {"recent": recent, "in_a_row": int(self._in_a_row), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, of any layout."""
        recent = state_dict["recent"][-self.window :]
        self._recent[: len(recent)] = torch.tensor(recent, dtype=torch.float64)
        self._accepted.fill_(len(recent))
        self._in_a_row.fill_(state_dict["in_a_row"])
        self.skipped = int(state_dict["skipped"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch a task's updates."""
        if not self.enabled or trainer.precision == "16-mixed" or not isinstance(pl_module, Task):
            return
        device = pl_module.device
        self._recent, self._accepted = self._recent.to(device), self._accepted.to(device)
        self._in_a_row = self._in_a_row.to(device)
        self._trainer, pl_module.judge = trainer, self._judge

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the samples of a step until the next look."""
        if isinstance(pl_module, Task) and pl_module.judge is not None and data_ranks(trainer).leads:
            self._keys.setdefault(trainer.global_step + 1, []).extend(batch.get(KEY, []))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Learn from a step that is done, and look back at the last ones where that is due."""
        if trainer.fit_loop.epoch_loop._should_accumulate() or self._trainer is None:
            return
        self._learn()
        if trainer.global_step % _LOOK_EVERY == 0:
            self._look(trainer)

    def on_step_thrown_away(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget a step that was not done."""
        self._judged = None
        self._keys.pop(trainer.global_step + 1, None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the rest."""
        if self._trainer is not None:
            self._look(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch no more."""
        if self._trainer is not None and isinstance(pl_module, Task):
            self._trainer = pl_module.judge = None

    def _judge(self, optimizer: Optimizer, loss: Tensor, norm: Tensor) -> None:
        """Leave out the update of this step, if it would do harm. Called when its gradient is complete."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        if self.spikes:
            usual = self._recent.nanmedian()
            spread = (self._recent - usual).abs().nanmedian() * _NORMAL
            bad |= (norm > usual + self.spikes * spread) & (self._accepted >= self.window // 4)
        self._judged = (bad, loss.double(), norm.double())
        bare: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if norm.is_cuda and all(group.get("fused") for group in bare.param_groups):
            bare.found_inf, self._fused = bad.float(), bare  # what a loss scaler would set: the kernels look at it
        elif bool(bad):
            for group in bare.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # which an optimizer passes over, state and all

    def _learn(self) -> None:
        """Take account of a step that is done."""
        if self._judged is None or self._trainer is None:
            return
        (bad, loss, norm), self._judged = self._judged, None
        if self._fused is not None:
            del self._fused.found_inf  # type: ignore[attr-defined]
            self._fused = None
        here = torch.arange(self.window, device=norm.device) == self._accepted % self.window
        self._recent = torch.where(here & ~bad, norm, self._recent)
        self._accepted = self._accepted + ~bad
        self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
        place = (self._trainer.global_step, self._trainer.current_epoch)
        self._unseen.append((*place, torch.stack((bad.double(), loss, norm))))

    def _see(self) -> None:
        """Learn which of the last steps were left out."""
        if not self._unseen:
            return
        numbers = torch.stack([judged for _, _, judged in self._unseen]).tolist()
        for (step, epoch, _), (bad, loss, norm) in zip(self._unseen, numbers, strict=True):
            if bad:
                self._found.append((step, epoch, loss, norm))
                self.skipped += 1
        self._unseen.clear()

    def _look(self, trainer: pl.Trainer) -> None:
        """Tell what was left out since the last look; end the run where it is too much. A collective."""
        self._see()
        if self._found:
            self._tell(trainer, self._found)
            self._found.clear()
        self._keys.clear()
        in_a_row = int(trainer.strategy.reduce(self._in_a_row.float(), reduce_op="max"))
        if in_a_row >= self.patience:
            raise DisttrainError(
                f"the last {in_a_row} updates were left out, because loss or gradient were not finite"
                + (" or far above the usual" if self.spikes else ""),
                mend=f"see the samples in {_folder(trainer)}; resume from an older checkpoint with a lower learning"
                " rate or with gradient clipping",
            )

    def _tell(self, trainer: pl.Trainer, found: list[tuple[int, int, float, float]]) -> None:
        folder = _folder(trainer)
        ranks = data_ranks(trainer)
        if ranks.leads:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank-{trainer.global_rank:05d}.jsonl", "a") as file:
                for step, epoch, loss, norm in found:
                    place = {"step": step, "epoch": epoch, "loss": str(loss), "grad_norm": str(norm)}
                    file.write(json.dumps({**place, "keys": self._keys.get(step, [])}) + "\n")
        record = find_callback(trainer, RunRecord)
        if trainer.is_global_zero and record is not None:
            for step, _, loss, norm in found:
                text = f"step {step}: the update was left out; loss {loss:.4g}, gradient norm {norm:.4g}"
                print(f"disttrain: {text}", file=sys.stderr, flush=True)
                record.event(step, "skip", text)


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER
