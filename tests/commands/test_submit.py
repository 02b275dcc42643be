"""``disttrain submit --dry-run`` and what is refused without any SLURM; ``disttrain jobs`` on run folders alone."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from types import ModuleType

import pytest

from disttrain.commands import jobs, submit
from disttrain.errors import ConfigError, DataError
from disttrain.run.listing import rows_of
from disttrain.slurm.commands import Queued

RECIPE = str(Path("recipes/digits.yaml").absolute())
CONFIG = ["--config", RECIPE, "--set", "data.micro_batch_size=16", "--no-check-data"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without the run that `make train` leaves in the repository's."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def test_a_dry_run_prints_the_script_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run_dir = tmp_path / "run"
    options = ["--set", f"trainer.run_dir={run_dir}", "--nodes", "2", "--gpus-per-node", "2", "--sbatch", "nice=5"]
    assert submit.main([*CONFIG, *options, "--account", "me", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for line in ("--job-name=digits", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--nice=5"):
        assert f"#SBATCH {line}\n" in text
    assert "#SBATCH --account=me\n" in text
    assert f"RUN_DIR={run_dir}\n" in text
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        (["--config", "absent.yaml"], "configuration file absent.yaml does not exist", "--config"),
        (["--set", "seed_everything"], "--set seed_everything is not a setting", "NAME=VALUE"),
        (["--set", "seed_everything=%a"], "uses %a, the index of a job array, but the job is not an array", "--array"),
        (["--set", "trainer.run_dir=a/%a", "--array", "0-1"], "already have separate folders", "RUN_DIR/3"),
        (["--set", "seed_everything=%a.5", "--array", "0-1"], "seed_everything is '0.5'|seed_everything", ""),
        (["--set", "trainer.max_stepz=%a", "--array", "0-1"], "no setting 'trainer.max_stepz'", "did you mean"),
        (["--site", "absent.yaml"], "site file absent.yaml cannot be read", "--site"),
    ],
)
def test_mistakes(options: list[str], what: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        submit.main([*CONFIG, "--tasks-per-node", "2", *options, "--dry-run"])
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--name", "a\ntouch owned"], "--name is 'a\\\\ntouch owned'"),
        (["--set", "trainer.run_dir=runs/a\ntouch owned"], "trainer.run_dir is"),
        (["--sbatch", "comment=a\ntouch owned"], "sbatch option 'comment'"),
        (["--sbatch", "comment\ntouch owned"], "sbatch option"),
        (["--sbatch", "nice; touch owned"], "'nice; touch owned' is not the name of an sbatch option"),
        (["--partition", "a\rb"], "--partition is"),
        (["--account", "a\x1b[2Jb"], "account of the site is"),
        (["--qos", "a\x85b"], "qos of the site is"),
        (["--memory", "1G\n"], "memory of the site is"),
        (["--output", "x\ntouch owned.log"], "--output is"),
        (["--array", "0-1", "--set", "trainer.precision=32-true\n%a"], "trainer.precision"),
    ],
)
def test_no_word_ends_a_line_of_the_script(options: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        submit.main([*CONFIG, "--tasks-per-node", "2", *options, "--dry-run"])


@pytest.mark.parametrize(
    "field",
    [
        'modules: ["a\\nb"]',
        'environment: {A: "a\\nb"}',
        'python: "a\\nb"',
        'container: {image: "a\\nb"}',
        'container: {image: a, mounts: ["a\\nb"]}',
        'sbatch: {"a\\nb": x}',
    ],
)
def test_no_word_of_a_site_ends_a_line_of_the_script(tmp_path: Path, field: str) -> None:
    (tmp_path / "site.yaml").write_text(field)
    with pytest.raises(ConfigError, match="control character"):
        submit.main([*CONFIG, "--tasks-per-node", "2", "--site", str(tmp_path / "site.yaml"), "--dry-run"])


def test_data_that_is_missing_is_told_before_the_job_waits(digits: Path, tmp_path: Path) -> None:
    there = [f"data.{split}={digits}/{split}.json" for split in ("train", "val", "test")]
    words = ["--config", RECIPE, "--tasks-per-node", "1", "--dry-run"]
    words += [word for one in there for word in ("--set", one)]
    assert submit.main(words) == 0
    for spec in (f"{digits}/train-{{000000..000009}}.tar", str(digits / "trian.json")):
        with pytest.raises(DataError, match=r"train-000004\.tar does not exist|trian\.json") as caught:
            submit.main([*words, "--set", f"data.train={spec}"])
        assert "--no-check-data" in caught.value.hint


@pytest.mark.parametrize("command", [submit, jobs])
def test_help(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    assert "--" in capsys.readouterr().out


def test_a_complete_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "completed"}')
    with pytest.raises(ConfigError, match="contains a complete run") as caught:
        submit.main([*CONFIG, "--tasks-per-node", "1", "--set", f"trainer.run_dir={tmp_path}", "--dry-run"])
    assert "trainer.run_dir" in caught.value.hint


def test_complete_members_of_an_array_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in (0, 2, 5):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "run.json").write_text('{"status": "completed"}')
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "run.json").write_text('{"status": "preempted"}')

    def submit_array(indices: str) -> int:
        where = ["--set", f"trainer.run_dir={tmp_path}", "--dry-run"]
        return submit.main([*CONFIG, "--tasks-per-node", "1", "--array", indices, *where])

    with pytest.raises(ConfigError, match=r"contains complete runs of the array: 0, 2\n") as caught:
        submit_array("0-4%2")
    assert "--array 1,3-4;" in caught.value.hint
    with pytest.raises(ConfigError, match=r"of the array: 5\n") as caught:
        submit_array("5")
    assert caught.value.hint == "move them away; all are complete"
    assert submit_array("1,3-7:4") == 0
    assert "#SBATCH --array=1,3-7:4\n" in capsys.readouterr().out


def test_without_slurm_only_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not installed here"):
        submit.main([*CONFIG, "--tasks-per-node", "1", "--set", f"trainer.run_dir={tmp_path / 'run'}"])


def a_run(folder: Path, status: str, **more: object) -> Path:
    (folder / "submit").mkdir(parents=True)
    (folder / "submit" / "job.json").write_text('{"job": "7", "submitted": 1.0}')
    attempts = [{"slurm_job": "7", "to_step": 5}]
    record = {"format": 1, "status": status, "attempts": attempts, "stop_reason": "why", **more}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.csv").write_text(f"step,epoch,time,train/loss\n8,0,{time.time()},0.5\n")
    return folder


@pytest.mark.parametrize(
    ("status", "queued", "state"),
    [
        ("running", Queued("7", "RUNNING", "n1"), "running"),
        ("preempted", Queued("7", "PENDING", "(BeginTime)"), "pending"),
        ("running", None, "lost"),
        ("running", Queued("7", "NODE_FAIL"), "node_fail"),
        ("running", Queued("7", "CANCELLED by 0"), "cancelled"),
        ("running", Queued("7", "COMPLETED"), "lost"),
        ("preempted", None, "preempted"),
        ("preempted", Queued("7", "CANCELLED"), "cancelled"),
        ("completed", Queued("7", "COMPLETED"), "completed"),
        ("completed", None, "completed"),
    ],
)
def test_the_state_of_a_run(tmp_path: Path, status: str, queued: Queued | None, state: str) -> None:
    run_dir = a_run(tmp_path / "run", status)
    (row,) = rows_of(run_dir, {} if queued is None else {"7": queued})
    assert (row.state, row.job, row.step, row.checkpoint) == (state, "7", 8, None)


def test_jobs_lists_runs_below_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue
    a_run(tmp_path / "runs" / "group" / "a", "completed")
    a_run(tmp_path / "runs" / "b", "running")
    assert jobs.main([str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "job", "state", "attempts", "step", "checkpoint", "note"]
    assert [line.split()[2] for line in lines[1:]] == ["lost", "completed"]
    with pytest.raises(ConfigError, match="does not exist"):
        jobs.main([str(tmp_path / "absent")])


def test_jobs_passes_over_folders_that_may_not_be_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no squeue
    # In a folder that all may pass, unlike pytest's own.
    with tempfile.TemporaryDirectory() as name:
        runs = Path(name)
        runs.chmod(0o755)
        a_run(runs / "a", "completed")
        (runs / "b").mkdir(mode=0)
        root = os.geteuid()
        os.seteuid(65534 if root == 0 else root)  # root may read everything
        try:
            assert jobs.main([name]) == 0
        finally:
            os.seteuid(root)
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()[1:]] == [f"{name}/a"]
    assert f"skipping {name}/b: Permission denied" in said.err
