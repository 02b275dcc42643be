"""After too many bad steps in a row a run goes back to a checkpoint, and trains on without those batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.checkpoint.format.reader import committed
from disttrain.data.order.sample_order import Order, OrderConfig
from disttrain.run.metrics_file import read_rows
from disttrain.system.reading import read_run
from tests.support.ranks import Outcome, run_cli
from tests.support.shards import Sample, npy, write_shard
from tests.support.weights import differing, final_weights

STEPS, GLOBAL = 24, 16
STREAK = (13, 14, 15)
TREE = "{reduction: tree}"
FSDP = "{strategy: fsdp, reduction: tree}"
GUARD = ("--guard.patience", "3", "--guard.margin", "2")
SPOILT = "--trainer.callbacks+=tests.support.troubles.SpoilWeights"
LEFT_OUT = [11, 12, 13, 14, 15]
"""What these leave out: the streak and two steps before it; the checkpoint is that of step 8."""


def write_data(folder: Path, bad_steps: tuple[int, ...]) -> Path:
    """Samples of six features; in each of some steps' batches, one is not a number."""
    return write_samples(folder, STEPS, sick_samples(STEPS, 0, bad_steps))


def sick_samples(steps: int, epoch: int, bad_steps: tuple[int, ...]) -> set[int]:
    """One sample of each of some steps of an epoch."""
    ids = Order([steps * GLOBAL], OrderConfig(GLOBAL)).sample_ids(epoch, 0, steps)
    return {int(ids[step - 1, step % GLOBAL]) for step in bad_steps}


def write_samples(folder: Path, steps: int, sick: set[int], spoil: float = np.nan) -> Path:
    """A shard for so many steps, some of whose samples have one feature of that value."""
    folder.mkdir(exist_ok=True)
    samples = [sample(number, spoil if number in sick else None) for number in range(steps * GLOBAL)]
    write_shard(folder / "train-0.tar", samples)
    return folder


def sample(number: int, spoil: float | None = None) -> Sample:
    """A sample of its own, which may be spoilt."""
    features = np.random.default_rng(number).normal(size=6).astype(np.float32)
    label = int(features[0] > 0)
    if spoil is not None:
        features[2] = spoil
    return {"__key__": f"s{number:03d}", "features.npy": npy(features), "cls": str(label).encode()}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with a streak."""
    return write_data(tmp_path_factory.mktemp("poisoned"), STREAK)


def fit(run_dir: Path, data: Path, ranks: int, parallel: str, *more: str) -> Outcome:
    """Train for an epoch, with checkpoints every four steps."""
    arguments = [
        *("fit", "--model", "tests.support.tasks.FeatureTask", "--data.train", f"{data}/train-0.tar"),
        *("--data.fields", "{features: features.npy, label: cls}", "--data.global_batch_size", str(GLOBAL)),
        *("--data.micro_batch_size", "4", "--trainer.max_steps", str(STEPS), "--trainer.parallel", parallel),
        *("--trainer.run_dir", str(run_dir), "--checkpoint.every_steps", "4", "--checkpoint.keep_last", "20"),
        *("--trainer.log_every_steps", "2", "--trainer.callbacks+=disttrain.SampleLedger"),
        *("--trainer.callbacks+=disttrain.EMA", *more),
    ]
    return run_cli(ranks, arguments, folder=run_dir.parent / f"{run_dir.name}-logs")


def extra(name: str, **settings: Any) -> list[str]:
    """The arguments for a callback of the tests."""
    flag = "--trainer.callbacks"
    return [f"{flag}+=tests.support.callbacks.{name}", *(f"{flag}.{key}={value}" for key, value in settings.items())]


@pytest.fixture(scope="module")
def reference(poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank in which exactly those batches make no update, from the beginning and without the guard."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    fit(run_dir, poisoned, 1, TREE, "--guard.enabled", "false", *extra("LeaveOut", steps=LEFT_OUT)).ok()
    return run_dir


def rollbacks(run_dir: Path) -> list[dict[str, Any]]:
    """The rollbacks that a run's record lists."""
    return [event for event in read_run(run_dir)["events"] if event["kind"] == "rollback"]


