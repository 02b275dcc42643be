"""Saves of real runs: in the background or not the same bytes, killed inside, errors on one rank, an old process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from disttrain.checkpoint.format.marker import committed
from disttrain.checkpoint.format.reader import groups, read_group, read_meta
from disttrain.system.reading import read_run
from tests.support.callbacks import KillInSave
from tests.support.ranks import Outcome, run_cli
from tests.support.weights import differing, final_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def arguments(run_dir: Path, data: Path, *more: str) -> list[str]:
    """Train a small network on digits for 12 steps; a checkpoint every 4, a validation every 6."""
    return [
        *("fit", "--model", "tests.support.tasks.PlainDigits", "--data.fields", "{image: image.npy, label: cls}"),
        *(f"--data.{split}={data}/{split}.json" for split in ("train", "val")),
        *("--data.global_batch_size", "32", "--data.micro_batch_size", "8", "--trainer.run_dir", str(run_dir)),
        *("--trainer.max_steps", "12", "--trainer.validate_every_steps", "6", "--checkpoint.every_steps", "4"),
        *("--checkpoint.monitor", "val/loss", "--trainer.progress_bar", "false"),
        *more,
    ]


def fit(run_dir: Path, data: Path, ranks: int, *more: str) -> Outcome:
    return run_cli(ranks, arguments(run_dir, data, *more), folder=run_dir.parent / f"{run_dir.name}-logs")


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {f"{group}.{name}": value for group in groups(path) for name, value in read_group(path, group).items()}


@pytest.mark.parametrize(("ranks", "strategy"), [pytest.param(2, "ddp", marks=pytest.mark.slow), (2, "fsdp")])
def test_in_the_background_the_same_is_saved(digits: Path, tmp_path: Path, ranks: int, strategy: str) -> None:
    found = {}
    for way in ("async", "sync"):
        more = ("--checkpoint.save", way, "--checkpoint.keep_last", "9", "--trainer.parallel.strategy", strategy)
        fit(tmp_path / way, digits, ranks, *more).ok()
        found[way], passed_over = committed(tmp_path / way / "checkpoints")
        assert passed_over == []
    assert [entry.global_step for entry in found["async"]] == [4, 6, 8, 12]
    for one, other in zip(found["async"], found["sync"], strict=True):
        names = differing(tensors_of(one.path), tensors_of(other.path))
        assert not names, f"step {one.global_step}: not equal bit by bit: {names}"
        assert (one.global_step, one.about.metric) == (other.global_step, other.about.metric)
        a, b = (_comparable(read_meta(entry.path)) for entry in (one, other))
        assert a == b, f"step {one.global_step}: other callbacks or schedules"
    assert len({entry.about.run for entry in found["async"]}) == 1
    assert found["async"][1].about.metric is not None


def _comparable(meta: dict[str, object]) -> str:
    return repr(meta)


PLACES = [
    *(pytest.param(place, id=place) for place in ("writing",)),
    *(pytest.param(place, id=place, marks=pytest.mark.slow) for place in KillInSave.PLACES if place != "writing"),
]


@pytest.mark.parametrize("place", PLACES)
def test_killed_inside_a_save_and_resumed(digits: Path, tmp_path: Path, place: str) -> None:
    """Rank 0 is killed; nothing that was committed is lost, nothing is left lying, the end is the same."""
    fit(tmp_path / "whole", digits, 2).ok()
    run_dir = tmp_path / "killed"
    trap = ("--trainer.callbacks+=tests.support.callbacks.KillInSave", f"--trainer.callbacks.place={place}")
    more = ("--trainer.callbacks.step=8", "--guard.margin=0")  # nothing older is kept for the guard: it is deleted
    codes = fit(run_dir, digits, 2, *trap, *more).codes
    assert codes[0] == -9, f"not killed while {place}: {codes}"
    found, _ = committed(run_dir / "checkpoints")
    assert {entry.global_step for entry in found} & {4, 6, 8}, "the earlier checkpoints are gone"
    due = max(entry.global_step for entry in found)
    if place in ("latest", "pruning"):
        # The save that met the trap began at step 6 or at 8: training had gone on meanwhile.
        assert due >= 6, "a committed checkpoint does not count"

    outcome = fit(run_dir, digits, 2).ok()
    assert f"resuming from {run_dir}/checkpoints/step-{due:08d}" in outcome.text
    assert not differing(final_weights(tmp_path / "whole"), final_weights(run_dir))
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names <= {"ATTEMPT", "LATEST", "step-00000006", "step-00000012"}, f"left lying: {names}"
    assert [attempt["from_step"] for attempt in read_run(run_dir)["attempts"]] == [0, due]


def test_an_old_process_that_wakes_up_later_publishes_nothing(digits: Path, tmp_path: Path) -> None:
    """It is stopped at step 6, another process finishes the run, then it goes on."""
    run_dir = tmp_path / "run"
    stop = ("--trainer.callbacks+=tests.support.callbacks.StopAt", "--trainer.callbacks.step=6")
    command = [sys.executable, "-m", "disttrain", *arguments(run_dir, digits, *stop)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as stale:
        try:
            _, status = os.waitpid(stale.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), f"it ended before step 6: {stale.stdout and stale.stdout.read()}"
            fit(run_dir, digits, 1).ok()
            before = {str(path): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
        finally:
            os.kill(stale.pid, signal.SIGCONT)
        output, _ = stale.communicate(timeout=180)
    assert stale.returncode == 2, output
    assert "is attempt 1 of the run" in output
    assert "attempt 2 (host" in output
    assert "it will not publish anything" in output
    after = {str(path): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert not {name for name in changed if "tensorboard" not in name}, f"the old process has changed {changed}"
    assert read_run(run_dir)["status"] == "completed"


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_an_error_of_one_rank_in_the_background_comes_to_all(digits: Path, tmp_path: Path, on_error: str) -> None:
    run_dir = tmp_path / "run"
    fault = ("--trainer.callbacks+=tests.support.callbacks.FailInSave", "--trainer.callbacks.step=8")
    outcome = fit(run_dir, digits, 2, *fault, "--trainer.callbacks.rank=1", "--checkpoint.on_save_error", on_error)
    found, passed_over = committed(run_dir / "checkpoints")
    assert passed_over == []
    assert "Traceback" not in outcome.text
    if on_error == "stop":
        assert outcome.codes == [2, 2], outcome.text
        assert outcome.text.count("cannot write checkpoint") == 1, "one mistake, one message"
        assert "Disk quota exceeded" in outcome.text
        assert [entry.global_step for entry in found] == [4, 6], "6 is the best, 4 is held, 8 could not be written"
        assert read_run(run_dir)["status"] == "running"
    else:
        assert outcome.codes == [0, 0], outcome.text
        assert [entry.global_step for entry in found][-1] == 12
        events = [event["text"] for event in read_run(run_dir)["events"] if event["kind"] == "save"]
        assert len(events) == 1, events
        assert "no checkpoint of step 8, training goes on" in events[0]
        assert events[0] in outcome.text


def test_minutes_and_steps_kept_for_good(digits: Path, tmp_path: Path) -> None:
    """By the clock, at every step here; of these the last and every fifth remain."""
    more = ("--checkpoint.every_steps", "null", "--checkpoint.every_minutes", "1e-9", "--checkpoint.keep_best", "0")
    fit(tmp_path / "run", digits, 2, *more, "--checkpoint.keep_every_steps", "5").ok()
    found, _ = committed(tmp_path / "run" / "checkpoints")
    assert [entry.global_step for entry in found] == [5, 10, 12]


@pytest.mark.parametrize("name", ["run.json", "metrics.csv"])
def test_killed_while_a_small_file_is_replaced(digits: Path, tmp_path: Path, name: str) -> None:
    """The new file, under its temporary name, does not stay: the next attempt removes it."""
    run_dir = tmp_path / "run"
    trap = ("--trainer.callbacks+=tests.support.callbacks.KillAtReplace", f"--trainer.callbacks.name={name}")
    assert fit(run_dir, digits, 1, *trap).codes == [-9]
    assert [path for path in run_dir.iterdir() if path.name.startswith(f".{name}.")], "the trap has no effect"
    fit(run_dir, digits, 1).ok()
    assert not [path.name for path in run_dir.iterdir() if path.name.startswith(".")]
