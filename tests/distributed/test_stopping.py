"""Ranks stop at one step, on the exact metric, whatever their own losses; patience survives a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from disttrain.checkpoint.store import committed, read_model
from disttrain.runs import read_run
from tests.support.ranks import Outcome, run_cli
from tests.support.weights import differing


def fit(run_dir: Path, data: Path, ranks: int, *more: str) -> Outcome:
    """Train until the validation loss falls by less than 0.05 in two times five steps."""
    arguments = [
        *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
        *(f"--data.{split}={data}/{split}.json" for split in ("train", "val", "test")),
        *("--data.global_batch_size", "64", "--data.micro_batch_size", "16"),
        *("--model.optimizer", "{name: sgd, lr: 0.05, momentum: 0.9}", "--model.schedule.name", "constant"),
        *("--trainer.validate_every_steps", "5", "--early_stopping.patience", "2"),
        *("--early_stopping.min_delta", "0.05"),
        *("--trainer.max_epochs", "20"),
        *more,
    ]
    return run_cli(ranks, arguments, folder=run_dir.parent / f"{run_dir.name}-logs")


def test_all_ranks_stop_at_the_step_at_which_one_process_stops(digits: Path, tmp_path: Path) -> None:
    runs = {}
    for ranks in (1, 4):
        run_dir = tmp_path / str(ranks)
        outcome = fit(run_dir, digits, ranks).ok()
        runs[ranks] = read_run(run_dir)
        assert "has not improved" in outcome.text
    steps = {ranks: run["attempts"][-1]["to_step"] for ranks, run in runs.items()}
    assert len(set(steps.values())) == 1, f"stopped at steps {steps}"
    assert steps[1] < 20 * 19, "the run came to its end instead of stopping early"
    bests = {ranks: run["best"]["step"] for ranks, run in runs.items()}
    assert len(set(bests.values())) == 1, f"best at steps {bests}"


@pytest.mark.slow
def test_patience_and_best_survive_a_resume(digits: Path, tmp_path: Path) -> None:
    fit(tmp_path / "whole", digits, 2).ok()
    whole = read_run(tmp_path / "whole")
    stop, best = whole["attempts"][-1]["to_step"], whole["best"]
    assert stop == best["step"] + 10, "two validations without improvement, five steps apart"
    # Killed between the two validations that did not improve: one of two is used up.
    killed = tmp_path / "killed"
    kill = ("--trainer.callbacks+=tests.support.callbacks.KillAt", f"--trainer.callbacks.step={stop - 2}")
    every = ("--checkpoint.every_steps", "1", "--checkpoint.save", "sync")
    assert fit(killed, digits, 2, *every, *kill).codes == [-9, -9]
    fit(killed, digits, 2, *every).ok()
    resumed = read_run(killed)
    assert resumed["attempts"][-1]["from_step"] == stop - 2
    assert resumed["attempts"][-1]["to_step"] == stop
    assert resumed["best"] == best
    assert resumed["stop_reason"] == whole["stop_reason"]


@pytest.mark.slow
def test_a_run_that_had_decided_to_stop_stays_stopped(digits: Path, tmp_path: Path) -> None:
    """Killed after the decision was saved, before the end: the resumed run does not train on."""
    run_dir = tmp_path / "run"
    fit(run_dir, digits, 1).ok()
    stopped = read_run(run_dir)
    (run_dir / "run.json").write_text((run_dir / "run.json").read_text().replace('"completed"', '"running"'))
    fit(run_dir, digits, 1).ok()
    again = read_run(run_dir)
    assert [a["to_step"] for a in again["attempts"]] == [stopped["attempts"][0]["to_step"]] * 2
    assert again["result"] == stopped["result"]


@pytest.mark.slow
def test_best_weights_are_restored(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit(run_dir, digits, 2).ok()
    best = read_run(run_dir)["best"]["step"]
    there = {c.global_step: c.path for c in committed(run_dir / "checkpoints")[0]}
    assert best in there, f"the best checkpoint was pruned; there are {sorted(there)}"
    assert differing(read_model(there[best]), read_model(there[max(there)]))
    # The test after training used the best weights: testing that checkpoint gives the same numbers.
    arguments = [
        *("test", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
        *(f"--data.test={digits}/test.json", "--data.micro_batch_size", "16"),
        *("--checkpoint_path", str(there[best])),
    ]
    text = run_cli(1, arguments, folder=tmp_path / "test").ok().text
    for name, value in read_run(run_dir)["result"].items():
        assert f"{value:.6f}" in text, f"{name} was {value:.6f} after training\n{text}"
    assert torch.isfinite(torch.tensor(read_run(run_dir)["best"]["value"]))
