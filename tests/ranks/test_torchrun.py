"""Under the real torchrun: a job restarts by itself, at the size that is left, and stops when it is asked to."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.system.reading import read_run
from tests.support.kills import killed_at
from tests.support.preemption import STEPS, Stop, fit, fit_arguments
from tests.support.torchrun import torchrun
from tests.support.weights import differing, distance, final_weights

pytestmark = pytest.mark.slow
STANDALONE = ("--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stops, on two ranks, whose sums do not depend on their number."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    fit(run_dir, digits, "ddp", TREE).ok()
    return run_dir


WAITING = """
import os, time
from disttrain import Trainer

trainer, parent = Trainer(run_dir={folder!r}, accelerator="cpu", progress_bar=False), os.getppid()
print("ready", os.environ["RANK"], flush=True)
while os.environ["RANK"] == "1" and os.getppid() == parent:
    time.sleep(0.02)  # joins only once its torchrun is dead
trainer.connect()
"""


def test_ranks_end_with_a_torchrun_that_dies_before_they_have_met(tmp_path: Path) -> None:
    """One rank waits for the other; that one comes when there is no store any more."""
    (tmp_path / "wait.py").write_text(WAITING.format(folder=str(tmp_path / "run")))
    with torchrun(STANDALONE, [str(tmp_path / "wait.py")], tmp_path / "log") as launch:
        for rank in range(2):
            launch.wait_for(f"ready {rank}")
        ranks = launch.workers()
        launch.process.kill()
        _, left = psutil.wait_procs(ranks, timeout=60)
        for process in left:
            process.kill()
        assert not left, launch.log.read_text()
    assert "torchrun died before all ranks had joined" in launch.log.read_text()


TREE = ("--trainer.parallel.reduction", "tree")
ON_DISK = ("--checkpoint.save", "sync")  # before the next step begins


def test_a_killed_rank_restarts_the_job_by_itself(digits: Path, tmp_path: Path, whole: Path) -> None:
    """Though it was told to start anew. A report that cannot be written at the end does not fail what is complete."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "report").write_text("in the way of the report")
    first, second = killed_at(14, rank=1, once=True), killed_at(21, rank=0, once=True)
    arguments = fit_arguments(run_dir, digits, "ddp", [*TREE, *ON_DISK, "--resume", "never", *first, *second])
    with torchrun([*STANDALONE, "--max-restarts", "3"], arguments, tmp_path / "log") as launch:
        assert launch.wait() == 0, launch.log.read_text()
        text = launch.log.read_text()
    assert text.count("restarted by torchrun, so --resume never is treated as auto") == 2, text
    assert text.count("the run is complete, but its report could not be written") == 1, text
    assert not run_dir.with_name("run.1").exists(), "the run was set aside"
    run = read_run(run_dir)
    assert run["status"] == "completed"
    assert [attempt["from_step"] for attempt in run["attempts"]] == [0, 12, 20]
    assert not differing(final_weights(whole), final_weights(run_dir))
    assert read_ledger(whole / "ledger") == read_ledger(run_dir / "ledger")
    assert run["result"] == read_run(whole)["result"]


def test_one_rank_alone_ends_well(digits: Path, tmp_path: Path) -> None:
    """With its test and report, for which the launcher's variables have to be there still."""
    options = ("--standalone", "--nproc-per-node", "1")
    arguments = fit_arguments(tmp_path / "run", digits, "ddp", TREE)
    with torchrun(options, arguments, tmp_path / "log") as launch:
        assert launch.wait() == 0, launch.log.read_text()
    assert read_run(tmp_path / "run")["status"] == "completed"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_what_torchrun_is_told_its_ranks_are_told(digits: Path, tmp_path: Path, whole: Path, name: str) -> None:
    """torchrun passes the signal on, waits for the ranks, and ends with 1; the ranks have saved."""
    run_dir = tmp_path / "run"
    slow = ["--trainer.callbacks+=tests.support.callbacks.Slowly", "--trainer.callbacks.seconds=0.3"]
    arguments = fit_arguments(run_dir, digits, "ddp", [*TREE, *slow])
    handled = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")  # not SIGUSR1 by default
    with torchrun([*STANDALONE, "--max-restarts", "2", *handled], arguments, tmp_path / "log") as launch:
        launch.wait_for(run_dir / "checkpoints" / "step-00000004")
        launch.process.send_signal(signal.Signals[name])
        code = launch.wait(60)
        text = launch.log.read_text()
    assert code == 1, text
    assert f"by {name} on rank" in text
    assert "disttrain: stopped at step" in text
    stopped = read_run(run_dir)
    assert [attempt["status"] for attempt in stopped["attempts"]] == ["preempted"]
    step = stopped["attempts"][0]["to_step"]
    assert 4 <= step < STEPS
    fit(run_dir, digits, "ddp", TREE).ok()
    assert read_run(run_dir)["attempts"][1]["from_step"] == step
    assert not differing(final_weights(whole), final_weights(run_dir))


