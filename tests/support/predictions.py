"""A task whose predictions are of every kind, and ranks that write them or die over it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from disttrain import ParallelConfig, ShardedDataModule, Task, Trainer
from disttrain.callbacks.predictions import files as files_module
from disttrain.callbacks.predictions.callback import PredictionWriter
from disttrain.callbacks.predictions.files import Output

FIELDS = {"features": "features.npy", "label": "cls"}


class ManyKinds(Task):
    """Gives tensors of several types and shapes, and values that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(36.0).reshape(6, 6) / 100)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Shape (samples, 6)."""
        out: Tensor = self.layer(batch["features"])
        return out

    def predict(self, outputs: Tensor, batch: dict[str, Any]) -> dict[str, Any]:
        """One of each kind."""
        keys = batch["__key__"]
        return {
            "class": outputs.argmax(1),
            "score": outputs.double().sum(1),
            "sure": outputs[:, 0] > outputs[:, 1],
            "half": outputs[:, :2].half(),
            "short": outputs[:, :3].bfloat16(),
            "matrix": outputs.reshape(-1, 2, 3),
            "text": [f"this is {key}" for key in keys],
            "maybe": [None if int(key[-1]) % 2 else int(key[-1]) for key in keys],
            "ragged": [outputs[row, : int(key[-1]) % 4] for row, key in enumerate(keys)],
            "nested": [{"key": key, "parts": [1, 2.5]} for key in keys],
        }


class KillPredictionAt(Callback):
    """Kills its own process at the start of a micro batch of a rank.

    Args:
        rank: which rank.
        micro_batch: which of its micro batches.
    """

    def __init__(self, rank: int, micro_batch: int) -> None:
        self.rank, self.micro_batch = rank, micro_batch

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Die here."""
        if (trainer.global_rank, batch_idx) == (self.rank, self.micro_batch):
            os.kill(os.getpid(), signal.SIGKILL)


def predict(
    shards: list[str],
    outputs: list[Output],
    strategy: str = "ddp",
    kill: tuple[int, int] | str = "",
    **settings: Any,
) -> None:
    """Write predictions to some outputs, one after the other.

    Args:
        shards: what to predict on.
        outputs: where to.
        strategy: ``ddp`` or ``fsdp``.
        kill: rank and micro batch to die at, or ``publish``: rank 0 dies where all is made but has no name yet.
        settings: of the data module.
    """
    if kill == "publish":
        files_module.Workshop.publish = lambda self, shards: os.kill(  # type: ignore[method-assign]
            os.getpid(), signal.SIGKILL
        )
    for output in outputs:
        torch.manual_seed(0)
        callbacks: list[Callback] = [PredictionWriter(output)]
        if isinstance(kill, tuple):
            callbacks.append(KillPredictionAt(*kill))
        data = ShardedDataModule(predict=shards, fields=FIELDS, micro_batch_size=4, **settings)
        trainer = Trainer(
            run_dir=str(Path(output.path).parent / "run"),
            progress_bar=False,
            callbacks=callbacks,
            parallel=ParallelConfig(strategy=strategy),  # type: ignore[arg-type]
        )
        trainer.predict(ManyKinds(), datamodule=data, return_predictions=False)
        if trainer.is_global_zero:
            print(*callbacks[0].notes, sep="\n")  # type: ignore[attr-defined]


def content(path: Path) -> dict[str, bytes]:
    """What a file or folder holds, by name; sidecars and manifests too."""
    files = sorted(path.rglob("*")) if path.is_dir() else sorted(path.parent.glob(f"{path.stem}.*"))
    return {file.name: file.read_bytes() for file in files}


def hidden(folder: Path) -> list[str]:
    """What lies hidden in a folder."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]
