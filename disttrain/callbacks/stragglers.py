"""Find slow ranks from quantiles of each rank's step time: data wait, forward, backward, communication, and the rest.

Ranks that train together have the same step time, since they wait for each other; the slow rank is the one that waits
least. So the ranks are compared by the time a rank spends on its own: waiting for its data, the forward passes with the
callbacks before them, and under DDP the backward passes until the last gradient is computed. Communication is the rest
of a backward pass: reduction that is not overlapped, and waiting for other ranks. Under FSDP, the passes include
all-gathers and their waits, so the backward pass is not counted. The rest is the optimizer, the callbacks and the waits
in them; a rank that is slow there is not detected.

At the end and every thousand steps, the ranks gather their quantiles; rank 0 writes them to ``run.json`` and reports
slow ranks. Cost: a few clock readings per micro batch (on CUDA, four events, read long after they completed), one
autograd engine callback, and one small gather per thousand steps.
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
_FEWEST: Final = 10  # steps for a meaningful comparison
_SLOWER: Final = 1.25  # times the median rank's
_SHARE: Final = 0.05  # of a step
_PARTS: Final = ("forward", "backward", "communication")  # of a micro batch

Quantiles = dict[str, Any]
"""One rank's ``rank``, ``host``, whether its backward passes do not wait for other ranks (``backward_alone``), and the
medians and 95% quantiles of its parts in seconds."""


class Stragglers(Callback):
    """Compares the ranks' step times.

    Args:
        record: the run's record.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._steps: deque[tuple[float, ...]] = deque(maxlen=WINDOW)
        """Per step, in seconds: the total, the data wait, and each part of a micro batch, summed over the step."""
        self._since: float | None = None
        self._waited = 0.0
        self._marks: list[Any] = []  # timestamps of the current micro batch: its start, the ends of its parts
        self._open: deque[list[Any]] = deque()  # earlier ones, which the device may not have reached
        self._spent = [0.0] * len(_PARTS)  # seconds per part in this step
        self._told: set[int] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exclude the first step of an attempt."""
        self._since = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Mark the start of a forward pass."""
        self._marks = [_now(pl_module)]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Mark the end of the forward pass, and arrange to mark the end of the backward computation."""
        self._marks.append(_now(pl_module))
        marks = self._marks

        def begun(_: Tensor) -> None:
            # The engine runs its callbacks in the order they were queued, once all gradients are computed. This one
            # is queued first, at the start of the pass; DDP queues the one that waits for the reduction during it.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: marks.append(_now(pl_module)))

        if loss.requires_grad:
            loss.register_hook(begun)  # type: ignore[no-untyped-call]

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark the end of the backward pass, including its communication."""
        self._marks.append(_now(pl_module))
        if len(self._marks) == len(_PARTS) + 1:
            self._open.append(self._marks)
        while self._open and _is_past(self._open[0][-1]):
            marks = self._open.popleft()
            for part, (begin, end) in enumerate(pairwise(marks)):
                self._spent[part] += _seconds(begin, end)
        self._marks = self._marks[-1:]  # with manual optimization, another backward pass may follow

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record a step; compare the ranks every thousand steps."""
        now, loader = time.perf_counter(), trainer.train_dataloader
        waited = loader.wait_seconds if isinstance(loader, TrainLoader) else 0.0
        if self._since is not None:
            self._steps.append((now - self._since, waited - self._waited, *self._spent))
        self._since, self._waited, self._spent = now, waited, [0.0] * len(_PARTS)
        if trainer.global_step % WINDOW == 0:
            self._compare(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exclude the step after a validation, since its time includes the validation."""
        self._since = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Exclude the step after a save."""
        self._since = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the ranks over the last steps."""
        self._compare(trainer)

    def _compare(self, trainer: pl.Trainer) -> None:
        """Gather all ranks' quantiles; report slow ranks. Collective."""
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
    """Return the ranks that slow down the others, with a sentence about each."""
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
    """Return the current time of the host clock or, on CUDA, an event recorded in the stream."""
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
    # in seconds, (step, part); the parts are the total, the measured ones, and the rest
    parts = np.array([(*step, step[0] - sum(step[1:])) for step in steps])
    told: Quantiles = {"rank": rank, "host": platform.node(), "steps": len(steps)}
    for name, column in zip(("step", "wait", *_PARTS, "rest"), parts.T, strict=True):
        for quantile in (50, 95):
            told[f"{name}_p{quantile}"] = round(float(np.percentile(column, quantile)), 6)
    return told


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"
