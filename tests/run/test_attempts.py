"""Attempts that follow one another in one process are resumes, and leave nothing of the one before."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from disttrain import EMA, Callback, Checkpointing, Trainer
from disttrain.errors import ConfigError
from disttrain.run.attempts import AttemptOver
from disttrain.run.metrics_file import read_rows
from disttrain.system.reading import read_run
from tests.support import foreign

STEPS = 12


class OverAt(Callback):
    """Ends the attempt at a step, once, to have the next one resume from the checkpoint before; counts hooks."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.hooks: Counter[str] = Counter()
        self.handlers: list[Any] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.hooks["setup"] += 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.handlers.append(signal.getsignal(signal.SIGTERM))

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.step and not self.hooks["over"]:
            self.hooks["over"] += 1
            assert isinstance(trainer, Trainer)
            checkpoints = trainer.checkpoints
            assert checkpoints is not None
            checkpoints.settle(trainer)
            assert checkpoints.newest is not None
            raise AttemptOver(checkpoints.newest)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.hooks["fit end"] += 1

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.hooks["exception"] += 1

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.hooks["teardown"] += 1


class Noting(CSVLogger):
    """Notes how it is closed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.statuses: list[str] = []

    def finalize(self, status: str) -> None:
        self.statuses.append(status)
        super().finalize(status)


def fit(folder: Path, *callbacks: Callback) -> tuple[foreign.Plain, Noting]:
    """Train a module and loaders of Lightning's kind; a checkpoint every three steps, a validation every four."""
    saving = Checkpointing(every_steps=3, keep_last=20)
    trainer = foreign.trainer_of(folder, *callbacks, saving, max_steps=STEPS, validate_every_steps=4, log_every_steps=2)
    logger = Noting(folder / "other")
    trainer.loggers.append(logger)
    module, data = foreign.Evaluated(), foreign.Numbers(40)
    trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=8), resume="auto")
    return module, logger


def test_the_next_attempt_is_a_resume_that_starts_clean(tmp_path: Path) -> None:
    straight, _ = fit(tmp_path / "straight")
    before, threads = signal.getsignal(signal.SIGTERM), set(threading.enumerate())
    again = OverAt(8)  # a validation is due there, and skipped
    module, logger = fit(tmp_path / "again", again)
    assert torch.equal(foreign.whole(straight), foreign.whole(module))
    assert again.hooks == {"setup": 2, "over": 1, "fit end": 1, "teardown": 2}
    assert logger.statuses == ["success", "success"]
    assert len(again.handlers) == 2
    assert before not in again.handlers, "signals are not noted in the second attempt"
    assert signal.getsignal(signal.SIGTERM) == before
    for thread in set(threading.enumerate()) - threads:  # that of the signals ends by itself
        thread.join(10)
        assert not thread.is_alive(), f"{thread.name} is left over"
    record = read_run(tmp_path / "again")
    assert record["status"] == "completed"
    assert [attempt["to_step"] for attempt in record["attempts"]] == [STEPS]
    rows, wanted = (
        [(row.step, row.epoch, row.values.get("train/loss")) for row in read_rows(tmp_path / name / "metrics.csv")]
        for name in ("again", "straight")
    )
    assert rows == wanted


def test_a_fit_that_resumes_finds_where_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path / "run")
    capsys.readouterr()
    fit(tmp_path / "run")
    assert "the run in this folder is complete" in capsys.readouterr().err
    assert [attempt["from_step"] for attempt in read_run(tmp_path / "run")["attempts"]] == [0, STEPS]
    trainer = foreign.trainer_of(tmp_path / "run")
    with pytest.raises(ConfigError, match="given both resume and ckpt_path"):
        trainer.fit(foreign.Plain(), DataLoader(foreign.Numbers()), ckpt_path="x", resume="auto")


class Brings(foreign.Plain):
    """Brings a callback of its own to each fit, and a metric that counts its micro batches."""

    def __init__(self) -> None:
        super().__init__()
        self.micro_batches = SumMetric()

    def configure_callbacks(self) -> list[pl.Callback]:
        return [EMA()]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.micro_batches.update(1)
        return super().training_step(batch, batch_idx)


def test_what_a_module_brings_is_that_of_the_next_attempt(tmp_path: Path) -> None:
    module, saving, loader = Brings(), Checkpointing(every_steps=3), DataLoader(foreign.Numbers(40), batch_size=4)
    trainer = foreign.trainer_of(tmp_path / "run", OverAt(8), saving, max_steps=9, validate_every_steps=4)
    assert trainer.check_val_every_n_epoch is None, "Lightning's EarlyStopping checks at the ends of epochs"
    trainer.fit(module, loader)
    assert trainer.global_step == 9
    assert int(module.micro_batches.compute()) == 3, "steps that were undone are in a metric"
    with pytest.raises(ConfigError, match="has trained 9 steps would not train"):
        trainer.fit(module, loader, resume="never")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
