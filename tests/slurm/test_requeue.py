"""On a real SLURM: a job that is stopped, preempted, or loses a node goes on in the same run folder, exactly."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import pytest

from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.distributed.rendezvous import find_meeting
from disttrain.distributed.world import World
from disttrain.system.reading import read_run
from tests.support.slurm import Cluster, missing, wait_until
from tests.support.slurm_jobs import STEPS, callbacks, log_of, queue_job, slowly, wait_for
from tests.support.weights import differing, final_weights

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


def assert_same(whole: Path, run_dir: Path, *, attempts: int) -> None:
    """The run has the bits and samples of the whole one, and one identity."""
    run = read_run(run_dir)
    assert run["status"] == "completed", run
    assert len(run["attempts"]) == attempts, run["attempts"]
    assert not differing(final_weights(whole), final_weights(run_dir))
    assert read_ledger(whole / "ledger") == read_ledger(run_dir / "ledger")
    assert run["result"] == read_run(whole)["result"]
    jobs = {attempt["slurm_job"] for attempt in run["attempts"]}
    assert len(jobs) == 1, jobs


def says(log: Path, words: str) -> bool:
    """Whether words stand in a job's output by now."""
    return log.exists() and words in log.read_text()


@pytest.mark.parametrize("style", ["srun", "torchrun"])
def test_both_styles_train_as_local_ranks_do(
    cluster: Cluster, digits: Path, tmp_path: Path, whole: Path, style: str
) -> None:
    """2 nodes x 2 (made-up) GPUs give 4 ranks. Other programs have the first ports at which they would meet."""
    run_dir = tmp_path / "run"
    options = ("--nodes", "2", "--gpus-per-node", "2", "--style", style, "--sbatch", "hold")
    job = queue_job(cluster, run_dir, digits, *options)
    told = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "n[1-2]", "MASTER_ADDR": "n1"}
    with cluster.holding("n1", find_meeting(World(0, 4, 0, 2, "slurm"), told).ports[:2]):
        cluster.run(["scontrol", "release", job])
        cluster.wait_done(job, log=log_of(run_dir, job))
    assert read_run(run_dir)["attempts"][0]["world_size"] == 4
    assert read_run(run_dir)["attempts"][0]["nodes"] == "n[1-2]"
    assert_same(whole, run_dir, attempts=1)


def test_the_time_limit_requeues_under_both_styles(cluster: Cluster, digits: Path, tmp_path: Path, whole: Path) -> None:
    """SIGUSR1 reaches the ranks under srun, and past a torchrun that it would end.

    The ranks of the first have no scontrol, as in a container, so that their script requeues.
    """
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nPATH=/nowhere exec {sys.executable} "$@"\n')
    bare.chmod(0o755)
    (tmp_path / "site.yaml").write_text(f"python: {bare}\n")
    runs = {}
    for style in ("srun", "torchrun"):
        run_dir, go = tmp_path / style, tmp_path / f"go-{style}"
        where = ("--nodes", "2", "--site", str(tmp_path / "site.yaml")) if style == "srun" else ("--nodes", "1")
        options = (*where, "--tasks-per-node", "1", "--style", style, "--requeue")
        # SLURM may signal half a minute early, and a start takes that long on a slow machine.
        limits = ("--time", "120s", "--signal-seconds", "10")
        job = queue_job(cluster, run_dir, digits, *options, *limits, more=callbacks(wait_for(6, go)))
        runs[style] = (run_dir, job, go)
    for run_dir, job, go in runs.values():
        log = log_of(run_dir, job)
        wait_until(partial(says, log, "SIGUSR1: stopping"), 200, cluster.logs)
        go.touch()
    for style, (run_dir, job, _) in runs.items():
        log = log_of(run_dir, job)
        cluster.wait_done(job, log=log)
        run = read_run(run_dir)
        assert run["attempts"][0]["stop_reason"].startswith("preempted by SIGUSR1"), run["attempts"]
        assert run["attempts"][1]["from_step"] == run["attempts"][0]["to_step"] <= 7
        # On a slow machine a start may come to the limit itself, before it is an attempt.
        restarts = [attempt["slurm_restart"] for attempt in run["attempts"]]
        assert restarts[0] == 0
        assert restarts == sorted(set(restarts))
        by_script = style == "srun"
        told = f"scontrol is not installed here: the script of job {job} will requeue it"
        told = told if by_script else f"job {job} is requeued and will resume by itself"
        assert told in [event["text"] for event in run["events"]]
        assert says(log, f"disttrain: job {job} requeued") is by_script
        assert_same(whole, run_dir, attempts=2)
        assert (run_dir / "tensorboard").is_dir()
        assert not list(run_dir.parent.glob(f"{run_dir.name}.*")), "the run was set aside"


