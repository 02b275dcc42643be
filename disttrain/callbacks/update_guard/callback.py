"""Skip updates whose loss or gradient is not finite or far above normal; after too many in a row, roll the run back.

Loss and gradient norm of a step are sums over all ranks, and if a threshold decides, the ranks take the maximum of
their decisions: so either all ranks skip the update or none does. The step still counts, its schedule advances, and its
samples are listed under ``<run_dir>/skipped``. The baseline is the median over recent steps; a spike is a norm or a
loss more than ``spikes`` robust deviations above it (:mod:`disttrain.callbacks.update_guard.robust_statistics`).

``patience`` bad steps in a row suggest that the weights are already damaged, by steps just before them that passed as
normal. The run then rolls back to an earlier checkpoint, trains again, and skips those batches and some before them
(:mod:`disttrain.callbacks.update_guard.streak`); the steps in between are repeated bit-identically. After ``rollbacks``
rollbacks, the run ends with an error. To make this possible, a checkpoint older than the margin is kept regardless of
``keep_last``, and none is committed with weights that are not finite.

A :class:`~disttrain.tasks.base.Task` computes the loss over its global batch. For any other module with automatic
optimization, it is the mean over ranks of what ``training_step`` returned. A module with manual optimization is not
watched.

Guarantee: which steps are skipped depends neither on the layout, except for norms within rounding of the threshold, nor
on kills at any moment (:mod:`disttrain.callbacks.update_guard.rollback`). Cost: the norm of the gradient, which is also
logged, and one all-reduce of one number each with ``spikes`` and for a module that is not a task. On CUDA with a fused
optimizer the decision stays on the device, without synchronization; other optimizers there synchronize once per step,
and so does fused SGD with dampening until it has momentum. The host checks the results every ten steps, before
validations, and at the end of an epoch or run. ``16-mixed`` has its own rule and is not watched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from disttrain.callbacks.checkpointing.callback import Checkpointing
from disttrain.callbacks.checkpointing.guarded import Guarded
from disttrain.callbacks.records.run_record import RunRecord
from disttrain.callbacks.update_guard.robust_statistics import Usual
from disttrain.callbacks.update_guard.rollback import find_target, read_rollbacks, write_rollbacks
from disttrain.callbacks.update_guard.streak import Rollback, Streak, merged, planned_steps, roll_back
from disttrain.data.loader.batches import KEY
from disttrain.distributed.synchronize_errors import is_distributed, raise_together
from disttrain.errors import ConfigError, DisttrainError
from disttrain.lightning.callback import Callback
from disttrain.lightning.internals import ends_training, validation_follows
from disttrain.lightning.loops import FitLoop
from disttrain.optim import can_skip_on_device
from disttrain.parallel.gradients import norm_of
from disttrain.parallel.model.trained_parameters import class_name
from disttrain.parallel.ranks import data_ranks
from disttrain.run.attempts import AttemptOver
from disttrain.system.files import append_lines
from disttrain.system.terminal import tell
from disttrain.tasks.base import Task

FOLDER: Final = "skipped"
_LOOK_EVERY: Final = 10


class UpdateGuard(Callback):
    """Skips updates that would damage the weights, and rolls back if the weights may be damaged already.

    Args:
        enabled: whether to watch updates at all.
        spikes: skip updates this many robust deviations above the median of recent norms or losses; 0 skips only
            updates whose loss or gradient is not finite.
        window: number of recent steps. No spike is detected before a quarter of them.
        patience: skipped updates in a row after which the run rolls back to a checkpoint from before them.
        rollbacks: how often a run may roll back; it ends if it would have to once more, or has no such checkpoint.
        margin: batches just before such a streak that are also skipped after rolling back.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        spikes: float = 0.0,
        window: int = 128,
        patience: int = 20,
        rollbacks: int = 2,
        margin: int = 10,
    ) -> None:
        if spikes < 0 or (0 < spikes < 3):
            raise ConfigError(f"guard.spikes is {spikes}", hint="use 0 for none, or at least 3, such as 10")
        if window < 4 or patience < 1:
            raise ConfigError(
                f"guard.window is {window} and guard.patience {patience}",
                hint="use a window of 4 or more and a patience of 1 or more",
            )
        if rollbacks < 0 or margin < 0:
            raise ConfigError(f"guard.rollbacks is {rollbacks} and guard.margin {margin}", hint="use 0 or more")
        self.enabled, self.spikes, self.window, self.patience = enabled, spikes, window, patience
        self.max_rollbacks, self.margin = rollbacks, margin
        self.skipped = 0
        """Updates skipped in the run so far, as of the last check."""
        self.rollbacks: list[Rollback] = []
        """Rollbacks of the run so far."""
        self.checkpoints: Checkpointing | None = None
        """The callback that keeps the rollback targets; set by the Trainer, as is ``record``."""
        self.record: RunRecord | None = None
        self._planned: set[int] = set()  # steps that the rollbacks skip
        self._streak = Streak(patience)
        self._usual = Usual(window)
        self._loss: Tensor | None = None  # sum over this rank's micro batches, if the module is not a task
        self._judged: tuple[Tensor, Tensor, Tensor] | None = None  # of the current step: bad, loss, norm
        self._trainer: pl.Trainer | None = None
        self._found: list[tuple[int, int, float, float]] = []  # skipped, not reported yet: step, epoch, loss, norm
        self._unseen: list[tuple[int, int, Tensor]] = []  # step, epoch and (bad, loss, norm), since the last check
        self._keys: dict[int, list[str]] = {}  # this rank's samples by step, since the last check
        self._fused: Optimizer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have rollback targets kept; drop steps that an earlier attempt judged.

        Raises:
            ConfigError: ``spikes`` is set, but updates cannot be watched.
        """
        if stage != "fit":
            return
        self._judged = self._loss = self._fused = None
        self._unseen.clear()
        self._found.clear()
        self._keys.clear()
        watches = self.enabled and self._can_watch(trainer, pl_module)
        if self.checkpoints is not None:
            goes_back = self.max_rollbacks and isinstance(trainer.fit_loop, FitLoop)
            guarded = Guarded(self._streak_begins, self.margin if goes_back else None)
            self.checkpoints.guarded = guarded if watches else None

    def _can_watch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Return whether updates can be skipped here; print a warning if that may surprise."""
        if trainer.precision == "16-mixed":
            why, hint = "16-mixed leaves steps out by a rule of its own", "another trainer.precision"
        elif not pl_module.automatic_optimization:
            why = f"{class_name(pl_module)} optimizes by hand (automatic_optimization is False)"
            hint = "automatic optimization"
            if trainer.is_global_zero and not self.spikes:
                tell(f"the guard is off: {why}; losses that are not finite spoil the weights")
        else:
            return True
        if self.spikes:
            raise ConfigError(
                f"guard.spikes is {self.spikes:g}, but {why}", hint=f"set guard.spikes to 0, or use {hint}"
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics, the number of skipped updates, and the rollbacks."""
        self._learn()  # a checkpoint may be saved before this callback's hook runs
        self._see()
        return {
            **self._usual.state(),
            "skipped": self.skipped,
            "streak": self._streak.state(),
            "rollbacks": [each.as_dict() for each in self.rollbacks],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint from any layout."""
        self._usual.load(state_dict)
        self.skipped = int(state_dict["skipped"])
        self._streak.clear()
        if "streak" in state_dict:  # older checkpoints have none
            self._streak.load(state_dict["streak"])
        self._plan([Rollback(**entry) for entry in state_dict.get("rollbacks", [])])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start watching; read rollbacks that are newer than the checkpoint. Collective."""
        if not self.enabled or trainer.precision == "16-mixed" or not pl_module.automatic_optimization:
            return
        recorded: list[Rollback] = []
        with raise_together():
            if trainer.is_global_zero:
                recorded = read_rollbacks(_folder(trainer))
        self._plan(trainer.strategy.broadcast(recorded))
        self._trainer = trainer
        if isinstance(pl_module, Task):
            pl_module.judge = self._judge

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the samples of a step until the next check."""
        if self._trainer is not None and isinstance(batch, dict) and data_ranks(trainer).leads:
            self._keys.setdefault(trainer.global_step + 1, []).extend(batch.get(KEY, []))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Sum the loss of a module that does not do so itself."""
        if self._trainer is not None and not isinstance(pl_module, Task):
            loss = loss.detach().double()
            self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Judge the step of a module that is not a task. Collective."""
        if self._trainer is None or isinstance(pl_module, Task):
            return
        loss, self._loss = self._loss, None
        if loss is None:  # its training_step skipped all micro batches of this rank
            loss = torch.zeros((), dtype=torch.float64, device=pl_module.device)
        if is_distributed():
            dist.all_reduce(loss)
            loss = loss / dist.get_world_size()
        self._judge(optimizer, loss, norm_of(trainer.strategy)(pl_module.parameters()))

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Update the statistics after a step; check the last steps if due."""
        if self._trainer is None:
            return
        self._learn()
        # Check before a validation, which may end the run; damaged weights are not worth validating either.
        validates = validation_follows(trainer)
        if trainer.global_step % _LOOK_EVERY == 0 or validates or ends_training(trainer):
            self._look(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the remaining skipped updates, if the run ended other than by its limits."""
        if self._trainer is not None:
            self._tell(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching."""
        self._trainer = None
        if isinstance(pl_module, Task):
            pl_module.judge = None

    def _judge(self, optimizer: Optimizer, loss: Tensor, norm: Tensor) -> None:
        """Skip the update of this step if it would do damage. Call when its gradient is complete."""
        assert self._trainer is not None
        norm = norm.to(loss.device)  # with offloading, the norm is on the CPU
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        if self.spikes:
            bad |= self._usual.is_spike(norm, loss, deviations=self.spikes)
            if is_distributed():  # the norms of ranks may differ in the last bit
                agreed = bad.float()
                dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
                bad = agreed > 0
        if self._trainer.global_step + 1 in self._planned:
            bad = torch.ones_like(bad)
        self._judged = (bad, loss.double(), norm.double())
        bare: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if can_skip_on_device(bare):
            bare.found_inf, self._fused = bad.float(), bare  # as GradScaler would: fused kernels read it
        elif bool(bad):
            for group in bare.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # optimizers skip such parameters, including their state

    def _learn(self) -> None:
        """Add a completed step to the statistics."""
        if self._judged is None or self._trainer is None:
            return
        (bad, loss, norm), self._judged = self._judged, None
        if self._fused is not None:
            del self._fused.found_inf  # type: ignore[attr-defined]
            self._fused = None
        self._usual.add(norm, loss, but=bad)
        place = (self._trainer.global_step, self._trainer.current_epoch)
        self._unseen.append((*place, torch.stack((bad.double(), loss, norm))))

    def _see(self) -> None:
        """Fetch from the device which of the last steps were skipped."""
        if not self._unseen:
            return
        numbers = torch.stack([judged for _, _, judged in self._unseen]).tolist()
        for (step, epoch, _), (bad, loss, norm) in zip(self._unseen, numbers, strict=True):
            self._streak.add(step, left_out=bool(bad), planned=step in self._planned)
            if bad:
                self._found.append((step, epoch, loss, norm))
                self.skipped += 1
        self._unseen.clear()

    def _look(self, trainer: pl.Trainer) -> None:
        """Report updates skipped since the last check; roll back or end the run if there are too many. Collective."""
        self._see()
        self._tell(trainer)
        if not self._streak.too_long:
            return
        if self.max_rollbacks and isinstance(trainer.fit_loop, FitLoop):
            if len(self.rollbacks) < self.max_rollbacks:
                self._roll_back(trainer)
            self._give_up(trainer, f"; the run has gone back {_times(len(self.rollbacks))} already")
        self._give_up(trainer, "")

    def _roll_back(self, trainer: pl.Trainer) -> None:
        """End this attempt; the next one resumes from a checkpoint from before the streak. Collective.

        Raises:
            AttemptOver: always, unless there is no checkpoint to roll back to.
        """
        checkpoints, step, number = self.checkpoints, trainer.global_step, len(self._streak.bad)
        if checkpoints is None:
            self._give_up(trainer, "; the run keeps no checkpoints to go back to")
        assert checkpoints is not None
        checkpoints.settle(trainer)
        target = find_target(trainer, checkpoints, self._streak, margin=self.margin)
        if target is None:
            self._give_up(trainer, f"; there is no checkpoint from before step {self._streak.first} to go back to")
        assert target is not None
        made = roll_back(self._streak, from_step=step, to_step=target.global_step, margin=self.margin)
        rollbacks = [*self.rollbacks, made]
        with raise_together():
            if trainer.is_global_zero:
                checkpoints.forget_after(made.to_step)
                write_rollbacks(_folder(trainer), rollbacks)
        self._plan(rollbacks)
        record = self.record
        if trainer.is_global_zero and record is not None:
            text = (
                f"step {step}: {number} updates in a row were left out; going back to {target.path.name}, from where"
                f" on the batches of steps {made.first_skipped} to {made.last_skipped} are left out"
            )
            tell(text)
            record.tell(step, "rollback", text, **made.as_dict())
        raise AttemptOver(target.path)

    def _give_up(self, trainer: pl.Trainer, why: str) -> None:
        """End the run on all ranks. Collective.

        Raises:
            DisttrainError: always; a ``RankError`` on ranks other than 0.
        """
        with raise_together():
            raise DisttrainError(
                f"the last {len(self._streak.bad)} updates were left out, because loss or gradient were not finite"
                + (" or far above the usual" if self.spikes else "")
                + why,
                hint=f"see the samples in {_folder(trainer)}; resume from an older checkpoint with a lower learning"
                " rate or with gradient clipping; checkpoint.every_steps and keep_last say what there is to go back to,"
                " guard.rollbacks how often",
            )

    def _plan(self, rollbacks: list[Rollback]) -> None:
        """Also skip the steps of these rollbacks."""
        self.rollbacks = merged(self.rollbacks, rollbacks)
        self._planned = planned_steps(self.rollbacks)

    def _streak_begins(self) -> int:
        """Return the first step of the current streak of skipped updates, or 0."""
        self._learn()
        self._see()
        return self._streak.first

    def _tell(self, trainer: pl.Trainer) -> None:
        """Report updates skipped since the last report, with their samples."""
        self._see()
        folder, ranks = _folder(trainer), data_ranks(trainer)
        found, self._found = self._found, []
        if ranks.leads and found:
            lines = []
            for step, epoch, loss, norm in found:
                place = {"step": step, "epoch": epoch, "loss": str(loss), "grad_norm": str(norm)}
                planned = {"planned": True} if step in self._planned else {}
                lines.append(json.dumps({**place, **planned, "keys": self._keys.get(step, [])}) + "\n")
            append_lines(folder / f"rank-{trainer.global_rank:05d}.jsonl", "".join(lines))
        self._keys.clear()
        record = self.record
        if trainer.is_global_zero and record is not None:
            for step, _, loss, norm in found:
                if step in self._planned:  # reported with the rollback
                    continue
                text = f"step {step}: the update was left out; loss {loss:.4g}, gradient norm {norm:.4g}"
                tell(text)
                record.tell(step, "skip", text)


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
