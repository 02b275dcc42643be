"""A step whose loss or gradient is not finite, or far above the usual, changes nothing; after too many a run goes back.

Loss and gradient norm of a step are sums over all ranks, and where a threshold decides, the ranks take the maximum of
their decisions: so all leave the update out together or none does. The step still counts, its schedule moves on, and
its samples are listed under ``<run_dir>/skipped``. What is usual is the median over recent steps; a spike is a
norm, or a loss, further above it than ``spikes`` robust deviations
(:mod:`disttrain.callbacks.update_guard.robust_statistics`).

``patience`` bad steps in a row say that the weights may be harmed already, by steps just before that passed for usual.
The run then goes back to a checkpoint from before, trains again, and leaves out those batches and some before them
(:mod:`disttrain.callbacks.update_guard.streak`); what it does in between is the same to the bit. After ``rollbacks`` of
these, it ends with one error. For that, a checkpoint older than the margin is kept whatever ``keep_last`` says, and
none is committed whose weights are not finite.

A :class:`~disttrain.tasks.base.Task` knows the loss over its global batch. Of any other module that Lightning
optimizes, it is the mean of what ``training_step`` gave on all ranks. A module that optimizes by hand is not watched.

Guarantee: which steps are left out does not depend on the layout, but for norms within rounding of the threshold; nor
on kills, at whatever moment (:mod:`disttrain.callbacks.update_guard.rollback`). Cost: the norm of the gradient, which
is also logged, and one all-reduce of a number each with ``spikes`` and for a module that is no task. On CUDA with a
fused optimizer the device decides and nothing waits for it; other optimizers there wait once a step, and so does fused
SGD with dampening until it has momentum. The host looks at what happened every ten steps, before validations, and at
the end of an epoch or run. ``16-mixed`` has its own rule and is left alone.
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
    """Leaves out updates that would harm the weights, and goes back where weights may be harmed already.

    Args:
        enabled: whether to look at all.
        spikes: robust deviations above the median of recent norms, or of recent losses, from which on an update is left
            out; 0 for never, so that only losses and gradients which are not finite are.
        window: steps that are recent. No spike is seen before a quarter of them.
        patience: updates left out in a row after which the run goes back to a checkpoint from before them.
        rollbacks: how often a run may go back; once more ends it, and so does having no such checkpoint.
        margin: batches just before such a row that are left out too after going back.

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
        """Updates left out in the run so far, as of the last look."""
        self.rollbacks: list[Rollback] = []
        """Those of the run so far."""
        self.checkpoints: Checkpointing | None = None
        """The callback that keeps the checkpoints to roll back to; set by the Trainer, as is ``record``."""
        self.record: RunRecord | None = None
        self._planned: set[int] = set()  # steps that they leave out
        self._streak = Streak(patience)
        self._usual = Usual(window)
        self._loss: Tensor | None = None  # of this rank's micro batches up to now, of a module that is no task
        self._judged: tuple[Tensor, Tensor, Tensor] | None = None  # of the step under way: bad, loss, norm
        self._trainer: pl.Trainer | None = None
        self._found: list[tuple[int, int, float, float]] = []  # left out and not told yet: step, epoch, loss, norm
        self._unseen: list[tuple[int, int, Tensor]] = []  # step, epoch and those three, since the last look
        self._keys: dict[int, list[str]] = {}  # samples of this rank by step, since the last look
        self._fused: Optimizer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have the checkpoints kept that the run may have to roll back to; forget steps that an earlier attempt judged.

        Raises:
            ConfigError: ``spikes`` are asked for where no step can be watched.
        """
        if stage != "fit":
            return
        self._judged = self._loss = self._fused = None
        self._unseen.clear()
        self._keys.clear()
        watches = self.enabled and self._can_watch(trainer, pl_module)
        if self.checkpoints is not None:
            goes_back = self.max_rollbacks and isinstance(trainer.fit_loop, FitLoop)
            guarded = Guarded(self._streak_begins, self.margin if goes_back else None)
            self.checkpoints.guarded = guarded if watches else None

    def _can_watch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether updates can be left out here; says so where that may surprise."""
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
        """What is usual, how many were left out, and which are to be."""
        self._learn()  # a checkpoint may be taken before this callback's turn
        self._see()
        return {
            **self._usual.state(),
            "skipped": self.skipped,
            "streak": self._streak.state(),
            "rollbacks": [each.as_dict() for each in self.rollbacks],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, of any layout."""
        self._usual.load(state_dict)
        self.skipped = int(state_dict["skipped"])
        self._streak.clear()
        if "streak" in state_dict:  # older checkpoints have none
            self._streak.load(state_dict["streak"])
        self._plan([Rollback(**entry) for entry in state_dict.get("rollbacks", [])])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the updates; know the rollbacks that the checkpoint does not know of. A collective."""
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
        """Remember the samples of a step until the next look."""
        if self._trainer is not None and isinstance(batch, dict) and data_ranks(trainer).leads:
            self._keys.setdefault(trainer.global_step + 1, []).extend(batch.get(KEY, []))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add up the loss of a module that does not do so itself."""
        if self._trainer is not None and not isinstance(pl_module, Task):
            loss = loss.detach().double()
            self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Judge the step of a module that does not say when it is to be judged. A collective."""
        if self._trainer is None or isinstance(pl_module, Task):
            return
        loss, self._loss = self._loss, None
        if loss is None:  # its training_step left the micro batches of this rank out
            loss = torch.zeros((), dtype=torch.float64, device=pl_module.device)
        if is_distributed():
            dist.all_reduce(loss)
            loss = loss / dist.get_world_size()
        self._judge(optimizer, loss, norm_of(trainer.strategy)(pl_module.parameters()))

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learn from a step that is done, and look back at the last ones where that is due."""
        if self._trainer is None:
            return
        self._learn()
        # A validation may end the run; and what follows a streak is not worth validating.
        validates = validation_follows(trainer)
        if trainer.global_step % _LOOK_EVERY == 0 or validates or ends_training(trainer):
            self._look(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell of the rest, where something else than this run's limits ended it."""
        if self._trainer is not None:
            self._tell(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch no more."""
        self._trainer = None
        if isinstance(pl_module, Task):
            pl_module.judge = None

    def _judge(self, optimizer: Optimizer, loss: Tensor, norm: Tensor) -> None:
        """Leave out the update of this step, if it would do harm. Called when its gradient is complete."""
        assert self._trainer is not None
        norm = norm.to(loss.device)  # that of offloaded gradients is on the CPU
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
        self._usual.add(norm, loss, but=bad)
        place = (self._trainer.global_step, self._trainer.current_epoch)
        self._unseen.append((*place, torch.stack((bad.double(), loss, norm))))

    def _see(self) -> None:
        """Learn which of the last steps were left out."""
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
        """Tell what was left out since the last look; go back, or end the run, where it is too much. On all ranks."""
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
        """End this attempt, and have the next one resume from a checkpoint from before the streak. A collective.

        Raises:
            AttemptOver: always, unless there is nothing to roll back to.
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
        """End the run on all ranks. A collective.

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
        """Leave out what these say, too."""
        self.rollbacks = merged(self.rollbacks, rollbacks)
        self._planned = planned_steps(self.rollbacks)

    def _streak_begins(self) -> int:
        """The first of the steps in a row that were left out up to now, or 0."""
        self._learn()
        self._see()
        return self._streak.first

    def _tell(self, trainer: pl.Trainer) -> None:
        """List what was left out since the last time, with the samples."""
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
                if step in self._planned:  # the rollback has told
                    continue
                text = f"step {step}: the update was left out; loss {loss:.4g}, gradient norm {norm:.4g}"
                tell(text)
                record.tell(step, "skip", text)


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
