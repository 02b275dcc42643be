"""``disttrain parity`` on real runs: it passes what is the same, and finds planted mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from disttrain.commands import parity
from disttrain.errors import ConfigError
from disttrain.parity.traces import ParityError
from tests.support.language import write_sentences


def write_config(folder: Path, digits: Path, task: str, **model: Any) -> str:
    config = {
        "model": {"class_path": task, "init_args": model},
        "data": {
            **{split: str(digits / f"{split}.json") for split in ("train", "test")},
            "fields": {"image": "image.npy", "label": "cls"},
            "global_batch_size": 32,
            "micro_batch_size": 8,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def run(folder: Path, config: str, *more: str) -> tuple[int, dict[str, Any]]:
    out = folder / "out"
    code = parity.main(["--config", config, "--out", str(out), *more])
    found: dict[str, Any] = json.loads((out / "parity.json").read_text())
    for name in ("loss", "distance"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return code, found


@pytest.mark.slow
def test_layouts_that_agree(tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, digits, "tests.support.tasks.PlainDigits")
    more = ("--layouts", "1,2xddp,2xfsdp", "--steps", "6", "--kill", "--tolerance", "1e-6")
    code, found = run(tmp_path, config, *more)
    text = capsys.readouterr().out
    assert code == 0, text
    verdicts = {layout["name"]: layout["verdict"] for layout in found["layouts"]}
    assert verdicts == {"1-killed": "same to the bit", "2xddp": "within tolerance", "2xfsdp": "within tolerance"}
    assert found["steps"] == 6
    for name in verdicts:
        assert (tmp_path / "out" / name / "trace" / "killed").exists(), f"{name} was not killed"
    assert not (tmp_path / "out" / "1" / "trace" / "killed").exists(), "the reference is not disturbed"


@pytest.mark.slow
def test_a_transformer_has_the_same_bits_in_every_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_sentences(tmp_path / "sentences")
    config = {
        "model": {
            "class_path": "tests.support.language.LanguageTask",
            "init_args": {"optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.05}},
        },
        "data": {
            **{"train": f"{data}/train-{{0..2}}.tar", "test": f"{data}/test-0.tar"},
            "fields": {"tokens": "tokens.npy", "length": "length.cls"},
            "global_batch_size": 32,
            "micro_batch_size": 8,
        },
        "trainer": {"gradient_clip_norm": 0.5},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    layouts = ("--layouts", "1,4xddp,2xfsdp,2x2hsdp,2x2tp", "--reduction", "tree", "--kill")
    code, found = run(tmp_path, str(path), *layouts, "--steps", "8")
    text = capsys.readouterr().out
    assert code == 0, text
    verdicts = {layout["name"]: layout["verdict"] for layout in found["layouts"]}
    assert verdicts.pop("2x2tp") == "within tolerance"
    assert set(verdicts.values()) == {"same to the bit"}, verdicts


TWO = ("--layouts", "1,2xddp")
PLANTED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "rank-dependent code": ("RankDependentDigits", TWO, "rank-dependent code"),
    "unkeyed dropout": ("UnkeyedDropoutDigits", TWO, "unkeyed randomness: training draws from numpy.random"),
    "batch norm": ("BatchNormDigits", TWO, "batch normalization (model.1)"),
    "mean of means": ("MeanOfMeansDigits", ("--data.test", "null"), "a mean of means"),  # by the default layouts
    "other bits each time": (
        "JitteryDigits",
        (*TWO, "--reduction", "tree"),
        "not the layout: a repeat of the reference run",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_found(
    tmp_path: Path, digits: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task, more, cause = PLANTED[name]
    config = write_config(tmp_path, digits, f"tests.support.tasks.{task}")
    code, found = run(tmp_path, config, "--steps", "4", *more)
    text = capsys.readouterr().out
    assert code == 1, text
    *others, layout = found["layouts"]
    assert layout["verdict"] == "differs"
    assert layout["causes"][0].startswith(cause), layout["causes"]
    assert found["repeats_itself"] is not None
    assert f"FAILED: {layout['name']} (must " in text
    if name == "mean of means":
        assert [other["verdict"] for other in others] == ["within tolerance"] * 2, "its micro batches are the same"
        assert layout["name"] == "1@4"


@pytest.mark.slow
def test_a_sharded_recipe_with_a_mirror_is_left_alone(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tree, copies of a sharded model and ``auto`` in the YAML; every run is killed and resumed."""
    bucket = tmp_path / "bucket"
    path = write_config(tmp_path, digits, "tests.support.tasks.PlainDigits")
    config = yaml.safe_load(Path(path).read_text())
    config["checkpoint"] = {"mirror": {"url": bucket.as_uri()}}
    Path(path).write_text(yaml.safe_dump(config))
    fit = [sys.executable, "-m", "disttrain", "fit", "--config", path, "--trainer.max_steps", "3"]
    subprocess.run([*fit, "--trainer.run_dir", str(tmp_path / "production")], check=True, capture_output=True)
    before = {file: file.read_bytes() for file in bucket.rglob("*") if file.is_file()}
    assert any(file.name == "ATTEMPT" for file in before), sorted(before)
    config["data"]["micro_batch_size"] = "auto"
    config["trainer"] = {"parallel": {"strategy": "fsdp", "replicate": 2, "reduction": "tree"}}
    Path(path).write_text(yaml.safe_dump(config))
    code, found = run(tmp_path, path, "--layouts", "1,2xfsdp", "--steps", "2", "--kill")
    text = capsys.readouterr().out
    assert code == 0, text
    assert [layout["verdict"] for layout in found["layouts"]] == ["same to the bit"] * 2, found
    assert "data.micro_batch_size auto is 16 in every layout" in text
    assert "the recipe's trainer.parallel.replicate 2 is replaced" in text
    assert "tolerance: 1e-06, the default for SGD" in text
    assert {file: file.read_bytes() for file in bucket.rglob("*") if file.is_file()} == before, "the copies"


