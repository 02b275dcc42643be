"""The training command line: bad input gives one clear error and exit code 2; help and overrides work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from disttrain.data.index.shard_index import ShardIndex
from disttrain.system.reading import read_run
from tests.support.kills import killed_at
from tests.support.ranks import Outcome, run_cli

RECIPE = "recipes/digits.yaml"


@pytest.fixture
def fit(digits: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Run ``disttrain fit`` on the digits recipe with overrides; config files come first, then data, then more."""

    def run(*more: str, ranks: int = 1, config: str = RECIPE, steps: int = 2) -> Outcome:
        arguments = [
            *("fit", "--config", config, "--trainer.run_dir", str(tmp_path / "run")),
            *(f"--data.{split}={digits}/{split}.json" for split in ("train", "val", "test")),
            *("--trainer.max_steps", str(steps), "--model.schedule.name", "constant"),
            *more,
        ]
        return run_cli(ranks, arguments, folder=tmp_path / "logs")

    return run


def assert_error(outcome: Outcome, *parts: str) -> None:
    """Exit code 2, one error, no traceback, and these words in it."""
    assert set(outcome.codes) <= {2, -9}, f"exit codes {outcome.codes}\n{outcome.text}"
    assert outcome.codes[0] == 2
    text = outcome.outputs[0]
    assert "Traceback" not in text, text
    assert text.count("disttrain: error") == 1, text
    assert "hint:" in text, text
    assert len(text) < 2000, f"not one page: {len(text)} characters"
    missing = [part for part in parts if part not in text]
    assert not missing, f"the message lacks {missing}:\n{text}"


CASES = {
    "missing shard": (["--data.train={digits}/train-{{000000..000009}}.tar"], ["train-000004.tar does not exist"]),
    "empty pattern": (["--data.train={digits}/trian-*.tar"], ["no file matches", "trian-*.tar"]),
    "no pattern": (["--data.train="], ["data.train names no shards"]),
    "absent field": (["--data.fields={{image: imag.npy, label: cls}}"], ["field 'image'", "did you mean 'image.npy'?"]),
    "wrong decoder": (
        ["--data.fields={{image: {{ext: image.npy, decoder: cls}}, label: cls}}"],
        ["val-000000.tar at byte", "sample 'digits-", "not a class number"],
    ),
    "decoder that gives no tensor": (
        ["--data.fields={{image: image.npy, label: {{ext: cls, decoder: json}}}}"],
        ["field 'label' is a list, not a tensor"],
    ),
    "unknown decoder": (
        ["--data.fields={{image: {{ext: image.npy, decoder: npi}}, label: cls}}"],
        ["no decoder named 'npi'", "did you mean 'npy'?"],
    ),
    "pickle": (["--data.fields={{image: image.pkl, label: cls}}"], ["has to be unpickled"]),
    "absent transform": (
        ["--data.hooks.transform=tests.support.hooks.AddNoises"],
        ["data.hooks.transform: module 'tests.support.hooks' has no attribute 'AddNoises'"],
    ),
    "negative budget": (["--data.max_bad_samples=-1"], ["data.max_bad_samples is -1"]),
    "indivisible batch": (["--data.micro_batch_size=24"], ["use micro_batch_size 1, 2, 4, 8, 16, 32 or 64"]),
    "unknown monitor": (
        ["--early_stopping.monitor=val/los"],
        ["metrics there are: val/accuracy, val/f1, val/loss", "did you mean 'val/loss'?"],
    ),
    "too few samples": (["--data.global_batch_size=2048"], ["1258 samples, fewer than one global batch of 2048"]),
    "wrong type": (["--model.optimizer.lr=abc"], ["model.optimizer.lr is 'abc'", "type float"]),
    "out of range": (["--model.optimizer.lr=-1"], ["optimizer.lr is -1.0"]),
    "unknown setting": (["--model.optimizer.lrr=1"], ["no setting 'model.optimizer.lrr'", "did you mean 'lr'?"]),
    "unknown choice": (["--trainer.parallel.strategy=ddq"], ["trainer.parallel.strategy is 'ddq'", "'ddp', 'fsdp'"]),
    "unknown class": (["--model.class_path=recipes.digits.DigitTask"], ["no attribute 'DigitTask'"]),
    "precision": (["--trainer.precision=16-mixed"], ["needs a CUDA device"]),
    "unwritable run folder": (["--trainer.run_dir=/dev/null/run"], ["run folder /dev/null/run cannot be written"]),
    "no such checkpoint": (["--resume=nowhere"], ["there is no checkpoint at nowhere"]),
    "decay without end": (
        ["--model.schedule.name=cosine", "--model.schedule.total_steps=2"],
        ["would end at step 2", "a later schedule.total_steps"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_error(fit: Callable[..., Outcome], digits: Path, case: str) -> None:
    arguments, parts = CASES[case]
    assert_error(fit(*(argument.format(digits=digits) for argument in arguments)), *parts)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("max_epochs:", "max_epoch:", ["no setting 'trainer.max_epoch'", "did you mean 'max_epochs'?"]),
        ("data:", "dta:", ["no setting 'dta", "did you mean 'data'?"]),
        ("dropout:", "droput:", ["no setting 'model.droput'", "did you mean 'dropout'?"]),
        ("max_epochs: 40", "max_epochs: [40", ["wrong.yaml is not valid YAML", "line"]),
    ],
)
def test_a_typo_in_the_yaml_names_the_nearest_key(
    fit: Callable[..., Outcome], tmp_path: Path, old: str, new: str, parts: list[str]
) -> None:
    text = Path(RECIPE).read_text()
    assert old in text
    (tmp_path / "wrong.yaml").write_text(
        text.replace(f"\n{old}" if old == "data:" else old, f"\n{new}" if old == "data:" else new)
    )
    assert_error(fit(config=str(tmp_path / "wrong.yaml")), *parts)


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_shard_is_named_with_its_offset(
    fit: Callable[..., Outcome], digits: Path, tmp_path: Path, damage: str
) -> None:
    shard = tmp_path / "train.tar"
    shutil.copy(digits / "train-000000.tar", shard)
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2] if damage == "cut" else b"x" * 4096)
    outcome = fit(f"--data.train={shard}")
    assert_error(outcome, str(shard), "at byte", {"cut": "the file ends at byte", "garbage": "not a tar file"}[damage])


