"""Killed at random steps and resumed: the same weights, no sample lost or delivered twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.checkpoint.format.reader import committed
from disttrain.run.metrics_file import read_rows
from disttrain.system.reading import read_run
from tests.support.kills import killed_at
from tests.support.ranks import Outcome, run_cli
from tests.support.weights import differing, distance, final_weights

STEPS = 48  # two and a half epochs of 19 steps
IN_BACKGROUND = ("--checkpoint.save", "async")


def fit(run_dir: Path, data: Path, ranks: int, strategy: str, *more: str) -> Outcome:
    """Train digits; a checkpoint every 4 steps, on disk before the next step begins; a validation every 10."""
    arguments = [
        *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
        *(f"--data.{split}={data}/{split}.json" for split in ("train", "val", "test")),
        *("--data.global_batch_size", "64", "--data.micro_batch_size", "16"),
        *("--trainer.max_steps", str(STEPS), "--trainer.parallel.strategy", strategy),
        *("--trainer.validate_every_steps", "10", "--checkpoint.every_steps", "4"),
        *("--early_stopping.restore_best", "false", "--checkpoint.save", "sync", "--trainer.log_every_steps", "3"),
        "--trainer.callbacks+=disttrain.callbacks.SampleLedger",
        *more,
    ]
    return run_cli(ranks, arguments, folder=run_dir.parent / f"{run_dir.name}-logs")


def killed_and_resumed(run_dir: Path, data: Path, ranks: int, strategy: str, *, kills: int, seed: int) -> list[int]:
    """Run to the end through several kills at random places; gives the steps at which it was killed."""
    chance = random.Random(seed)
    steps = sorted(chance.sample(range(1, STEPS), kills))
    for step in steps:
        place = chance.randrange(64 // 16 // ranks)
        codes = fit(run_dir, data, ranks, strategy, *IN_BACKGROUND, *killed_at(step, place)).codes
        assert codes == [-9] * ranks, f"not killed at step {step}: exit codes {codes}"
    fit(run_dir, data, ranks, strategy, *IN_BACKGROUND).ok()
    return steps


def losses(run_dir: Path) -> dict[int, float]:
    """The rows of ``train/loss``: each is a mean over the steps since the row before."""
    rows = read_rows(run_dir / "metrics.csv")
    return {row.step: row.values["train/loss"] for row in rows if "train/loss" in row.values}


def assert_same_ledger(one: Path, other: Path) -> None:
    """Both runs fed the same samples to the same steps."""
    a, b = read_ledger(one / "ledger"), read_ledger(other / "ledger")
    assert list(a) == list(b) == list(range(STEPS)), f"steps {list(a)} and {list(b)}"
    different = [step for step in a if a[step] != b[step]]
    assert not different, f"global batches differ at steps {different[:5]}"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "strategy", "kills"), [(2, "ddp", 5), (4, "ddp", 2), (2, "fsdp", 2)])
def test_same_layout_gives_the_same_bits(digits: Path, tmp_path: Path, ranks: int, strategy: str, kills: int) -> None:
    fit(tmp_path / "whole", digits, ranks, strategy).ok()
    steps = killed_and_resumed(tmp_path / "killed", digits, ranks, strategy, kills=kills, seed=ranks)

    names = differing(final_weights(tmp_path / "whole"), final_weights(tmp_path / "killed"))
    assert not names, f"killed at {steps}: not equal bit by bit: {names}"
    assert_same_ledger(tmp_path / "whole", tmp_path / "killed")
    whole, killed = read_run(tmp_path / "whole"), read_run(tmp_path / "killed")
    assert whole["result"] == killed["result"]
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed"), f"killed at {steps}"
    assert len(killed["attempts"]) == kills + 1

    epoch = [key for step in range(19) for key in read_ledger(tmp_path / "killed" / "ledger")[step]]
    assert len(epoch) == len(set(epoch)) == 19 * 64, "a sample was delivered twice in an epoch"


def test_resumed_under_another_strategy_and_world_size(digits: Path, tmp_path: Path) -> None:
    fit(tmp_path / "whole", digits, 2, "ddp").ok()
    moved = tmp_path / "moved"
    fit(moved, digits, 2, "ddp", *killed_at(14, 1))
    fit(moved, digits, 4, "fsdp", *killed_at(30, 0))
    fit(moved, digits, 2, "ddp").ok()

    apart = distance(final_weights(tmp_path / "whole"), final_weights(moved))
    assert apart <= 1e-6, f"weights are {apart:.2e} apart"
    assert losses(moved) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    assert list(losses(moved)) == list(range(3, STEPS + 1, 3))
    assert_same_ledger(tmp_path / "whole", moved)
    assert [a["world_size"] for a in read_run(moved)["attempts"]] == [2, 4, 2]


@pytest.mark.slow
def test_resumed_at_epoch_ends(digits: Path, tmp_path: Path) -> None:
    """Checkpoints of epoch ends only, with validation there: the next epoch follows, with its own order."""
    epochs = ("--trainer.validate_every_steps", "null", "--checkpoint.every_steps", "null")
    fit(tmp_path / "whole", digits, 2, "ddp", *epochs).ok()
    killed = tmp_path / "killed"
    for step in (19, 38):
        fit(killed, digits, 2, "ddp", *epochs, *killed_at(step, 0))
    fit(killed, digits, 2, "ddp", *epochs).ok()

    assert not differing(final_weights(tmp_path / "whole"), final_weights(killed))
    assert_same_ledger(tmp_path / "whole", killed)
    assert [a["from_step"] for a in read_run(killed)["attempts"]] == [0, 19, 38]


def test_what_a_module_does_at_the_end_of_a_step_is_in_its_checkpoint(digits: Path, tmp_path: Path) -> None:
    def fit_teacher(run_dir: Path, *more: str) -> Outcome:
        splits = [word for name in ("train", "val") for word in (f"--data.{name}", f"{digits}/{name}.json")]
        fields = "{image: image.npy, label: cls}"
        words = ["fit", "--model", "tests.support.tasks.TeacherDigits", *splits, "--data.fields", fields]
        words += ["--data.global_batch_size", "64", "--trainer.max_steps", "12", "--trainer.run_dir", str(run_dir)]
        words += ["--checkpoint.every_steps", "4", "--checkpoint.save", "sync", *more]
        return run_cli(1, words, folder=tmp_path / "logs")

    fit_teacher(tmp_path / "whole").ok()
    fit_teacher(tmp_path / "killed", *killed_at(10))
    fit_teacher(tmp_path / "killed").ok()
    names = differing(final_weights(tmp_path / "whole"), final_weights(tmp_path / "killed"))
    assert not names, f"not equal bit by bit: {names}"


def test_a_half_written_checkpoint_is_passed_over(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit(run_dir, digits, 1, "ddp", "--checkpoint.keep_last", "3", *killed_at(18, 0))
    found, _ = committed(run_dir / "checkpoints")
    assert [c.global_step for c in found][-2:] == [12, 16]
    data = next(found[-1].path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])

    outcome = fit(run_dir, digits, 1, "ddp").ok()
    assert f"skipped: checkpoint {found[-1].path} is torn: {data.name} has" in outcome.text
    assert f"resuming from {found[-2].path}" in outcome.text
    assert read_run(run_dir)["attempts"][-1]["from_step"] == 12


def test_a_changed_order_is_refused(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit(run_dir, digits, 1, "ddp", *killed_at(9, 0))
    outcome = fit(run_dir, digits, 1, "ddp", "--seed_everything", "2")
    assert outcome.codes == [2]
    assert "different order of samples: seed was 1, is now 2" in outcome.text
    assert "Traceback" not in outcome.text


def test_a_complete_run_is_set_aside(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    short = ("--trainer.max_steps", "4", "--model.schedule.name", "constant")
    fit(run_dir, digits, 1, "ddp", *short).ok()
    outcome = fit(run_dir, digits, 1, "ddp", *short, "--resume", "never").ok()
    assert f"the older run was moved to {run_dir}.1" in outcome.text
    assert read_run(tmp_path / "run.1")["status"] == read_run(run_dir)["status"] == "completed"


def test_a_run_that_ended_within_an_epoch_is_extended_exactly(digits: Path, tmp_path: Path) -> None:
    constant = ("--model.schedule.name", "constant", "--model.schedule.final_fraction", "0")
    fit(tmp_path / "straight", digits, 1, "ddp", "--trainer.max_steps", "12", *constant).ok()
    fit(tmp_path / "short", digits, 1, "ddp", "--trainer.max_steps", "7", *constant).ok()
    fit(
        tmp_path / "longer",
        digits,
        1,
        "ddp",
        "--trainer.max_steps",
        "12",
        *constant,
        "--resume",
        str(tmp_path / "short"),
    )
    assert not differing(final_weights(tmp_path / "straight"), final_weights(tmp_path / "longer"))
    ledger = read_ledger(tmp_path / "straight" / "ledger")
    assert {step: ledger[step] for step in range(7, 12)} == read_ledger(tmp_path / "longer" / "ledger")


@pytest.mark.slow
def test_resumed_from_a_named_checkpoint_in_another_folder(digits: Path, tmp_path: Path) -> None:
    fit(tmp_path / "whole", digits, 2, "ddp").ok()
    fit(tmp_path / "first", digits, 2, "ddp", "--checkpoint.keep_last", "9", *killed_at(29, 0))
    chosen = next(c.path for c in committed(tmp_path / "first" / "checkpoints")[0] if c.global_step == 12)

    for place in (chosen, tmp_path / "first"):  # a checkpoint, and a run folder: its newest
        second = tmp_path / place.name.replace("first", "second")
        outcome = fit(second, digits, 1, "fsdp", "--resume", str(place)).ok()
        assert "resuming from" in outcome.text
        apart = distance(final_weights(tmp_path / "whole"), final_weights(second))
        assert apart <= 1e-6, f"resumed from {place.name}: weights are {apart:.2e} apart"
    assert read_run(tmp_path / "step-00000012")["attempts"][0]["from_step"] == 12
    assert read_run(tmp_path / "second")["attempts"][0]["from_step"] == 28


def test_never_starts_anew_and_keeps_the_old_run(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit(run_dir, digits, 1, "ddp", *killed_at(9, 0))
    outcome = fit(run_dir, digits, 1, "ddp", "--resume", "never").ok()
    assert f"the older run was moved to {run_dir}.1" in outcome.text
    assert read_run(run_dir)["attempts"][0]["from_step"] == 0
    assert committed(tmp_path / "run.1" / "checkpoints")[0][-1].global_step == 8


def test_a_start_that_fails_leaves_the_complete_run_in_place(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    short = ("--trainer.max_steps", "4", "--model.schedule.name", "constant")
    fit(run_dir, digits, 2, "ddp", *short).ok()
    for mistake in (
        ("--data.micro_batch_size", "24"),
        ("--model.schedule.name", "linear", "--model.schedule.total_steps", "9"),
    ):
        outcome = fit(run_dir, digits, 2, "ddp", *short, *mistake, "--resume", "never")
        assert outcome.codes[0] == 2, outcome.text
        assert f"the older run was moved back to {run_dir}" in outcome.text
        assert read_run(run_dir)["status"] == "completed"
        assert committed(run_dir / "checkpoints")[0][-1].global_step == 4
        assert sorted(path.name for path in tmp_path.glob("run*")) == ["run", "run-logs"]


@pytest.mark.slow
def test_another_optimizer_is_refused_and_kept_settings_are_told(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit(run_dir, digits, 1, "ddp", *killed_at(9, 0))
    outcome = fit(run_dir, digits, 1, "ddp", "--model.optimizer", "{name: sgd, lr: 0.1}")
    assert outcome.codes == [2], outcome.text
    assert "settings or parameter groups that differ from this run's SGD" in outcome.text
    assert "Traceback" not in outcome.text
    outcome = fit(run_dir, digits, 1, "ddp", "--model.optimizer.lr", "0.001").ok()
    assert "kept as the checkpoint has it: initial_lr of group" in outcome.text


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_running_statistics_are_one_model_on_all_ranks(digits: Path, tmp_path: Path, strategy: str) -> None:
    """What was tested is what was saved, and a resumed run gathers the same statistics."""
    common = [
        *(f"--data.{split}={digits}/{split}.json" for split in ("train", "val", "test")),
        *("--data.fields", "{image: image.npy, label: cls}", "--model", "tests.support.tasks.BatchNormDigits"),
        *("--data.micro_batch_size", "16", "--trainer.parallel.strategy", strategy),
    ]

    def train(run_dir: Path, *more: str) -> None:
        arguments = ["fit", *common, *("--trainer.run_dir", str(run_dir), "--trainer.max_steps", "12"), *more]
        arguments += ["--checkpoint.every_steps", "4", "--checkpoint.save", "sync"]
        run_cli(2, arguments, folder=run_dir.parent / f"{run_dir.name}-logs")

    train(tmp_path / "whole")
    train(tmp_path / "killed", *killed_at(10, 1))
    train(tmp_path / "killed")
    assert read_run(tmp_path / "killed")["attempts"][-1]["from_step"] == 8
    assert not differing(final_weights(tmp_path / "whole"), final_weights(tmp_path / "killed"))
    result = read_run(tmp_path / "whole")["result"]
    assert read_run(tmp_path / "killed")["result"] == result

    text = (
        run_cli(1, ["test", *common, "--trainer.run_dir", str(tmp_path / "whole")], folder=tmp_path / "test").ok().text
    )
    for name, value in result.items():
        assert f"{value:.6f}" in text, f"{name} was {value:.6f} after training\n{text}"