def test_preemption_with_ranks_apart(cluster: Cluster, digits: Path, tmp_path: Path, whole: Path) -> None:
    """A job of a higher priority takes the nodes of two: one whose rank 1 comes to everything half a second later, and,
    under torchrun, one that is within a step for longer than the 30 s after which torchrun would kill it."""
    go, runs = tmp_path / "go", {}
    cluster.run(["scontrol", "update", "PartitionName=low", "GraceTime=90"])
    for style, more in (("srun", slowly(0.5, rank=1)), ("torchrun", wait_for(6, go))):
        options = ("--nodes", "2", "--tasks-per-node", "1", "--partition", "low", "--requeue", "--style", style)
        job = queue_job(cluster, tmp_path / style, digits, *options, more=callbacks(more))
        runs[style] = (tmp_path / style, job, log_of(tmp_path / style, job))
    for run_dir, _, log in runs.values():
        wait_until((run_dir / "checkpoints" / "step-00000004").exists, 120, log.read_text)
    urgent = cluster.run(
        ["sbatch", "--parsable", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    ).stdout.strip()
    slow = runs["torchrun"]
    wait_until(partial(says, slow[2], "SIGTERM: stopping"), 60, slow[2].read_text)
    end = time.monotonic() + 35
    wait_until(lambda: time.monotonic() > end, 60, cluster.logs)
    go.touch()
    cluster.wait_done(urgent)
    for run_dir, job, log in runs.values():
        cluster.wait_done(job, log=log)
        run = read_run(run_dir)
        assert "preempted by SIGTERM" in run["attempts"][0]["stop_reason"]
        assert run["attempts"][1]["from_step"] == run["attempts"][0]["to_step"] < STEPS
        assert f"job {job} is requeued and will resume by itself" in [event["text"] for event in run["events"]]
        assert "disttrain: stopped at step" in log.read_text()
        assert_same(whole, run_dir, attempts=2)


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = ("--tasks-per-node", "1", "--requeue")
    job = queue_job(cluster, run_dir, digits, *options, more=callbacks(slowly(0.3)))
    log = log_of(run_dir, job)
    wait_until((run_dir / "checkpoints" / "step-00000004").exists, 90, log.read_text)
    cluster.run(["scancel", job])
    wait_until(lambda: read_run(run_dir).get("status") == "preempted", 30, log.read_text)
    cluster.wait_state(job, "CANCELLED", log=log)
    wait_until(lambda: cluster.idle() == cluster.nodes, 30, cluster.logs)
    assert cluster.job(job).state == "CANCELLED"
    assert cluster.job(job).restarts == 0
    assert (run_dir / "checkpoints" / f"step-{read_run(run_dir)['attempts'][0]['to_step']:08d}").exists()


def test_a_signal_before_training_and_a_start_after_the_end(
    cluster: Cluster, digits: Path, tmp_path: Path, whole: Path
) -> None:
    """Ranks that still import are ended by SIGUSR1; the script requeues. A job that was complete does nothing more."""
    run_dir = tmp_path / "run"
    job = queue_job(cluster, run_dir, digits, "--tasks-per-node", "1", "--requeue")
    log = log_of(run_dir, job)
    node = cluster.wait_state(job, "RUNNING").nodes
    wait_until(  # for the rank, and not for srun, whose command names it too
        lambda: any(line.startswith(sys.executable) for line in cluster.processes_of(node, "disttrain fit")),
        *(30, cluster.logs),
    )
    cluster.run(["scancel", "--signal=USR1", job])
    wait_until(lambda: cluster.job(job).restarts == 1, 60, lambda: log.read_text() + cluster.logs())
    cluster.wait_done(job, log=log)
    assert f"disttrain: job {job} requeued" in log.read_text()
    assert [attempt["slurm_restart"] for attempt in read_run(run_dir)["attempts"]] == [1]
    assert_same(whole, run_dir, attempts=1)
    cluster.run(["scontrol", "requeue", job])  # as of a preemption that comes just then
    wait_until(lambda: "is already complete" in log.read_text(), 60, lambda: log.read_text() + cluster.logs())
    cluster.wait_done(job, log=log)
    assert_same(whole, run_dir, attempts=1)


def test_a_crash_is_not_requeued(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    """A rank that is killed, and a mistake before training: the job fails, under both styles, though srun ends the
    other node's rank by SIGTERM and takes its code. The nodes answer, and nobody asked."""
    dying = callbacks("{class_path: tests.support.callbacks.KillAt, init_args: {step: 2, rank: 1}}")
    mistake = {"data.train": str(tmp_path / "absent.json")}
    jobs = {}
    for style in ("srun", "torchrun"):
        for name, more in (("killed", dying), ("mistake", mistake)):
            options = ("--nodes", "2", "--tasks-per-node", "1", "--style", style, "--requeue", "--no-check-data")
            run_dir = tmp_path / f"{style}-{name}"
            job = queue_job(cluster, run_dir, digits, *options, more=more)
            jobs[job] = log_of(run_dir, job)
    for job, log in jobs.items():
        cluster.wait_state(job, "FAILED", log=log)
        assert cluster.job(job).restarts == 0, log.read_text()
        assert not says(log, f"job {job} requeued")
        assert says(log, "absent.json does not exist") or (log.parent.parent / "killed-1").exists(), log.read_text()


def test_a_hang_is_requeued(cluster: Cluster, digits: Path, tmp_path: Path, whole: Path) -> None:
    """A rank is in a loop; all ranks report it and end, and the script has the job go on."""
    run_dir = tmp_path / "run"
    hangs = "{class_path: tests.support.callbacks.HangAt, init_args: {step: 5, how: loop, rank: 1}}"
    options = ("--nodes", "2", "--tasks-per-node", "1", "--requeue")
    job = queue_job(cluster, run_dir, digits, *options, more=callbacks(hangs) | {"trainer.hang_timeout": "5s"})
    log = log_of(run_dir, job)
    cluster.wait_done(job, log=log)
    said = log.read_text()
    assert "disttrain: the run hangs at step 5: no step or batch for 5 s. rank 1 on n2 is in user code" in said, said
    assert f"; the script of job {job} will requeue it" in said, said
    assert read_run(run_dir)["attempts"][0]["stop_reason"] == "hung"
    assert_same(whole, run_dir, attempts=2)


def test_a_dead_node_is_replaced(cluster: Cluster, digits: Path, tmp_path: Path, whole: Path) -> None:
    run_dir = tmp_path / "run"
    options = ("--nodes", "2", "--tasks-per-node", "1", "--requeue")
    job = queue_job(cluster, run_dir, digits, *options, more=callbacks(slowly(0.3)))
    log = log_of(run_dir, job)
    wait_until((run_dir / "checkpoints" / "step-00000008").exists, 90, log.read_text)
    cluster.kill_node("n2")
    cluster.wait_done(job, log=log)
    attempts = read_run(run_dir)["attempts"]
    assert [attempt["nodes"] for attempt in attempts] in (["n[1-2]", "n[1,3]"], ["n[1-2]", "n[3-4]"])
    assert attempts[1]["from_step"] >= 8
    assert_same(whole, run_dir, attempts=2)
    cluster.settle()


def test_a_node_that_is_cut_off_writes_nothing_more(
    cluster: Cluster, digits: Path, tmp_path: Path, whole: Path
) -> None:
    run_dir, go = tmp_path / "run", tmp_path / "go"
    options = ("--tasks-per-node", "1", "--requeue")
    job = queue_job(cluster, run_dir, digits, *options, more=callbacks(wait_for(6, go)))
    log = log_of(run_dir, job)
    wait_until((run_dir / "waits-0").exists, 90, log.read_text)
    node = cluster.job(job).nodes
    cluster.cut(node)
    cluster.wait_done(job, log=log)  # elsewhere
    record = (run_dir / "run.json").read_bytes()
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert cluster.processes_of(node, "disttrain fit"), "its rank was to be alive still"
    go.touch()
    wait_until(lambda: not cluster.processes_of(node, "disttrain fit"), 60, log.read_text)
    assert "has taken it over" in log.read_text()
    assert (run_dir / "run.json").read_bytes() == record, "the stale rank wrote the record"
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == names
    assert_same(whole, run_dir, attempts=2)
    cluster.settle()