def test_a_streak_takes_the_run_back_and_its_batches_out(poisoned: Path, reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    text = fit(run_dir, poisoned, 2, TREE, *GUARD).ok().text
    assert text.count("going back to step-00000008") == 1
    assert not differing(final_weights(reference), final_weights(run_dir))
    told = rollbacks(run_dir)
    places = {"from_step": 20, "to_step": 8, "first_skipped": 11, "last_skipped": 15}
    assert [{name: event[name] for name in places} for event in told] == [places]
    assert json.loads((run_dir / "skipped" / "rollbacks.json").read_text())["rollbacks"] == [places]
    files = sorted((run_dir / "skipped").glob("rank-*.jsonl"))
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    keys = {step: [key for line in lines if line["step"] == step for key in line["keys"]] for step in LEFT_OUT}
    ledger = read_ledger(run_dir / "ledger")
    assert {step: sorted(set(keys[step])) for step in keys} == {step: sorted(ledger[step - 1]) for step in keys}
    assert sorted(ledger) == list(range(STEPS))
    assert ledger == read_ledger(reference / "ledger")
    assert [row.step for row in read_rows(run_dir / "metrics.csv") if "train/loss" in row.values] == list(
        range(2, STEPS + 1, 2)
    )
    assert len(read_run(run_dir)["attempts"]) == 1
    assert [entry.global_step for entry in committed(run_dir / "checkpoints")[0]] == list(range(4, STEPS + 1, 4))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(1, TREE), (2, FSDP), (4, TREE)])
def test_every_layout_goes_back_to_the_same_weights(
    poisoned: Path, reference: Path, tmp_path: Path, ranks: int, parallel: str
) -> None:
    fit(tmp_path / "run", poisoned, ranks, parallel, *GUARD).ok()
    assert len(rollbacks(tmp_path / "run")) == 1
    assert not differing(final_weights(reference), final_weights(tmp_path / "run"))


@pytest.mark.parametrize(
    ("place", "first", "second"),
    [
        ("recorded", (2, TREE), (1, TREE)),
        pytest.param("deleted", (2, TREE), (2, FSDP), marks=pytest.mark.slow),
        pytest.param("before-record", (1, TREE), (2, TREE), marks=pytest.mark.slow),
        pytest.param("restore", (2, FSDP), (2, TREE), marks=pytest.mark.slow),
        pytest.param("replay", (2, TREE), (2, FSDP), marks=pytest.mark.slow),
        pytest.param("replay", (2, FSDP), (1, TREE), marks=pytest.mark.slow),
    ],
)
def test_a_kill_around_a_rollback_changes_nothing(
    poisoned: Path, reference: Path, tmp_path: Path, place: str, first: tuple[int, str], second: tuple[int, str]
) -> None:
    run_dir = tmp_path / "run"
    more = {"step": 13} if place == "replay" else {}
    killed = fit(run_dir, poisoned, *first, *GUARD, *extra("KillInRollback", place=place, **more))
    assert -9 in killed.codes, killed.text
    fit(run_dir, poisoned, *second, *GUARD).ok()
    assert not differing(final_weights(reference), final_weights(run_dir))
    recorded = json.loads((run_dir / "skipped" / "rollbacks.json").read_text())["rollbacks"]
    assert [(each["to_step"], each["first_skipped"], each["last_skipped"]) for each in recorded] == [(8, 11, 15)]
    assert read_ledger(run_dir / "ledger") == read_ledger(reference / "ledger")


def test_copies_of_steps_that_are_gone_back_from_are_not_resumed(
    poisoned: Path, reference: Path, tmp_path: Path
) -> None:
    run_dir, copies = tmp_path / "run", tmp_path / "copies"
    mirror = ("--checkpoint.mirror.url", copies.as_uri(), "--checkpoint.keep_last", "2")
    killed = fit(run_dir, poisoned, 2, TREE, *GUARD, *mirror, *extra("KillInRollback", place="recorded"))
    assert -9 in killed.codes, killed.text
    there = sorted(path.parent.name.partition(".")[0] for path in copies.glob("*/COMMITTED"))
    assert there[-1] == "step-00000008", there
    fit(run_dir, poisoned, 1, TREE, *GUARD, *mirror).ok()
    assert read_run(run_dir)["attempts"][-1]["from_step"] == 8
    assert not differing(final_weights(reference), final_weights(run_dir))