def test_a_job_that_was_asked_to_stop_is_not_restarted(digits: Path, tmp_path: Path) -> None:
    """torchrun starts ranks again that end with 75; they end again before they train."""
    run_dir = tmp_path / "run"
    stop = Stop("train", 5, ranks=(1,))
    arguments = fit_arguments(run_dir, digits, "ddp", stop.arguments())
    with torchrun([*STANDALONE, "--max-restarts", "1"], arguments, tmp_path / "log") as launch:
        assert launch.wait() == 1
        text = launch.log.read_text()
    assert "not started again: this launch was preempted by SIGTERM on rank 1" in text
    assert "exitcode  : 75" in text
    assert [attempt["to_step"] for attempt in read_run(run_dir)["attempts"]] == [6]


def test_a_hang_restarts_the_job(digits: Path, tmp_path: Path, whole: Path) -> None:
    run_dir = tmp_path / "run"
    name = "--trainer.callbacks"
    hang = [f"{name}+=tests.support.callbacks.HangAt", f"{name}.step=9", f"{name}.how=loop"]
    arguments = fit_arguments(run_dir, digits, "ddp", [*TREE, *hang, "--trainer.hang_timeout", "10s"])
    with torchrun([*STANDALONE, "--max-restarts", "1"], arguments, tmp_path / "log") as launch:
        assert launch.wait() == 0, launch.log.read_text()
        assert "rank 1 is in user code support/callbacks.py" in launch.log.read_text()
    run = read_run(run_dir)
    assert [attempt["from_step"] for attempt in run["attempts"]] == [0, 8]
    assert [attempt["stop_reason"] for attempt in run["attempts"]] == ["hung", f"max_steps {STEPS} reached"]
    assert not differing(final_weights(whole), final_weights(run_dir))


def test_a_job_that_was_suspended_does_not_hang(digits: Path, tmp_path: Path) -> None:
    """All ranks stopped for longer than the limit, as by a scheduler, go on."""
    run_dir = tmp_path / "run"
    slow = ["--trainer.callbacks+=tests.support.callbacks.Slowly", "--trainer.callbacks.seconds=0.2"]
    arguments = fit_arguments(run_dir, digits, "ddp", [*slow, "--trainer.hang_timeout", "10s"])
    with torchrun(STANDALONE, arguments, tmp_path / "log") as launch:
        launch.wait_for(run_dir / "checkpoints" / "step-00000004")
        for worker in launch.workers():
            worker.suspend()
        time.sleep(15)  # what is tested is the passing of time
        for worker in launch.workers():
            worker.resume()
        assert launch.wait() == 0, launch.log.read_text()
    assert not (run_dir / "hangs").exists()


def test_a_node_that_dies_leaves_a_smaller_job(digits: Path, port: int, tmp_path: Path, whole: Path) -> None:
    """Two agents of one rank each; one dies, the other goes on alone. The tree's sums do not depend on that."""
    run_dir = tmp_path / "run"
    slow = ["--trainer.callbacks+=tests.support.callbacks.Slowly", "--trainer.callbacks.seconds=0.3"]
    arguments = fit_arguments(run_dir, digits, "ddp", [*TREE, *slow])
    options = [
        *("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "test"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"),
        *("--rdzv-conf", "last_call_timeout=5"),
    ]
    with torchrun(options, arguments, tmp_path / "log-0") as stays:
        stays.wait_for_port(port)
        with torchrun(options, arguments, tmp_path / "log-1") as dies:
            stays.wait_for(run_dir / "checkpoints" / "step-00000008")
            dies.kill()
        assert stays.wait() == 0, stays.log.read_text()
    run = read_run(run_dir)
    assert [attempt["world_size"] for attempt in run["attempts"]] == [2, 1]
    assert run["attempts"][1]["from_step"] >= 8
    apart = distance(final_weights(whole), final_weights(run_dir))
    assert not differing(final_weights(whole), final_weights(run_dir)), f"weights are {apart:.2e} apart"
    assert read_ledger(whole / "ledger") == read_ledger(run_dir / "ledger")
