"""A run that has come to its end is not trained anew by the command that trained it; and where its folder is."""

from __future__ import annotations

import copy
import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.callbacks import Callback

from disttrain.cli import main
from disttrain.commands.result import changed_settings, show_result
from disttrain.parallel.config import ParallelConfig
from disttrain.run.folder import write_run
from disttrain.system.reading import read_run
from tests.support.ranks import run_ranks


def fit(data: Path, run_dir: Path | str, *more: str, steps: int = 8) -> tuple[int, str]:
    """Exit code and output of a short run."""
    output = StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        code = main(
            [
                *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
                *(f"--data.{split}={data}/{split}.json" for split in ("train", "val", "test")),
                *("--trainer.max_steps", str(steps), "--model.schedule.name", "constant"),
                *("--checkpoint.every_steps", "4", "--checkpoint.keep_last", "2", "--trainer.progress_bar", "false"),
                *("--early_stopping.restore_best", "false", *more),
            ]
        )
    return code, output.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    """All files and what they hold."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())


def start_again(folder: Path, data: Path) -> None:
    """All of it in one process: only the first run has to train."""
    run_dir = folder / "run"
    assert fit(data, run_dir)[0] == 0
    whole, before = read_run(run_dir), tree(run_dir)
    saved = checkpoints(run_dir)
    assert saved == ["step-00000004", "step-00000008"]

    code, text = fit(data, run_dir, "--trainer.parallel.strategy", "fsdp", "--trainer.hang_timeout", "10m")
    assert code == 0, text
    assert "is already complete" in text
    assert f"{whole['result']['test/accuracy']:.4f}" in text, text
    assert tree(run_dir) == before, "the same command changed the complete run"
    assert [path.name for path in folder.iterdir() if path.name.startswith("run")] == ["run"], "it was moved away"

    shutil.rmtree(run_dir / "report")  # killed between 'completed' and the report
    assert fit(data, run_dir)[0] == 0
    assert (run_dir / "report" / "report.html").exists()

    for status, lacks in (("trained", ("result",)), ("running", ("result", "best", "stop_reason"))):
        left = {name: value for name, value in whole.items() if name not in lacks}
        write_run(run_dir, {**left, "status": status})  # killed after the last checkpoint
        code, text = fit(data, run_dir)
        assert code == 0, text
        again = read_run(run_dir)
        assert (again["status"], again["result"]) == ("completed", whole["result"])
        assert checkpoints(run_dir) == saved, "a copy of the last checkpoint, or one pruned for it"
    left = {name: value for name, value in whole.items() if name != "result"}
    write_run(run_dir, left)  # completed by a script, which does not test
    assert fit(data, run_dir)[0] == 0
    assert read_run(run_dir)["result"] == whole["result"]

    before = tree(run_dir)
    code, text = fit(data, run_dir, "--model.init_args.dropout", "0.1", steps=12)
    assert code == 2, text
    assert "is complete and was trained with different settings: " in text
    assert "model.init_args.dropout" in text
    assert "trainer.max_steps" in text
    assert "--resume never" in text
    assert tree(run_dir) == before
    code, text = fit(data, run_dir, "--resume", str(run_dir), steps=12)
    assert code == 0, text
    assert checkpoints(run_dir) == ["step-00000008", "step-00000012"], "it was to be trained on from its end"
    code, text = fit(data, run_dir, "--resume", "never", steps=12)
    assert code == 0, text
    assert read_run(folder / "run.1")["status"] == "completed"


@pytest.mark.slow
def test_a_complete_run_that_is_started_again_shows_its_result(digits: Path, tmp_path: Path) -> None:
    run_ranks(1, start_again, tmp_path, digits, folder=tmp_path / "logs", timeout=300).ok()


class Wander(Callback):
    """Changes the working folder in mid-run, as Hydra does."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Go."""
        os.chdir(os.environ["ELSEWHERE"])


