"""One result a sample, in the plain order, at any world size.

Each rank holds a contiguous run of the plain order and writes it to a part of its own; rank 0 joins the parts
in rank order and publishes the file atomically. A line is a JSON object with the sample's key first.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from disttrain.data.batches import KEY
from disttrain.parallel.agree import raise_together


class PredictionWriter(Callback):
    """Writes predictions as JSON lines.

    Args:
        path: the file to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open this rank's part."""
        with raise_together():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._part(trainer.global_rank), "w")

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a micro batch."""
        assert self._file is not None
        columns = {
            name: values.tolist() if isinstance(values, torch.Tensor) else values for name, values in outputs.items()
        }
        for row in range(len(columns[KEY])):
            line = {"key" if name == KEY else name: values[row] for name, values in columns.items()}
            self._file.write(json.dumps(line) + "\n")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Join the parts."""
        assert self._file is not None
        self._file.close()
        trainer.strategy.barrier("predictions")
        with raise_together():
            if trainer.is_global_zero:
                self._join(trainer.world_size)

    def _join(self, num_ranks: int) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        parts = [self._part(rank) for rank in range(num_ranks)]
        with open(temporary, "wb") as whole:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, whole)
        os.replace(temporary, self.path)
        for part in parts:
            part.unlink()

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f".{self.path.name}.part-{rank:05d}")