@pytest.mark.slow
def test_a_run_that_ends_before_its_kill(tmp_path: Path, digits: Path) -> None:
    config = write_config(tmp_path, digits, "tests.support.tasks.PlainDigits")
    more = ("--layouts", "1,2xddp", "--steps", "8", "--kill", "--trainer.max_steps", "3")
    with pytest.raises(
        ParityError, match=r"layout 1-killed was not killed: .* after step 3, but the kill was due before step 5"
    ):
        parity.main(["--config", config, "--out", str(tmp_path / "out"), *more])


@pytest.mark.slow
def test_a_run_that_fails_is_quoted(tmp_path: Path, digits: Path) -> None:
    config = write_config(tmp_path, digits, "tests.support.tasks.PlainDigits", lr=-1.0)
    with pytest.raises(ParityError, match=r"layout 1 failed with exit code 2: disttrain: error: .*lr"):
        parity.main(["--config", config, "--out", str(tmp_path / "out"), "--layouts", "1,2xddp"])


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: {class_path: tests.support.tasks.PlainDigits}")
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "thesis.tex").write_text("")
    link, earlier = tmp_path / "link", tmp_path / "earlier"
    link.symlink_to(earlier)
    for name in ("1", "2xddp", "notes"):
        (earlier / name).mkdir(parents=True)
    for name in ("parity.json", "loss.png", "1/rank-00000.log", "notes/rank"):
        (earlier / name).write_text("")
    cases = {
        "is not a layout": ["--layouts", "1,2xdpp"],
        "--steps is 0": ["--steps", "0"],
        "between two steps": ["--steps", "1", "--kill"],
        "--tolerance is 2.0": ["--tolerance", "2"],
        "contains something other than a comparison: thesis.tex": ["--out", str(folder)],
        "contains something other than a comparison: notes": ["--out", str(link)],
        "data.micro_batch_size is -8": ["--data.micro_batch_size", "-8"],
        "data.micro_batch_size is 0": ["--data.micro_batch_size", "0"],
    }
    for said, more in cases.items():
        with pytest.raises(ConfigError, match=said):
            parity.main(["--config", str(config), *more])
    with pytest.raises(ConfigError, match="does not exist"):
        parity.main(["--config", str(tmp_path / "other.yaml")])
    assert (folder / "thesis.tex").exists()
    shutil.rmtree(earlier / "notes")
    parity._check(parity._parser().parse_args(["--config", str(config)]), earlier)
