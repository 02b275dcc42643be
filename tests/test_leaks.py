"""Trainings in one process, as in a notebook or a sweep, leave nothing behind: no thread, no descriptor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from disttrain import ShardedDataModule, Trainer
from recipes.digits import DigitsTask
from tests.support.ranks import run_ranks

FITS = 30


def held() -> tuple[int, int]:
    """Threads, those of C++ too, and descriptors of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def fit(run_dir: Path, data: Path) -> None:
    """A training with all that a Trainer brings, and a save in the background."""
    trainer = Trainer(run_dir=str(run_dir), max_steps=1, progress_bar=False)
    fields = {"image": "image.npy", "label": "cls"}
    trainer.fit(
        DigitsTask(widths=[8]),
        datamodule=ShardedDataModule(
            train=f"{data}/train.json", fields=fields, global_batch_size=16, micro_batch_size=16
        ),
    )


def count(folder: Path, data: Path) -> None:
    for number in range(2):  # what is made once a process
        fit(folder / f"first-{number}", data)
    before, after = held(), (0, 0)
    for number in range(FITS):
        fit(folder / f"run-{number}", data)
        after = held()
        # The data of the last one are closed when the next one begins; a group's threads take a moment to end.
        assert after[0] <= before[0] + 6, f"threads: {before[0]} before, {after[0]} after {number + 1} fits"
        assert after[1] <= before[1] + 12, f"descriptors: {before[1]} before, {after[1]} after {number + 1} fits"


@pytest.mark.slow
def test_thirty_fits_in_one_process_leak_nothing(digits: Path, tmp_path: Path) -> None:
    run_ranks(1, count, tmp_path, digits, folder=tmp_path / "logs", timeout=300).ok()
