"""On a real SLURM: what is refused before it is queued, job arrays, and what `disttrain jobs` shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disttrain.commands import jobs, submit
from disttrain.errors import ConfigError
from disttrain.system.reading import read_run
from tests.support.slurm import Cluster, missing, wait_until
from tests.support.slurm_jobs import arguments, callbacks, log_of, queue_job, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.mark.parametrize(
    ("options", "more", "what", "hint"),
    [
        (["--partition", "hgih"], {}, "the cluster has no partition 'hgih'", "did you mean 'high'?"),
        (["--tasks-per-node", "99"], {"data.global_batch_size": "99", "data.micro_batch_size": "1"}, "SLURM", "sinfo"),
        (["--nodes", "3"], {}, "does not fit 3 nodes x 2 ranks", "global_batch_size 60 or 66"),
        (["--time", "5h"], {}, "SLURM refuses this job: .*time limit", "the limits"),
        (["--output", "absent/%j.log"], {}, "absent, does not exist", "mkdir -p"),
        ([], {"model.optimizer.lrr": "1"}, "there is no setting 'model.optimizer.lrr'", "did you mean 'lr'?"),
        ([], {"model.class_path": "recipes.digits.DigitTask"}, "has no attribute 'DigitTask'", "class path"),
        ([], {"resume": "never"}, "resume is never", "new folder"),
    ],
)
def test_what_is_refused_is_not_queued(
    cluster: Cluster,
    digits: Path,
    tmp_path: Path,
    options: list[str],
    more: dict[str, str],
    what: str,
    hint: str,
) -> None:
    before = cluster.run(["squeue", "--noheader", "--states=all", "--format=%i"]).stdout
    with cluster.as_here(), pytest.raises(ConfigError, match=what) as caught:
        submit.main(arguments(tmp_path / "run", digits, "--tasks-per-node", "2", *options, more=more))
    assert hint in caught.value.hint
    assert cluster.run(["squeue", "--noheader", "--states=all", "--format=%i"]).stdout == before
    assert not (tmp_path / "run").exists(), "something was written"


def test_an_array_has_a_folder_a_run(
    cluster: Cluster, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last one, whose number is that of the whole array, is requeued, and no other."""
    run_dir = tmp_path / "run"
    more = {**callbacks(wait_for(2, "go")), "trainer.max_steps": "3", "seed_everything": "%a"}
    more["model.schedule.warmup_steps"] = "1"
    options = ("--tasks-per-node", "1", "--array", "0-3%2", "--requeue")
    job = queue_job(cluster, run_dir, digits, *options, more=more)
    cluster.wait_state(f"{job}_1", "RUNNING")
    with cluster.as_here():
        assert jobs.main([str(run_dir), "--json"]) == 0
    shown = {row["job"]: row["state"] for row in json.loads(capsys.readouterr().out)}
    assert shown == {f"{job}_0": "running", f"{job}_1": "running", f"{job}_2": "pending", f"{job}_3": "pending"}
    with cluster.as_here(), pytest.raises(ConfigError, match=rf"job {job}_\d of run folder .* is (running|pending)"):
        submit.main(arguments(run_dir, digits, "--tasks-per-node", "1"))
    for index in range(4):
        one = run_dir / str(index)
        wait_until((one / "waits-0").exists, 90, cluster.logs)
        if index == 3:
            cluster.run(["scancel", "--signal=USR1", f"{job}_3"])
        (one / "go").touch()
    for index in range(4):
        cluster.wait_done(f"{job}_{index}", log=log_of(run_dir, f"{job}_{index}"))
        assert cluster.job(f"{job}_{index}").restarts == int(index == 3)
        one = read_run(run_dir / str(index))
        assert one["status"] == "completed"
        assert {attempt["slurm_job"] for attempt in one["attempts"]} == {f"{job}_{index}"}
        assert f"seed_everything: {index}\n" in (run_dir / str(index) / "config.yaml").read_text()
    with cluster.as_here():
        assert jobs.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:6] for line in lines[1:]] == [
        [f"{job}_{index}", "completed", "1" if index < 3 else "2", "3", "3"] for index in range(4)
    ], lines
