"""A power cut at any moment loses no row, no event and no result that a checkpoint, or a complete run, stands for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.checkpoint.format.marker import MARKER, committed
from disttrain.cli import main
from disttrain.run.metrics_file import read_rows
from disttrain.system.reading import read_run
from tests.support.chaos import disk
from tests.support.kills import killed_at
from tests.support.power import Disk
from tests.support.ranks import run_ranks

STEPS = 12


def arguments(run_dir: Path, data: Path) -> list[str]:
    return [
        *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
        *(f"--data.{split}={data}/{split}.json" for split in ("train", "val", "test")),
        *("--trainer.max_steps", str(STEPS), "--model.schedule.name", "constant", "--trainer.log_every_steps", "1"),
        *("--checkpoint.every_steps", "4", "--checkpoint.keep_last", "3", "--trainer.validate_every_steps", "4"),
        *(
            "--trainer.callbacks+=disttrain.callbacks.records.sample_ledger.SampleLedger",
            "--trainer.progress_bar",
            "false",
        ),
        *("--checkpoint.save", "sync"),
    ]


def can_loop() -> bool:
    """Whether a disk image can be mounted here."""
    loops = os.path.exists("/dev/loop-control") and shutil.which("mkfs.ext4") is not None
    return loops and disk.can_mount()


def rows(run_dir: Path, below: int = STEPS) -> list[tuple[int, str, float]]:
    """The losses that were logged, in order, of the steps before one."""
    return [
        (row.step, name, value)
        for row in read_rows(run_dir / "metrics.csv")
        for name, value in row.values.items()
        if name.endswith("loss") and row.step < below
    ]


def fit_and_cut(folder: Path, data: Path) -> None:
    """Train, and keep what a power cut would leave after each marker and at the end, on both kinds of disk."""
    top, cuts = folder / "disk", folder / "cuts"
    top.mkdir()
    made: list[dict[str, Any]] = []

    def after(disk: Disk, path: Path) -> None:
        # write_synced names it once it is synced; the folder's own sync makes the checkpoint one.
        if path.name.startswith("step-") and (path / MARKER).exists():
            cut(disk, int(path.name[5:13]))

    def cut(disk: Disk, step: int) -> None:
        for names in ("synced", "all"):
            number = len(made)
            disk.image(cuts / str(number), names=names)
            made.append({"names": names, "step": step, "rows": rows(top / "runs" / "run", step)})

    with Disk(top, after).watching() as watched:
        assert main(arguments(top / "runs" / "run", data)) == 0
        cut(watched, STEPS)
    (folder / "made.json").write_text(json.dumps(made))


def train(arguments: list[str]) -> None:
    sys.exit(main(arguments))


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    """A disk image mounted as one whose data are written late and whose names early, as ext4 may do."""
    at.mkdir()
    options = "loop,noauto_da_alloc,commit=300"
    subprocess.run(["mount", "-t", "ext4", "-o", options, str(image), str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not can_loop(), reason="no ext4 image can be mounted here; the test above has a disk of its own")
def test_power_cuts_on_ext4(digits: Path, tmp_path: Path) -> None:
    """The disk as it is at the moment of a kill, with its journal replayed: every row up to the checkpoint is there.

    The run goes on from there, and ends with the rows, the result and the samples of one that nothing cut.
    """
    whole = tmp_path / "whole"
    run_ranks(1, train, arguments(whole, digits), folder=tmp_path / "logs").ok()
    for step in (6, 10, STEPS):  # the last one: after the end
        image, cut = tmp_path / f"disk-{step}.img", tmp_path / f"cut-{step}.img"
        with open(image, "wb") as file:
            file.truncate(128 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        more = killed_at(step) if step < STEPS else []
        with mounted(image, tmp_path / f"disk-{step}") as top:
            words = arguments(top / "run", digits) + more
            outcome = run_ranks(1, train, words, folder=tmp_path / "logs", timeout=300)
            assert outcome.codes == [-9 if step < STEPS else 0], outcome.text
            shutil.copyfile(image, cut)  # what the kernel has written by now
        with mounted(cut, tmp_path / f"cut-{step}") as top:
            run_dir, saved = top / "run", step // 4 * 4
            assert [entry.global_step for entry in committed(run_dir / "checkpoints")[0]][-1] == saved
            assert rows(run_dir, saved) == rows(whole, saved), f"cut at step {step}"
            assert (read_run(run_dir)["status"], (run_dir / "config.yaml").stat().st_size > 0) == (
                "completed" if step == STEPS else "running",
                True,
            )
            again = arguments(run_dir, digits)
            text = run_ranks(1, train, again, folder=tmp_path / "logs", timeout=300).ok().text
            told = "is already complete" if step == STEPS else f"resuming from {run_dir}/checkpoints/step-{saved:08d}"
            assert told in text, text
            assert rows(run_dir) == rows(whole), f"cut at step {step}: other rows at the end"
            assert read_run(run_dir)["result"] == read_run(whole)["result"]
            assert read_ledger(run_dir / "ledger") == read_ledger(whole / "ledger")


@pytest.mark.slow
def test_no_power_cut_loses_a_row(digits: Path, tmp_path: Path) -> None:
    """After each commit, and after the end, on the strictest disk and on one whose names are written first."""
    run_ranks(1, fit_and_cut, tmp_path, digits, folder=tmp_path / "logs", timeout=300).ok()
    made, whole = json.loads((tmp_path / "made.json").read_text()), tmp_path / "disk" / "runs" / "run"
    assert {cut["step"] for cut in made} == {4, 8, 12}
    assert len(made) >= 8
    for number, cut in enumerate(made):
        run_dir, told = tmp_path / "cuts" / str(number) / "runs" / "run", f"cut {number}: {cut}"
        steps = [entry.global_step for entry in committed(run_dir / "checkpoints")[0]]
        assert steps[-1:] == [cut["step"]], f"{told}: checkpoints {steps}"
        assert rows(run_dir, cut["step"]) == [tuple(row) for row in cut["rows"]], told
        assert (run_dir / "config.yaml").read_text() == (whole / "config.yaml").read_text(), told
        assert read_run(run_dir)["attempts"], told
        ledger = (run_dir / "ledger" / "rank-00000.jsonl").read_text().splitlines()
        assert {json.loads(line)["step"] for line in ledger} >= set(range(cut["step"])), told
        kinds = [json.loads(line)["kind"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
        assert kinds[0] == "attempt", told
    for number in (len(made) - 2, len(made) - 1):  # after the end
        run_dir = tmp_path / "cuts" / str(number) / "runs" / "run"
        for path in whole.rglob("*"):
            if path.is_file() and "tensorboard" not in path.parts:
                there = run_dir / path.relative_to(whole)
                assert there.read_bytes() == path.read_bytes(), f"{made[number]['names']}: {path.name} is lost"
        assert read_run(run_dir)["status"] == "completed"
