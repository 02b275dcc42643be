"""Report once, after the first training step, what ``compile: blocks`` compiled and where the graphs break.

The run's record keeps this under ``compile``, updated at the end of training. Cost: none in later steps.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from disttrain.callbacks.records.run_record import RunRecord
from disttrain.parallel.model.compile import Compilation, compilation
from disttrain.system.terminal import tell


class CompileReport(Callback):
    """Reports graph breaks on rank 0 and in ``run.json``.

    Args:
        record: the run's record.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._told = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report after the first micro batch, when everything used in training has been compiled."""
        if self._told or not trainer.is_global_zero:
            return
        self._told = True
        found = compilation()
        text = describe(found)
        tell(text)
        self._record.event(trainer.global_step, "compile", text)
        self._record.add({"compile": found.as_dict()})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record everything compiled by then, including for evaluation."""
        if trainer.is_global_zero:
            self._record.add({"compile": compilation().as_dict()})


def describe(found: Compilation) -> str:
    """Describe graphs and breaks in one sentence."""
    graphs = f"compiled {found.graphs} graph{'s' * (found.graphs != 1)}"
    if not found.breaks:
        return f"{graphs} without a break"
    total = sum(found.breaks.values())
    reasons = "; ".join(f"{reason} ({count} x)" for reason, count in found.breaks.items())
    return f"{graphs} with {total} break{'s' * (total != 1)}, which cost speed: {reasons}"
