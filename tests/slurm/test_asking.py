"""When a rank, or its script, asks for a job to be queued again, with commands of SLURM's that say what is wanted.

The real thing is in ``test_requeue.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from disttrain.run.folder import finished_by_this_job
from disttrain.slurm import requeue
from disttrain.slurm.job import Job
from disttrain.slurm.render import Script, render
from disttrain.slurm.requeue import ask_to_requeue, is_to_be_requeued, job_of
from disttrain.slurm.site import Site

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
    assert ask_to_requeue(tmp_path, env) == "scontrol is not installed here: the script of job 7 will requeue it"
    assert (tmp_path / "requeue").read_text() == "7 3\n"


def test_a_job_goes_on_only_so_often(tmp_path: Path) -> None:
    env = {**JOB, "DISTTRAIN_REQUEUE": "3", "SLURM_RESTART_COUNT": "3"}
    assert "it has been requeued 3 times" in ask_to_requeue(tmp_path, env)
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


RUNNING = "JobState=RUNNING Restarts=0 PreemptTime=None"
NO_ANSWER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def commands(folder: Path, *, jobs: list[str], node: str = "State=ALLOCATED", srun: int = 0) -> Path:
    """Commands of a SLURM that says one after the other of ``jobs``, the last again and again; what does not begin by
    ``JobState`` is an error. They keep what they were asked in ``asked``, and no time passes."""
    folder.mkdir()
    (folder / "jobs").write_text("\n".join(jobs) + "\n")
    scontrol = f"""#!/bin/sh
cd {folder}; echo "$*" >>asked
case "$*" in
*"show job"*)
  said=$(head -n 1 jobs); [ "$(wc -l <jobs)" = 1 ] || sed -i 1d jobs
  case $said in JobState*) echo "JobId=7 $said" ;; *) echo "$said" >&2; exit 1 ;; esac ;;
*"show node"*) echo "NodeName=n1 {node} ThreadsPerCore=1" ;;
esac
"""
    for name, text in {"scontrol": scontrol, "srun": f"#!/bin/sh\nexit {srun}\n", "sleep": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def end_of_job(tmp_path: Path, folder: Path, *, code: int, note: str = "", style: str = "srun") -> list[str]:
    """What the script of a job, whose ranks have ended by a code, asks of SLURM."""
    job = Job("a", nodes=2, tasks_per_node=1, requeue=True, style=style)  # type: ignore[arg-type]
    text = render(job, Site(), Script(tmp_path, tmp_path, "python", {}))
    if note:
        (tmp_path / "requeue").write_text(note)
    text = text[: text.index("step() {")] + f"step() {{ (exit {code}); }}\n" + text[text.index("# In the background") :]
    env = {**JOB, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    asked = (folder / "asked").read_text().splitlines()
    assert [line for line in asked if line == "requeue 7"] == ["requeue 7"] * done.stderr.count("job 7 requeued")
    return asked


@pytest.mark.parametrize(
    ("code", "about", "note", "requeued"),
    [
        (75, RUNNING, "7 0", True),
        (138, RUNNING, "", True),  # told before it trained
        (143, RUNNING.replace("None", "2026-11-22T21:23:14"), "", True),
        (143, RUNNING, "", False),  # srun ended the peers of a rank that failed
        (2, RUNNING, "", False),
        (75, RUNNING, "7 1", False),  # another attempt's note
        (75, "JobState=CANCELLED Restarts=0 PreemptTime=None", "7 0", False),
        (75, "JobState=RUNNING Restarts=1 PreemptTime=None", "7 0", False),
        (75, "slurm_load_jobs error: Invalid job id specified", "7 0", False),
    ],
)
def test_the_script_requeues_what_asked_for_it(
    tmp_path: Path, code: int, about: str, note: str, requeued: bool
) -> None:
    asked = end_of_job(tmp_path, commands(tmp_path / "bin", jobs=[about]), code=code, note=note)
    assert ("requeue 7" in asked) is requeued, asked
    assert len(asked) < 10, "it was asked again, though it had answered"


def test_a_controller_that_is_away_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = commands(tmp_path / "bin", jobs=[*[NO_ANSWER] * 20, RUNNING, NO_ANSWER, NO_ANSWER, RUNNING])
    assert "requeue 7" in end_of_job(tmp_path, folder, code=75, note="7 0")
    away = commands(tmp_path / "away", jobs=[NO_ANSWER])
    assert "requeue 7" not in end_of_job(tmp_path, away, code=75, note="7 0")
    monkeypatch.setattr(requeue, "_PAUSES", (0.0, 0.0))
    env = {**JOB, "DISTTRAIN_REQUEUE": "50"}
    rank = commands(tmp_path / "rank", jobs=[NO_ANSWER, RUNNING])
    monkeypatch.setenv("PATH", f"{rank}:{os.environ['PATH']}")
    assert ask_to_requeue(tmp_path, env) == "job 7 is requeued and will resume by itself"
    (rank / "jobs").write_text(f"{NO_ANSWER}\n")
    assert "the script of job 7 will requeue it: scontrol failed: slurm_load" in ask_to_requeue(tmp_path, env)


@pytest.mark.parametrize(
    ("node", "requeued"), [("State=DOWN+NOT_RESPONDING", True), ("State=ALLOCATED*", True), ("State=MIXED", False)]
)
def test_a_node_that_does_not_answer_is_lost_where_slurm_misses_it(tmp_path: Path, node: str, requeued: bool) -> None:
    folder = commands(tmp_path / "bin", jobs=[RUNNING], node=node, srun=1)
    assert ("requeue 7" in end_of_job(tmp_path, folder, code=1)) is requeued