def test_several_ranks_say_it_once(fit: Callable[..., Outcome]) -> None:
    """A mistake that all ranks make is printed by rank 0 alone, and none of them hangs."""
    for mistake, words in (("--data.micro_batch_size=24", "use micro_batch_size"), ("--data.train=no.tar", "no.tar")):
        outcome = fit(mistake, ranks=2)
        assert_error(outcome, "rank 0 of 2", words)
        assert outcome.outputs[1] == "", outcome.text


def test_a_fault_that_one_rank_meets_is_named_by_that_rank(
    fit: Callable[..., Outcome], digits: Path, tmp_path: Path
) -> None:
    """Rank 1 reads a damaged sample in training; rank 0 does not hang and prints no traceback."""
    for path in digits.glob("*"):
        shutil.copy(path, tmp_path / path.name)
    shard = tmp_path / "train-000003.tar"
    index = ShardIndex.open(str(shard))
    table = index.table(0)
    column = table.fields.index("cls")
    with open(shard, "r+b") as file:
        for offset in table.offsets[:, column].tolist():
            file.seek(offset)
            file.write(b"x")
    (tmp_path / "train-000003.idx").touch()
    one_lane = ("--data.shuffle.lanes=2", "--data.shuffle.window=1", f"--data.train={tmp_path}/train-*.tar")
    outcome = fit(*one_lane, ranks=2, steps=19)
    assert all(code == 2 for code in outcome.codes), f"exit codes {outcome.codes}\n{outcome.text}"
    assert "Traceback" not in outcome.text
    assert "train-000003.tar at byte" in outcome.text
    assert "not a class number: b'x'" in outcome.text
    assert "stops: another rank failed" in outcome.text


def test_an_error_of_the_users_own_is_no_lost_rank(fit: Callable[..., Outcome]) -> None:
    """Though its words are those of a collective that fails; the rank that does lose a peer quotes its own error."""
    outcome = fit("--trainer.callbacks+=tests.support.troubles.LoseServer", ranks=2)
    assert outcome.codes == [2, 1], outcome.text
    assert "Traceback" in outcome.outputs[1]
    assert "RuntimeError: my metrics server db:5432: Connection refused" in outcome.outputs[1]
    assert "another rank failed or was killed" not in outcome.outputs[1]
    assert "Traceback" not in outcome.outputs[0]
    assert re.search(r"rank 0 of 2 stops: another rank failed or was killed: .*onnection", outcome.outputs[0])


def test_an_error_of_the_users_own_module_keeps_its_traceback(fit: Callable[..., Outcome]) -> None:
    outcome = fit("--model=tests.support.troubles.Refuse")
    assert outcome.codes == [1], outcome.text
    assert "Traceback" in outcome.text
    assert "ValueError: my table has no such column" in outcome.text


def test_dotted_overrides_and_the_saved_config(fit: Callable[..., Outcome], tmp_path: Path) -> None:
    fit("--model.optimizer.lr", "3e-4", "--seed_everything", "7").ok()
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["optimizer"]["lr"] == 3e-4
    assert saved["model"]["init_args"]["optimizer"]["name"] == "adamw", "the rest of the recipe's optimizer is kept"
    assert saved["seed_everything"] == 7
    first = read_run(tmp_path / "run")["result"]
    again = fit(config=str(tmp_path / "run" / "config.yaml")).ok()
    assert "test/accuracy" in again.text
    assert read_run(tmp_path / "run")["result"] == first, "the saved configuration gives another run"


