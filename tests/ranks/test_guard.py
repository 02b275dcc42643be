"""Updates that would harm the weights are left out by all ranks together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disttrain.system.reading import read_run
from tests.support.ranks import Outcome, run_cli
from tests.support.shards import npy, write_shard
from tests.support.weights import differing, final_weights

STEPS, GLOBAL = 12, 16
LARGE = 163  # of the ninth step, by when it is known what is usual


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of six features, of which one is not a number and one is far too large."""
    folder = tmp_path_factory.mktemp("poisoned")
    draw = np.random.default_rng(3)
    samples = []
    for number in range(STEPS * GLOBAL):
        features = draw.normal(size=6).astype(np.float32)
        label = int(features[0] > 0)
        if number == 77:
            features[2] = np.nan
        if number == LARGE:
            features *= 1e4
        samples.append({"__key__": f"s{number:03d}", "features.npy": npy(features), "cls": str(label).encode()})
    write_shard(folder / "train-0.tar", samples)
    return folder


def fit(run_dir: Path, data: Path, ranks: int, parallel: str, *more: str) -> Outcome:
    """Train for an epoch."""
    arguments = [
        *("fit", "--model", "tests.support.tasks.FeatureTask", "--data.train", f"{data}/train-0.tar"),
        *("--data.fields", "{features: features.npy, label: cls}", "--data.global_batch_size", str(GLOBAL)),
        *("--data.micro_batch_size", "4", "--trainer.max_steps", str(STEPS), "--trainer.parallel", parallel),
        *("--trainer.run_dir", str(run_dir), "--checkpoint.every_steps", "2", "--checkpoint.keep_last", "20"),
        *("--checkpoint.save", "sync"),
        *("--trainer.callbacks+=disttrain.SampleLedger", *more),
    ]
    return run_cli(ranks, arguments, folder=run_dir.parent / f"{run_dir.name}-logs")