def place_the_folder(folder: Path, data: Path) -> None:
    (folder / "home").mkdir()
    os.environ |= {"HOME": str(folder / "home"), "SCRATCH": str(folder / "scratch"), "ELSEWHERE": str(folder / "else")}
    here = Path.cwd()
    (folder / "else").mkdir()
    for name, place in (("~/runs/a", folder / "home" / "runs" / "a"), ("$SCRATCH/${USER_}b", None)):
        code, text = fit(data, name, steps=2)
        assert code == (0 if place else 2), text
        assert place is None or read_run(place)["status"] == "completed"
        assert not (here / name.partition("/")[0]).exists(), f"a folder {name} was made here"
    assert "'$SCRATCH/${USER_}b', but the environment variable USER_ is not set" in text
    code, text = fit(data, "~nobody-of-that-name/x", steps=2)
    assert code == 2, text
    assert "there is no user 'nobody-of-that-name'" in text

    (folder / "link").symlink_to(folder / "scratch" / "big")  # its target is not there yet
    assert fit(data, folder / "link", steps=2)[0] == 0
    assert read_run(folder / "scratch" / "big")["status"] == "completed"
    assert fit(data, folder / "link", "--resume", "never", steps=2)[0] == 0
    assert (folder / "link").is_symlink()
    assert (folder / "link").resolve() == folder / "scratch" / "big"
    assert sorted(path.name for path in (folder / "scratch").iterdir()) == ["big", "big.1"]
    (folder / "circle").symlink_to(folder / "circle")
    assert fit(data, folder / "circle" / "x", steps=2)[0] == 2

    os.chdir(folder)  # where the recipe is found by its whole path
    shutil.copy(here / "recipes" / "digits.yaml", folder / "digits.yaml")
    (folder / "recipes").symlink_to(here / "recipes")
    code, text = fit(
        data,
        "relative/run",
        "--trainer.callbacks+=tests.commands.test_complete.Wander",
        "--checkpoint.every_steps",
        "2",
    )
    assert code == 0, text
    assert read_run(folder / "relative" / "run")["status"] == "completed"
    assert list((folder / "else").iterdir()) == []


@pytest.mark.slow
def test_a_run_folder_is_found_once_and_for_all(digits: Path, tmp_path: Path) -> None:
    """A home, a variable, a link, a circle of links, and a working folder that changes."""
    run_ranks(1, place_the_folder, tmp_path, digits, folder=tmp_path / "logs").ok()


def test_which_settings_make_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two versions, of which one knows a setting that the other lacks, too."""
    path = tmp_path / "config.yaml"
    kept = {
        "trainer": {"parallel": None, "gone": 1, "callbacks": [{"class_path": "a.B", "init_args": {"decay": 0.9}}]},
        "data": {"train": "s3://me:key@host/a", "micro_batch_size": 8, "loader": {"threads": 2}, "hooks": None},
        "model": {"class_path": "a.C", "init_args": {"width": 3}},
    }
    path.write_text(yaml.safe_dump(kept))

    def changed(**new: Any) -> list[str]:
        given = copy.deepcopy(kept) | {"resume": "auto"}
        given["data"]["train"] = "s3://...@host/a"
        given["trainer"] |= {"new": 5, **new.pop("trainer", {})}
        del given["trainer"]["gone"]
        given["data"] |= new.pop("data", {})
        given["model"]["init_args"] |= new
        return changed_settings(path, yaml.safe_dump(given))

    assert changed() == []
    same = {"strategy": "fsdp", "tensor": 2, "compile": "blocks", "bucket_mib": 5}
    assert changed(trainer={"parallel": asdict(ParallelConfig()) | same, "hang_timeout": "1m"}) == []
    assert (
        changed(data={"loader": {"threads": 8, "workers": 1}, "cache": {"max_gib": 3}, "hooks": {"weight": ""}}) == []
    )
    others = {"sync_batchnorm": True, "reduction": "tree", "reduce_dtype": "bf16", "meta_init": True}
    for name, value in others.items():
        assert changed(trainer={"parallel": {name: value}}) == [f"trainer.parallel.{name}"]
    assert changed(data={"micro_batch_size": 4}) == ["data.micro_batch_size"]
    assert changed(data={"hooks": {"transform": {"class_path": "a.D"}}}) == ["data.hooks.transform"]
    assert changed(depth=1) == ["model.init_args.depth"]
    assert changed(trainer={"callbacks": []}) == ["trainer.callbacks"]
    other = [{"class_path": "a.B", "init_args": {"decay": 0.8, "new": 1}}]
    assert changed(trainer={"callbacks": other}) == ["trainer.callbacks.0.init_args.decay"]
    assert capsys.readouterr().err == ""
    path.write_text("a: [")
    assert changed(data={"micro_batch_size": 4}) == []
    assert "cannot check whether the run was trained with these settings" in capsys.readouterr().err


def test_a_record_that_lacks_almost_all_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ({}, {"best": {"step": 3}}, {"sources": {"a": 5}}, {"result": {"a": "x"}}, {"attempts": [{}]}):
        write_run(tmp_path, {"format": 1, "status": "completed", **more})
        show_result(tmp_path, read_run(tmp_path), report=False)
        assert "stopped" in capsys.readouterr().out


def test_what_is_new_in_a_record_is_readable_by_other_parsers(tmp_path: Path) -> None:
    nan = float("nan")
    write_run(tmp_path, {"result": {"test/loss": nan}, "best": {"value": float("inf")}, "more": [1.5, -float("inf")]})
    content = json.loads((tmp_path / "run.json").read_text(), parse_constant=lambda name: 1 / 0)
    assert content["result"]["test/loss"] == "NaN"
    assert content["best"]["value"] == "Infinity"
    assert float(content["more"][1]) == -float("inf")
