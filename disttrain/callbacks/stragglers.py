"""Which ranks are slow: quantiles of each rank's steps: data wait, forward, backward, communication, and the rest.

Ranks that train together take the same time for a step, since they wait for each other; the slow one is the
one that waits least. So what counts is the part of a step that a rank does alone: waiting for its data, the
forward passes with the callbacks before them, and under DDP the backward passes up to where the last gradient is there.
Communication is what follows that inside of a backward pass: the reduction that is not hidden, with the waiting for
others. Under FSDP the passes hold the gathering of weights and their waits, so the backward pass does not count as
alone. The rest is the optimizer, the callbacks, and what ranks wait for there: who is slow in those is not found out.

At the end, and every thousand steps, the ranks gather their quantiles; rank 0 puts them into ``run.json`` and
notes ranks that are slow. Cost: a few readings of a clock a micro batch (on CUDA four events, read when they are long
done) and one callback of the autograd engine, and one small gathering a thousand steps.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections import deque
from itertools import pairwise
from typing import Any, Final

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.callbacks.records.run_record import RunRecord
from disttrain.data.loader.loaders import TrainLoader
from disttrain.distributed.synchronize_errors import is_distributed
from disttrain.lightning.callback import Callback
from disttrain.strategies.build import DDP

WINDOW: Final = 1000  # steps
_FEWEST: Final = 10  # steps that tell anything
_SLOWER: Final = 1.25  # times the median rank's
_SHARE: Final = 0.05  # of a step
_PARTS: Final = ("forward", "backward", "communication")  # of a micro batch

Quantiles = dict[str, Any]
"""One rank's ``rank``, ``host``, whether its backward passes wait for no other (``backward_alone``), and the medians
and 95 % quantiles of its parts in seconds."""


class Stragglers(Callback):
    """Compares the ranks.

    Args:
        record: the run's record.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._steps: deque[tuple[float, ...]] = deque(maxlen=WINDOW)
        """Seconds: of the whole, of the data wait, and of the parts of a micro batch, summed over a step."""
        self._since: float | None = None
        self._waited = 0.0
        self._marks: list[Any] = []  # moments of the micro batch under way: its begin, the ends of its parts
        self._open: deque[list[Any]] = deque()  # such lists, whose moments the device may not have come to
        self._spent = [0.0] * len(_PARTS)  # in this step
        self._told: set[int] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first step of an attempt is not counted."""
        self._since = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A forward pass follows."""
        self._marks = [_now(pl_module)]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """The forward pass is over."""
        self._marks.append(_now(pl_module))
        marks = self._marks

        def begun(_: Tensor) -> None:
            # Called when all gradients are there, before those callbacks that wait for their reduction: these are
            # queued in the course of the backward pass, and this is at its begin.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: marks.append(_now(pl_module)))

        if loss.requires_grad:
            loss.register_hook(begun)  # type: ignore[no-untyped-call]

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The backward pass is over, with what it waits for."""
        self._marks.append(_now(pl_module))
        if len(self._marks) == len(_PARTS) + 1:
            self._open.append(self._marks)
        while self._open and _is_past(self._open[0][-1]):
            marks = self._open.popleft()
            for part, (begin, end) in enumerate(pairwise(marks)):
                self._spent[part] += _seconds(begin, end)
        self._marks = self._marks[-1:]  # a module that optimizes by hand may go on

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count a step, and compare the ranks where it is time."""
        now, loader = time.perf_counter(), trainer.train_dataloader
        waited = loader.wait_seconds if isinstance(loader, TrainLoader) else 0.0
        if self._since is not None:
            self._steps.append((now - self._since, waited - self._waited, *self._spent))
        self._since, self._waited, self._spent = now, waited, [0.0] * len(_PARTS)
        if trainer.global_step % WINDOW == 0:
            self._compare(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step after a validation is not counted: it holds the validation."""
        self._since = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nor is the one after a save."""
        self._since = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the ranks over the last steps."""
        self._compare(trainer)

    def _compare(self, trainer: pl.Trainer) -> None:
        """Gather all ranks' quantiles. A collective."""
        own = _quantiles(list(self._steps), trainer.global_rank)
        if own is not None:
            strategy = trainer.strategy
            own["backward_alone"] = isinstance(strategy, DDP) and not strategy.config.sync_batchnorm
        every: list[Quantiles | None] = [own]
        if is_distributed():
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, own)
        ranks = [each for each in every if each]
        if not trainer.is_global_zero or len(ranks) < len(every):
            return
        slow = find_slow(ranks)
        for rank in slow.keys() - self._told:
            self._record.event(trainer.global_step, "slow rank", slow[rank])
        self._told |= slow.keys()
        self._record.set_ranks(ranks)


def find_slow(ranks: list[Quantiles]) -> dict[int, str]:
    """The ranks that hold up the others, and a sentence about each."""
    names = {"wait": "data wait", "forward": "forward pass"}
    if all(each["backward_alone"] for each in ranks):
        names["backward"] = "backward pass"
    alone = {each["rank"]: sum(each[f"{name}_p50"] for name in names) for each in ranks}
    usual, found = statistics.median_low(alone.values()), {}
    for each in ranks:
        more = alone[each["rank"]] - usual
        if alone[each["rank"]] > _SLOWER * usual and more > _SHARE * each["step_p50"]:
            parts = ", ".join(f"{shown} {_ms(each[f'{name}_p50'])}" for name, shown in names.items())
            found[each["rank"]] = (
                f"rank {each['rank']} on {each['host']} holds up the others: of a step of {_ms(each['step_p50'])} it"
                f" takes {_ms(alone[each['rank']])} alone ({parts}), the median rank {_ms(usual)}"
            )
    return found


def _now(module: pl.LightningModule) -> Any:
    """This moment: of the host's clock, or of the device's stream."""
    if module.device.type != "cuda":
        return time.perf_counter()
    kind: Any = torch.cuda.Event
    event = kind(enable_timing=True)
    event.record()
    return event


def _is_past(moment: Any) -> bool:
    return isinstance(moment, float) or bool(moment.query())


def _seconds(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else float(begin.elapsed_time(end)) / 1000


def _quantiles(steps: list[tuple[float, ...]], rank: int) -> Quantiles | None:
    if len(steps) < _FEWEST:
        return None
    # seconds: (step, part); the parts are the whole, those measured, the rest
    parts = np.array([(*step, step[0] - sum(step[1:])) for step in steps])
    told: Quantiles = {"rank": rank, "host": platform.node(), "steps": len(steps)}
    for name, column in zip(("step", "wait", *_PARTS, "rest"), parts.T, strict=True):
        for quantile in (50, 95):
            told[f"{name}_p{quantile}"] = round(float(np.percentile(column, quantile)), 6)
    return told


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"