@pytest.mark.slow
def test_a_run_asked_to_stop_in_the_step_of_a_rollback_stops_after_it(
    poisoned: Path, reference: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    stopped = fit(run_dir, poisoned, 2, TREE, *GUARD, *extra("SignalAt", phase="train", step=19, ranks="[1]"))
    assert stopped.codes == [75, 75], stopped.text
    assert "stopped at step 8 by SIGTERM on rank 1" in stopped.text
    fit(run_dir, poisoned, 2, FSDP, *GUARD).ok()
    assert len(rollbacks(run_dir)) == 1
    assert not differing(final_weights(reference), final_weights(run_dir))


@pytest.mark.slow
def test_a_micro_batch_size_that_is_found_survives(poisoned: Path, reference: Path, tmp_path: Path) -> None:
    short = ("--trainer.callbacks+=tests.support.memory.Shortage", "--trainer.callbacks.phase=forward")
    more = ("--data.micro_batch_size", "auto", *short, "--trainer.callbacks.limit=4", "--trainer.callbacks.step=17")
    fit(tmp_path / "run", poisoned, 1, FSDP, *GUARD, *more).ok()
    assert read_run(tmp_path / "run")["attempts"][0]["micro_batch_size"] == 4
    assert len(rollbacks(tmp_path / "run")) == 1
    assert read_ledger(tmp_path / "run" / "ledger") == read_ledger(reference / "ledger")


@pytest.mark.slow
def test_the_checkpoint_to_go_back_to_is_kept_while_a_streak_lasts(poisoned: Path, tmp_path: Path) -> None:
    """With one checkpoint kept, that of step 16 would have replaced the last good one, of step 12."""
    more = ("--guard.margin", "0", "--checkpoint.keep_last", "1")
    text = fit(tmp_path / "run", poisoned, 1, "{}", *GUARD, *more).ok().text
    assert text.count("going back to step-00000012") == 1
    told = rollbacks(tmp_path / "run")[0]
    assert (told["first_skipped"], told["last_skipped"]) == (13, 15)
    assert [entry.global_step for entry in committed(tmp_path / "run" / "checkpoints")[0]] == [STEPS]


def test_harm_in_the_step_of_a_save_is_not_saved(tmp_path: Path) -> None:
    """With one checkpoint kept, that of step 12 would have been the only one, and nothing left to go back to."""
    run_dir, data = tmp_path / "run", write_data(tmp_path / "data", ())
    more = ("--checkpoint.keep_last", "1", SPOILT, "--trainer.callbacks.step=12")
    text = fit(run_dir, data, 2, "{}", *GUARD, *more).ok().text
    assert text.count("going back to step-00000008") == 1, text
    refused = "no checkpoint of step 12, training goes on: its weights are not finite (model.0.weight)"
    assert text.count(refused) == 1, text
    assert refused in [event["text"] for event in read_run(run_dir)["events"]]
    assert all(bool(value.isfinite().all()) for value in final_weights(run_dir).values())
    assert [entry.global_step for entry in committed(run_dir / "checkpoints")[0]] == [STEPS]


@pytest.mark.slow
def test_a_run_that_ends_with_spoilt_weights_says_so(tmp_path: Path) -> None:
    run_dir, data = tmp_path / "run", write_data(tmp_path / "data", ())
    outcome = fit(run_dir, data, 2, FSDP, *GUARD, "--checkpoint.keep_last", "1", SPOILT, "--trainer.callbacks.step=23")
    assert set(outcome.codes) == {2}, outcome.text
    assert "the run ends at step 24 with weights that are not finite, and is not saved" in outcome.text
    there = [entry.global_step for entry in committed(run_dir / "checkpoints")[0]]
    assert there == [16, 20], "what it may be started from again"


def test_rollbacks_are_bounded(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", tuple(range(13, STEPS + 1)))
    outcome = fit(tmp_path / "run", data, 2, "{}", *GUARD, "--guard.rollbacks", "1")
    assert set(outcome.codes) == {2}, outcome.text
    text = " ".join(outcome.text.split())
    assert text.count("not finite; the run has gone back once already") == 1, text
    assert "guard.rollbacks how often" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_second_rollback_goes_back_further(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", tuple(range(13, 24)))
    fit(tmp_path / "run", data, 1, "{}", *GUARD).ok()
    told = [(event["from_step"], event["to_step"], event["first_skipped"]) for event in rollbacks(tmp_path / "run")]
    assert told == [(20, 8, 11), (24, 8, 9)]


@pytest.mark.slow
def test_weights_that_one_step_has_ruined_are_healed(tmp_path: Path) -> None:
    """Its gradient is finite, so step 12 passes; all later losses are not. The margin takes it out."""
    data = write_samples(tmp_path / "data", STEPS, sick_samples(STEPS, 0, (12,)), spoil=1e25)
    fit(tmp_path / "run", data, 2, TREE, *GUARD, "--checkpoint.keep_last", "1").ok()  # that of step 12 has it
    told = [(event["to_step"], event["first_skipped"], event["last_skipped"]) for event in rollbacks(tmp_path / "run")]
    assert told == [(8, 11, 20)]
    left_out = extra("LeaveOut", steps=list(range(11, 21)))
    fit(tmp_path / "reference", data, 1, TREE, "--guard.enabled", "false", *left_out).ok()
    healed = final_weights(tmp_path / "run")
    assert max(float(value.abs().max()) for value in healed.values()) < 10
    assert not differing(final_weights(tmp_path / "reference"), healed)


@pytest.mark.slow
def test_no_checkpoint_from_before_is_an_error(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", (3, 4, 5))
    outcome = fit(tmp_path / "run", data, 2, FSDP, *GUARD)
    assert set(outcome.codes) == {2}, outcome.text
    assert "there is no checkpoint from before step 3 to go back to" in " ".join(outcome.text.split())


@pytest.mark.slow
def test_a_spike_on_one_rank_is_one_on_all(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", ())
    more = ("--guard.spikes", "20", "--guard.window", "16", *extra("SkewedNorm", step=12, rank=1))
    fit(tmp_path / "run", data, 2, "{}", *more).ok()
    files = sorted((tmp_path / "run" / "skipped").glob("rank-*.jsonl"))
    told = [[json.loads(line)["step"] for line in file.read_text().splitlines()] for file in files]
    assert told == [[12], [12]]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_back_into_the_epoch_before_past_validations(tmp_path: Path, killed: bool) -> None:
    """Validations, early stopping, the best checkpoint and the schedule are those of the run without a streak."""
    steps, epochs = 12, 3
    sick = sick_samples(steps, 1, (2, 3, 4))
    data = write_samples(tmp_path / "data", steps, sick)
    write_shard(tmp_path / "data" / "val-0.tar", [sample(number) for number in range(40)])
    ids = Order([steps * GLOBAL], OrderConfig(GLOBAL)).sample_ids
    others = [
        epoch * steps + step + 1
        for epoch in (0, 2)
        for step in range(steps)
        if sick & set(ids(epoch, step)[0].tolist())
    ]
    more = [
        *("--data.val", str(tmp_path / "data" / "val-0.tar"), "--trainer.validate_every_steps", "6"),
        *("--trainer.max_steps", str(epochs * steps), "--checkpoint.every_steps", "5", "--checkpoint.keep_last", "3"),
        *("--early_stopping.monitor", "val/loss", "--early_stopping.patience", "50"),
        *("--model.cosine", "true"),
    ]
    left_out = extra("LeaveOut", steps=[12, 13, 14, 15, 16, *others])
    fit(tmp_path / "reference", data, 1, TREE, *more, "--guard.enabled", "false", *left_out).ok()
    if killed:
        trap = extra("KillInRollback", place="replay", step=12)
        assert -9 in fit(tmp_path / "run", data, 2, FSDP, *more, *GUARD, *trap).codes
    fit(tmp_path / "run", data, 2, TREE, *more, *GUARD).ok()
    told = [(event["from_step"], event["to_step"], event["first_skipped"]) for event in rollbacks(tmp_path / "run")]
    assert told == [(18, 10, 12)]
    assert not differing(final_weights(tmp_path / "reference"), final_weights(tmp_path / "run"))
    ran, wanted = (read_run(tmp_path / name)["best"] for name in ("run", "reference"))
    assert ran == wanted
    ran, wanted = (
        [(row.step, row.epoch, row.values["val/loss"]) for row in read_rows(tmp_path / name / "metrics.csv")
         if "val/loss" in row.values]
        for name in ("run", "reference")
    )  # fmt: skip
    assert ran == wanted
    assert read_ledger(tmp_path / "run" / "ledger") == read_ledger(tmp_path / "reference" / "ledger")