@pytest.mark.parametrize("command", [pytest.param("validate", marks=pytest.mark.slow), "test", "predict"])
def test_evaluations_take_the_configuration_of_a_run(fit: Callable[..., Outcome], tmp_path: Path, command: str) -> None:
    """How the run began stands in it: that is passed over; on the command line it is a mistake."""
    fit(steps=1).ok()
    config = tmp_path / "run" / "config.yaml"
    saved = yaml.safe_load(config.read_text())
    assert saved["resume"] == "auto"
    assert "initialize_from" in saved
    saved["initialize_from"] = "gone.safetensors"
    config.write_text(yaml.safe_dump(saved))
    outcome = run_cli(1, [command, "--config", str(config)], folder=tmp_path / command).ok()
    if command == "predict":
        assert len((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()) == 269
    else:
        expected = read_run(tmp_path / "run")["result"]["test/accuracy"]
        assert command != "test" or f"{expected:.6f}" in outcome.text
    wrong = run_cli(1, [command, "--config", str(config), "--resume", "never"], folder=tmp_path / "wrong")
    assert_error(wrong, f"--resume applies to fit, not to {command}", "--checkpoint_path")


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["fit", "--print_config"], ["--version"]])
def test_help_and_print_config(tmp_path: Path, arguments: list[str]) -> None:
    outcome = run_cli(1, arguments, folder=tmp_path).ok()
    wanted = {"--help": "fit", "--version": "disttrain"}.get(arguments[0], "micro_batch_size")
    assert wanted in outcome.text


def test_an_unknown_subcommand_names_the_nearest(tmp_path: Path) -> None:
    assert_error(run_cli(1, ["fitt"], folder=tmp_path), "no subcommand 'fitt'", "did you mean 'fit'?")


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_bf16_trains_under_both_strategies(fit: Callable[..., Outcome], tmp_path: Path, precision: str) -> None:
    for strategy in ("ddp", "fsdp"):
        fit("--trainer.precision", precision, "--trainer.parallel.strategy", strategy, ranks=2, steps=30).ok()
        assert read_run(tmp_path / "run")["result"]["test/accuracy"] > 0.3, f"{strategy} did not learn"


def test_a_micro_batch_size_is_found(fit: Callable[..., Outcome], digits: Path, tmp_path: Path) -> None:
    """From the command line: all of a rank's samples where they fit, in run.json and for a later evaluation."""
    size = ("--data.micro_batch_size", "auto")
    fit(*size, ranks=2).ok()
    assert read_run(tmp_path / "run")["attempts"][0]["micro_batch_size"] == 32
    assert "micro_batch_size: auto" in (tmp_path / "run" / "config.yaml").read_text()
    test = ("test", "--config", RECIPE, "--trainer.run_dir", str(tmp_path / "run"), f"--data.test={digits}/test.json")
    run_cli(1, [*test, *size], folder=tmp_path / "test").ok()
    assert_error(fit("--data.micro_batch_size", "automatic"), "micro_batch_size", "auto")


def test_events_are_logged_through_all_attempts(fit: Callable[..., Outcome], tmp_path: Path) -> None:
    every = ("--checkpoint.every_steps", "2", "--checkpoint.save", "sync")
    fit(*every, *killed_at(3), steps=5)
    fit(*every, steps=5).ok()
    told = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    # Each attempt says, too, that no validation comes before the run ends.
    assert [(event["kind"], event["step"]) for event in told if event["kind"] != "monitor"] == [
        *[("attempt", 0), ("checkpoint", 2), ("attempt", 2), ("start", 2)],
        *[("checkpoint", 4), ("checkpoint", 5), ("stop", 5)],
    ], told
    assert [event["time"] for event in told] == sorted(event["time"] for event in told)
    assert read_run(tmp_path / "run")["samples_seen"] == 5 * 64


def test_a_record_that_cannot_be_written_is_told_and_ends_no_training(
    fit: Callable[..., Outcome], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for name in ("events.jsonl", "run.json"):  # not even root writes a file over a folder
        (run_dir / name).mkdir(parents=True)
    outcome = fit("--checkpoint.every_steps", "1", ranks=2)
    assert_error(outcome, f"{run_dir}/run.json cannot be written", "make room")
    for name in ("events.jsonl", "run.json"):
        assert outcome.text.count(f"{run_dir}/{name} cannot be written, training goes on") == 1, outcome.text
    (run_dir / "run.json").rmdir()
    fit().ok()
    assert read_run(run_dir)["status"] == "completed"
    assert [attempt["from_step"] for attempt in read_run(run_dir)["attempts"]] == [2], "training was done already"
