"""Convert between a run's position in optimizer steps and Lightning's loop counters.

This is the only module that converts between micro batches and steps. Lightning keeps about sixty counters of micro
batches. They depend on the accumulation, which changes with the number of ranks, so they are not saved. A checkpoint
holds three numbers instead, and the counters are rebuilt for the layout that resumes. Three numbers suffice because
checkpoints are saved at step boundaries, after any validation due there.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl

from disttrain.errors import CheckpointError


@dataclass(frozen=True)
class Progress:
    """A step boundary of a run.

    Attributes:
        epoch: epochs completed.
        step: optimizer steps done in the current epoch.
        global_step: optimizer steps done in total.
    """

    epoch: int
    step: int
    global_step: int

    def as_dict(self) -> dict[str, int]:
        """Return the numbers as a dictionary, for a file."""
        return asdict(self)


def epochs_done(trainer: pl.Trainer) -> int:
    """Return the number of completed epochs."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    return int(epochs.processed)


def steps_into_epoch(trainer: pl.Trainer) -> int:
    """Return the number of optimizer steps begun in the current epoch."""
    return micro_batches_into_epoch(trainer) // trainer.accumulate_grad_batches


def micro_batches_into_epoch(trainer: pl.Trainer) -> int:
    """Return the number of micro batches begun in the current epoch."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def micro_batch_of_step(trainer: pl.Trainer) -> int:
    """Return the index of the current micro batch within its optimizer step on this rank, from 0."""
    return trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches


def micro_batch_of_global_batch(trainer: pl.Trainer, rank: int) -> int:
    """Return the index of the current micro batch within the global batch; each rank has a contiguous range.

    Args:
        trainer: the trainer.
        rank: this rank's data-parallel rank.
    """
    return rank * trainer.accumulate_grad_batches + micro_batch_of_step(trainer)


def steps_per_epoch(trainer: pl.Trainer) -> float:
    """Return the optimizer steps per epoch once the loader is set up; infinite if it has no length."""
    batches = trainer.num_training_batches
    return batches if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def progress_of(trainer: pl.Trainer) -> Progress:
    """Return the position of a trainer.

    Raises:
        CheckpointError: it is within a step, whose accumulated gradients would be lost.
    """
    loop = trainer.fit_loop
    micro, accumulation = loop.epoch_loop.batch_progress.current.ready, trainer.accumulate_grad_batches
    epochs: Any = loop.epoch_progress.current
    if epochs.started == epochs.processed:  # between two epochs: the counters are still those of the last one
        if micro and not loop.epoch_loop.batch_progress.is_last_batch:  # the run ended within the epoch
            return Progress(epochs.processed - 1, micro // accumulation, trainer.global_step)
        return Progress(epochs.processed, 0, trainer.global_step)
    if micro % accumulation and not loop.epoch_loop.batch_progress.is_last_batch:
        raise CheckpointError(
            f"a checkpoint was asked for after micro batch {micro % accumulation} of {accumulation} of step"
            f" {trainer.global_step}, whose gradients it would lose",
            hint="save in on_step_end of a disttrain.Callback",
        )
    return Progress(epochs.processed, -(-micro // accumulation), trainer.global_step)


def loop_state(trainer: pl.Trainer, progress: Progress) -> dict[str, Any]:
    """Return the state of Lightning's fit loop at a step boundary, for this trainer's accumulation."""
    state: dict[str, Any] = trainer.fit_loop.state_dict()
    accumulation = trainer.accumulate_grad_batches
    begun = progress.epoch + (1 if progress.step else 0)
    names = ("ready", "started", "processed", "completed")
    done = dict.fromkeys(names, progress.epoch)
    state["epoch_progress"] = {scope: {**done, "ready": begun, "started": begun} for scope in ("total", "current")}
    batches = state["epoch_loop.batch_progress"]
    batches["total"] = dict.fromkeys(names, progress.global_step * accumulation)
    batches["current"] = dict.fromkeys(names, progress.step * accumulation)
    batches["is_last_batch"] = False
    optimizer = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for part, count_names in (("step", ("ready", "completed")), ("zero_grad", ("ready", "started", "completed"))):
        optimizer[part]["total"] = dict.fromkeys(count_names, progress.global_step)
        optimizer[part]["current"] = dict.fromkeys(count_names, progress.step)
    by_hand = state["epoch_loop.manual_optimization.optim_step_progress"]
    scheduler = state["epoch_loop.scheduler_progress"]
    for counts in (by_hand, scheduler):
        counts["total"] = dict.fromkeys(("ready", "completed"), progress.global_step)
        counts["current"] = dict.fromkeys(("ready", "completed"), progress.step)
    state["epoch_loop.state_dict"] = {"_batches_that_stepped": progress.global_step}
    return state


def plateau_state(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what metric-based schedules need at a resume: whether they are due, and their metrics.

    Metrics averaged over an epoch's steps are listed separately: a resumed run can only average the rest of the epoch.
    """
    monitors = {config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
    if not monitors:
        return {}
    loop: Any = trainer.fit_loop.epoch_loop
    found = {str(name): float(trainer.callback_metrics[name]) for name in monitors if name in trainer.callback_metrics}
    means = {result.meta.name for result in loop._results.values() if result.meta.on_epoch}
    return {"due": loop.plateaus_due, "metrics": found, "means": sorted(str(name) for name in monitors & means)}


def restore_plateaus(trainer: pl.Trainer, state: dict[str, Any], progress: Progress) -> None:
    """Restore what :func:`plateau_state` returned into the training loop; an empty state resets it."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop.plateaus_due, loop.resumed_metrics = state.get("due", False), state.get("metrics")
    if progress.step and state.get("means"):
        warnings.warn(
            f"a schedule waits for {state['means'][0]}, a mean over an epoch's steps: at the end of the epoch that is"
            " resumed, that is the mean of the steps from here on. Monitor a validation metric, or save at ends of"
            " epochs (checkpoint.every_epochs)",
            stacklevel=4,
        )
