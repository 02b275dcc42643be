"""When a rank asks for its job to be queued again, without any SLURM; the real thing is in ``test_requeue.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disttrain.runs import finished_by_this_job
from disttrain.slurm.requeue import ask_to_requeue, is_to_be_requeued, job_of

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}


def test_only_a_job_that_wants_it_is_requeued() -> None:
    assert not is_to_be_requeued({})
    assert not is_to_be_requeued({"DISTTRAIN_REQUEUE": "50"})
    assert not is_to_be_requeued(JOB)
    assert not is_to_be_requeued({**JOB, "DISTTRAIN_REQUEUE": "0"})
    assert is_to_be_requeued({**JOB, "DISTTRAIN_REQUEUE": "50"})


def test_without_scontrol_the_script_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    env = {**JOB, "DISTTRAIN_REQUEUE": "50", "SLURM_RESTART_COUNT": "3"}
    assert ask_to_requeue(tmp_path, env) == "no scontrol here: the script of job 7 is to requeue it"
    assert (tmp_path / "requeue").read_text() == "7 3\n"


def test_a_job_goes_on_only_so_often(tmp_path: Path) -> None:
    env = {**JOB, "DISTTRAIN_REQUEUE": "3", "SLURM_RESTART_COUNT": "3"}
    assert "it has been 3 times" in ask_to_requeue(tmp_path, env)
    assert not (tmp_path / "requeue").exists()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    said = ask_to_requeue(tmp_path / "absent", {**JOB, "DISTTRAIN_REQUEUE": "3"})
    assert "is not requeued" in said
    assert "No such file" in said


def test_the_job_of_a_process() -> None:
    assert job_of({}) == {}
    assert job_of(JOB) == {"slurm_job": "7", "slurm_restart": 0, "nodes": "n[1-2]"}
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "1"}
    assert job_of({**JOB, **array}) == {"slurm_job": "5_2", "slurm_restart": 1, "nodes": "n[1-2]"}


@pytest.mark.parametrize(
    ("env", "job", "status", "finished"),
    [
        ({**JOB, "SLURM_RESTART_COUNT": "1"}, "7", "completed", True),
        ({**JOB, "SLURM_RESTART_COUNT": "1"}, "7", "trained", False),
        ({**JOB, "SLURM_RESTART_COUNT": "1"}, "6", "completed", False),
        (JOB, "7", "completed", False),
        ({}, None, "completed", False),
    ],
)
def test_a_job_knows_that_it_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], job: str | None, status: str, finished: bool
) -> None:
    for name in (*JOB, "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    attempt = {} if job is None else {"slurm_job": job}
    (tmp_path / "run.json").write_text(json.dumps({"status": status, "attempts": [attempt]}))
    assert finished_by_this_job(tmp_path) is finished
