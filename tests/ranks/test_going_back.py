"""A run that goes on from an earlier checkpoint than its newest, by choice or not, keeps what it does from then on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from disttrain.checkpoint.format.marker import abandoned, committed
from disttrain.cli import main
from disttrain.run.folder import best_checkpoint
from disttrain.system.reading import read_run
from tests.support.kills import killed_at
from tests.support.preemption import Stop
from tests.support.ranks import Outcome, run_ranks
from tests.support.weights import differing, final_weights

STEPS = 14


def fit(run_dir: Path, data: Path, *more: str, ranks: int = 1, **environment: str) -> Outcome:
    """Train a small network on digits; a checkpoint every 4 steps, those of 8, 16, ... kept for good."""
    arguments = [
        *("fit", "--model", "tests.support.tasks.PlainDigits", "--data.fields", "{image: image.npy, label: cls}"),
        *(f"--data.{split}={data}/{split}.json" for split in ("train", "val")),
        *("--data.global_batch_size", "32", "--data.micro_batch_size", "8", "--trainer.run_dir", str(run_dir)),
        *("--trainer.max_steps", str(STEPS), "--trainer.validate_every_steps", "5", "--trainer.progress_bar", "false"),
        *("--checkpoint.every_steps", "4", "--checkpoint.keep_every_steps", "8", "--checkpoint.save", "sync"),
        *("--guard.enabled", "false"),  # it keeps more
        *more,
    ]
    return run_ranks(ranks, train, arguments, environment, folder=run_dir.parent / f"{run_dir.name}-logs")


def train(arguments: list[str], environment: dict[str, str]) -> None:
    """A rank, in the environment of a job."""
    os.environ |= environment
    sys.exit(main(arguments))


def there(run_dir: Path) -> tuple[list[int], list[int]]:
    """Steps of the checkpoints that count, and of those that were set aside."""
    folder = run_dir / "checkpoints"
    return [entry.global_step for entry in committed(folder)[0]], [entry.global_step for entry in abandoned(folder)]


@pytest.mark.slow
def test_a_run_goes_back_twice_and_ends_as_if_it_had_not(digits: Path, tmp_path: Path) -> None:
    """Past a damaged checkpoint; then to a named one, in a SLURM job, which is started again with the same command."""
    run_dir, ranks = tmp_path / "run", 2
    fit(run_dir, digits, *killed_at(13), ranks=ranks)
    folder = run_dir / "checkpoints"
    assert there(run_dir) == ([8, 12], [])
    damaged = folder / "step-00000012" / "__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)

    def stopped(step: int, *more: str, **environment: str) -> str:
        outcome = fit(run_dir, digits, *Stop("train", step - 1).arguments(), *more, ranks=ranks, **environment)
        assert outcome.codes == [75] * ranks, outcome.text
        return outcome.outputs[0]

    text = stopped(10)
    assert "is damaged: __0_0.distcp (" in text
    assert "renamed to step-00000012.abandoned" in text
    assert f"the same command goes on from checkpoint {folder}/step-00000010" in text
    assert there(run_dir) == ([8, 10], [12])
    assert (folder / "LATEST").read_text() == "step-00000010\n"

    named, job = ("--resume", str(folder / "step-00000008")), {"SLURM_JOB_ID": "21"}
    text = stopped(9, *named, **job)
    assert "renamed to step-00000010.abandoned" in text
    assert f"--resume auto goes on from checkpoint {folder}/step-00000009" in text
    assert there(run_dir) == ([8, 9], [10, 12])
    assert "abandoned" in [event["text"] for event in read_run(run_dir)["events"] if event["kind"] == "start"][-1]

    text = fit(run_dir, digits, *named, ranks=ranks, **job, SLURM_RESTART_COUNT="1").ok().outputs[0]
    assert f"restarted by SLURM, so --resume {named[1]} is treated as auto" in text
    assert there(run_dir) == ([8, STEPS], [])
    assert [attempt["from_step"] for attempt in read_run(run_dir)["attempts"]] == [0, 8, 8, 9]
    fit(tmp_path / "whole", digits, ranks=ranks).ok()
    assert not differing(final_weights(tmp_path / "whole"), final_weights(run_dir))


@pytest.mark.slow
def test_the_best_of_another_folder_is_not_replaced_by_a_worse_one(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its highest loss the best is the first, which the second folder does not have."""
    first, second = tmp_path / "first", tmp_path / "second"
    best = ("--early_stopping.monitor", "val/loss", "--early_stopping.mode", "max", "--early_stopping.patience", "9")
    fit(first, digits, *best, *killed_at(13))
    assert there(first) == ([5, 8, 12], [])
    assert best_checkpoint(first, "best").name == "step-00000005", "of a run that was interrupted, too"
    text = fit(second, digits, *best, "--resume", str(first / "checkpoints" / "step-00000012")).ok().text
    assert "at step 5, is of no checkpoint in this folder" in text
    assert "(step 5) are of no checkpoint here: the last stay" in text
    assert there(second) == ([STEPS], []), "a worse one was kept as the best"
    assert read_run(second)["best"]["step"] == 5
    table = next(
        line for line in text.splitlines() if line.split("│")[1:2] == [" checkpoint "] or "checkpoint  " in line
    )
    assert "step-" not in table, "the table shows a checkpoint as the best that is not"
    whole = tmp_path / "whole"
    fit(whole, digits, "--early_stopping.restore_best", "false").ok()
    assert not differing(final_weights(whole), final_weights(second)), "other weights than the last were restored"
    capsys.readouterr()
    assert best_checkpoint(whole, "best", tell=print).name == f"step-{STEPS:08d}"
    assert "holds a monitored metric: using the newest" in capsys.readouterr().out
