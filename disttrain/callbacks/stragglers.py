"""Which ranks are slow: quantiles of each rank's steps, split into data wait, forward pass and the rest.

Ranks that train together take the same time for a step, since they wait for each other; the slow one is the
one that waits least. So what counts is the part of a step that a rank does alone: waiting for its data, and the
forward passes with the callbacks before them. The rest, backward passes and communication, holds the waiting for
others. At the end, and every thousand steps, the ranks gather their quantiles; rank 0 puts them into ``run.json`` and
notes ranks that are slow. Cost: a few readings of a clock a step (on CUDA two events a micro batch, read when
they are long done), and one small gathering a thousand steps.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections import deque
from typing import Any, Final

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from disttrain.callbacks.find import find_callback
from disttrain.callbacks.run_record import RunRecord
from disttrain.data.loader import TrainLoader
from disttrain.parallel.agree import is_distributed

WINDOW: Final = 1000  # steps
_FEWEST: Final = 10  # steps that tell anything
_SLOWER: Final = 1.25  # times the median rank's
_SHARE: Final = 0.05  # of a step

Quantiles = dict[str, Any]
"""One rank's ``rank``, ``host``, and the medians and 95 % quantiles of its parts in seconds."""


class Stragglers(Callback):
    """Compares the ranks."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)  # (step, data wait, forward), seconds
        self._since: float | None = None
        self._began = 0.0
        self._waited = 0.0
        self._forward = 0.0
        self._events: deque[tuple[Any, Any]] = deque()  # begin and end of forward passes on CUDA
        self._told: set[int] = set()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A forward pass follows."""
        self._began = time.perf_counter()
        if pl_module.device.type == "cuda":
            event: Any = torch.cuda.Event
            self._events.append((event(enable_timing=True), event(enable_timing=True)))
            self._events[-1][0].record()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """The forward pass is over."""
        if pl_module.device.type == "cuda":
            self._events[-1][1].record()
            while self._events and self._events[0][1].query():
                begun, ended = self._events.popleft()
                self._forward += begun.elapsed_time(ended) / 1000
        else:
            self._forward += time.perf_counter() - self._began

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step where one has ended, and compare the ranks where it is time."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        now, loader = time.perf_counter(), trainer.train_dataloader
        waited = loader.wait_seconds if isinstance(loader, TrainLoader) else 0.0
        if self._since is not None:
            self._steps.append((now - self._since, waited - self._waited, self._forward))
        self._since, self._waited, self._forward = now, waited, 0.0
        if trainer.global_step % WINDOW == 0:
            self._compare(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step after a validation is not counted: it holds the validation."""
        self._since = None

    def on_roll_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nor is the one that holds the loading of a checkpoint."""
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
        every: list[Quantiles | None] = [own]
        if is_distributed():
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, own)
        ranks = [each for each in every if each]
        record = find_callback(trainer, RunRecord)
        if not trainer.is_global_zero or record is None or len(ranks) < len(every):
            return
        slow = find_slow(ranks)
        for rank in slow.keys() - self._told:
            record.event(trainer.global_step, "slow rank", slow[rank])
        self._told |= slow.keys()
        record.set_ranks(ranks)


def find_slow(ranks: list[Quantiles]) -> dict[int, str]:
    """The ranks that hold up the others, and a sentence about each."""
    alone = {each["rank"]: each["wait_p50"] + each["forward_p50"] for each in ranks}
    usual, found = statistics.median_low(alone.values()), {}
    for each in ranks:
        more = alone[each["rank"]] - usual
        if alone[each["rank"]] > _SLOWER * usual and more > _SHARE * each["step_p50"]:
            found[each["rank"]] = (
                f"rank {each['rank']} on {each['host']} holds up the others: of a step of {_ms(each['step_p50'])} it"
                f" takes {_ms(alone[each['rank']])} alone (data wait {_ms(each['wait_p50'])}, forward pass"
                f" {_ms(each['forward_p50'])}), the median rank {_ms(usual)}"
            )
    return found


def _quantiles(steps: list[tuple[float, float, float]], rank: int) -> Quantiles | None:
    if len(steps) < _FEWEST:
        return None
    # seconds: (step, part); the parts are the whole, data wait, forward, the rest
    parts = np.array([(step, wait, forward, step - wait - forward) for step, wait, forward in steps])
    told: Quantiles = {"rank": rank, "host": platform.node(), "steps": len(steps)}
    for name, column in zip(("step", "wait", "forward", "rest"), parts.T, strict=True):
        for quantile in (50, 95):
            told[f"{name}_p{quantile}"] = round(float(np.percentile(column, quantile)), 6)
    return told


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"