def skipped(run_dir: Path) -> dict[int, dict[str, Any]]:
    """What the ranks wrote about updates left out, by step; samples of all ranks."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted((run_dir / "skipped").glob("rank-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            keys = found.get(line["step"], {"keys": []})["keys"] + line["keys"]
            found[line["step"]] = {**line, "keys": keys}
    return found


SPIKES = ("--guard.spikes", "20", "--guard.window", "16")
LAYOUTS = [(1, "{reduction: tree}"), (2, "{reduction: tree}"), (2, "{strategy: fsdp, reduction: tree}")]


def test_all_ranks_leave_out_the_same_updates(poisoned: Path, tmp_path: Path) -> None:
    weights = []
    for place, (ranks, parallel) in enumerate(LAYOUTS):
        run_dir = tmp_path / f"run{place}"
        text = fit(run_dir, poisoned, ranks, parallel, *SPIKES).ok().text
        found = skipped(run_dir)
        keys = {key: step for step, line in found.items() for key in line["keys"]}
        assert len(found) == 2, f"skipped steps {sorted(found)}"
        assert {"s077", f"s{LARGE}"} <= keys.keys()
        assert all(len(line["keys"]) == GLOBAL for line in found.values())
        assert found[keys["s077"]]["loss"] == "nan"
        assert float(found[keys[f"s{LARGE}"]]["grad_norm"]) > 100
        events = [event for event in read_run(run_dir)["events"] if event["kind"] == "skip"]
        assert [event["step"] for event in events] == sorted(found)
        assert text.count("the update was left out") == 2
        weights.append(final_weights(run_dir))
        assert all(bool(torch.isfinite(value).all()) for value in weights[-1].values())
    for other in weights[1:]:
        assert not differing(weights[0], other)


@pytest.mark.parametrize("parallel", ["{}", pytest.param("{strategy: fsdp}", marks=pytest.mark.slow)])
def test_a_module_that_is_no_task_is_watched_too(poisoned: Path, tmp_path: Path, parallel: str) -> None:
    module = ("--model", "tests.support.tasks.PlainFeatures", "--trainer.gradient_clip_norm", "5")
    fit(tmp_path / "run", poisoned, 2, parallel, *SPIKES, *module).ok()
    found = skipped(tmp_path / "run")
    keys = {key: step for step, line in found.items() for key in line["keys"]}
    assert sorted(found) == sorted({keys["s077"], keys[f"s{LARGE}"]})
    assert all(len(line["keys"]) == GLOBAL for line in found.values())
    assert found[keys["s077"]]["loss"] == "nan"
    assert float(found[keys[f"s{LARGE}"]]["grad_norm"]) > 100
    assert all(bool(value.isfinite().all()) for value in final_weights(tmp_path / "run").values())


def test_a_module_that_optimizes_by_hand_is_not_and_is_told_so(poisoned: Path, tmp_path: Path) -> None:
    module = (
        "--model",
        "tests.support.tasks.PlainFeatures",
        "--model.by_hand",
        "true",
        "--data.micro_batch_size",
        "16",
    )
    refused = fit(tmp_path / "refused", poisoned, 1, "{}", *SPIKES, *module)
    assert refused.codes == [2], refused.text
    assert "guard.spikes is 20, but PlainFeatures optimizes by hand" in refused.text
    assert "hint: set guard.spikes to 0, or use automatic optimization" in refused.text
    text = fit(tmp_path / "run", poisoned, 1, "{}", *module).ok().text
    assert text.count("the guard is off: PlainFeatures optimizes by hand (automatic_optimization is False)") == 1


def test_a_spike_of_the_loss_alone_is_one(poisoned: Path, tmp_path: Path) -> None:
    task = ("--model", "tests.support.tasks.LossSpikeTask")
    fit(tmp_path / "run", poisoned, 2, "{}", *SPIKES, *task).ok()
    found = skipped(tmp_path / "run")
    step = next((step for step, line in found.items() if f"s{LARGE}" in line["keys"]), None)
    assert step is not None, f"skipped steps {sorted(found)}"
    assert float(found[step]["loss"]) > 100
    assert float(found[step]["grad_norm"]) < 10


def test_nothing_changes_in_a_step_that_is_left_out(poisoned: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit(run_dir, poisoned, 1, "{}", "--checkpoint.every_steps", "1", *SPIKES).ok()
    from disttrain.checkpoint.format.reader import read_model

    for step in skipped(run_dir):
        before, after = (read_model(run_dir / "checkpoints" / f"step-{at:08d}") for at in (step - 1, step))
        assert not differing(before, after), f"step {step} changed weights"


@pytest.mark.slow
def test_what_is_usual_survives_a_kill(poisoned: Path, tmp_path: Path) -> None:
    fit(tmp_path / "straight", poisoned, 2, "{reduction: tree}", *SPIKES).ok()
    for step in (3, 9):
        kill = "--trainer.callbacks"
        words = (f"{kill}+=tests.support.callbacks.KillAt", f"{kill}.step={step}", f"{kill}.micro_batch=0")
        fit(tmp_path / "killed", poisoned, 2, "{reduction: tree}", *SPIKES, *words)
    fit(tmp_path / "killed", poisoned, 1, "{reduction: tree}", *SPIKES).ok()
    assert not differing(final_weights(tmp_path / "straight"), final_weights(tmp_path / "killed"))


def test_without_the_guard_one_sample_spoils_the_run(poisoned: Path, tmp_path: Path) -> None:
    fit(tmp_path / "run", poisoned, 1, "{}", "--guard.enabled", "false").ok()
    assert not skipped(tmp_path / "run")
    assert any(not bool(torch.isfinite(value).all()) for value in final_weights(tmp_path / "run").values())


def test_too_many_in_a_row_end_the_run_on_all_ranks(poisoned: Path, tmp_path: Path) -> None:
    more = ("--model.lr", "1e30", "--guard.patience", "3")
    outcome = fit(tmp_path / "run", poisoned, 2, "{}", *more)
    assert set(outcome.codes) == {2}, outcome.text
    assert "updates were left out, because loss or gradient were not finite" in outcome.text.replace("\n", " ")
    assert "Traceback" not in outcome.text
