"""A run that hangs says which rank is where, and every rank ends with 76."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disttrain.callbacks.watchdog.callback import last_entries
from disttrain.system.reading import read_run
from tests.support.preemption import fit
from tests.support.ranks import Outcome


def hang(run_dir: Path, data: Path, *more: str) -> Outcome:
    return fit(run_dir, data, "ddp", ["--trainer.hang_timeout", "4s", *more])


def at(how: str, rank: int = 1) -> list[str]:
    name = "--trainer.callbacks"
    return [f"{name}+=tests.support.callbacks.HangAt", f"{name}.step=5", f"{name}.how={how}", f"{name}.rank={rank}"]


def assert_reported(
    outcome: Outcome, run_dir: Path, suspect: str, *, silent: int | None = None, step: int | None = 5
) -> str:
    """The report names the suspect first, is in the folder and the record, and lists the stacks."""
    codes = [code for rank, code in enumerate(outcome.codes) if rank != silent]
    assert codes == [76] * len(codes), f"exit codes {outcome.codes}\n{outcome.text}"
    event = read_run(run_dir)["events"][-1]
    assert event["kind"] == "hang"
    assert step in (None, event["step"])
    assert outcome.text.count(f"disttrain: the run hangs at step {event['step']}") == 1, outcome.text
    report = next((run_dir / "hangs").glob("*/report.txt"))
    text = report.read_text()
    assert f": no step or batch for 4 s. {suspect}" in text, text.splitlines()[0]
    assert event["text"].startswith(suspect)
    assert read_run(run_dir)["attempts"][-1]["stop_reason"] == "hung"
    assert "thread MainThread" in text
    return text


def test_user_code_in_a_loop(digits: Path, tmp_path: Path) -> None:
    outcome = hang(tmp_path / "run", digits, *at("loop"))
    text = assert_reported(outcome, tmp_path / "run", "rank 1 is in user code support/callbacks.py:")
    assert "(on_train_batch_start); rank 0 " in text.splitlines()[0]
    told = json.loads(next((tmp_path / "run" / "hangs").glob("*/rank-00000.json")).read_text())
    assert "gradients are reduced" in told["place"] or "waits for the other ranks" in told["place"]
    # The next attempt is another one: it ends as if nothing had been.
    fit(tmp_path / "run", digits, "ddp").ok()
    assert read_run(tmp_path / "run")["attempts"][-1]["from_step"] == 4


@pytest.mark.slow
def test_an_extra_collective(digits: Path, tmp_path: Path) -> None:
    outcome = hang(tmp_path / "run", digits, *at("collective"))
    suspect = "rank 1 waits for the other ranks in barrier, called by user code support/callbacks.py:"
    assert_reported(outcome, tmp_path / "run", suspect)


def test_the_first_sample_never_comes(digits: Path, tmp_path: Path) -> None:
    stuck = "--data.hooks.transform=tests.support.hooks.Stuck"
    outcome = hang(tmp_path / "run", digits, stuck, "--data.hooks.transform.init_args.after=1")
    text = assert_reported(outcome, tmp_path / "run", "rank 1 is in the reader, shard", step=0)
    assert "in user code support/hooks.py:" in text.splitlines()[0]
    assert "rank 1 on " in text
    assert ", first batch of the epoch, step 0: is in the reader" in text


@pytest.mark.slow
def test_training_never_starts(digits: Path, tmp_path: Path) -> None:
    outcome = hang(tmp_path / "run", digits, *at("start"))
    suspect = "rank 1 is in user code support/callbacks.py:"
    assert "(on_train_start)" in assert_reported(outcome, tmp_path / "run", suspect, step=0).splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "lock"])
def test_a_rank_whose_python_does_not_run(digits: Path, tmp_path: Path, how: str) -> None:
    outcome = hang(tmp_path / "run", digits, *at(how))
    assert_reported(outcome, tmp_path / "run", "rank 1 told nothing: dead, stopped", silent=1)
    assert ("in on_train_batch_start" in outcome.outputs[1]) == (how == "lock"), outcome.outputs[1]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [0, 2])
def test_a_reader_that_is_stuck(digits: Path, tmp_path: Path, threads: int) -> None:
    blocked = ("--data.hooks.transform=tests.support.hooks.Stuck", f"--data.loader.threads={threads}")
    outcome = hang(tmp_path / "run", digits, *blocked)
    text = assert_reported(outcome, tmp_path / "run", "rank 1 is in the reader, shard", step=None)
    assert "in user code support/hooks.py:" in text.splitlines()[0]


@pytest.mark.slow
def test_a_copy_that_takes_longer_than_the_limit_is_no_hang(digits: Path, tmp_path: Path) -> None:
    """Rank 1 uploads its files of the last checkpoint for longer than the limit; rank 0 only waits for it."""
    name = "--trainer.callbacks"
    slow = (f"{name}+=tests.support.troubles.SlowCopy", f"{name}.seconds=2.5", f"{name}.rank=1")
    copies = (
        "--checkpoint.mirror.url",
        (tmp_path / "copies").as_uri(),
        "--checkpoint.every_steps=50",
        "--checkpoint.keep_best=0",
    )
    hang(tmp_path / "run", digits, *copies, *slow).ok()
    assert read_run(tmp_path / "run")["status"] == "completed"
    assert len(list((tmp_path / "copies").glob("*/COMMITTED"))) == 1
    assert not (tmp_path / "run" / "hangs").exists(), "what was told of the copy was left"


def test_the_newest_entries_of_all_flight_recorders_are_told() -> None:
    """As PyTorch gives them: gloo's recorder, and NCCL's, whose entries have fields of their own."""

    def entry(at: int, what: str) -> dict[str, object]:
        return {
            "time_created_ns": at,
            "collective_seq_id": at,
            "profiling_name": what,
            "input_sizes": [[4]],
            "state": "scheduled",
            "process_group": ["0", "default_pg"],
        }

    host = {"entries": [entry(at, "gloo:all_reduce") for at in (1, 2, 3, 4, 5, 9)]}
    device = {"version": "2.10", "entries": [{**entry(at, "nccl:broadcast"), "duration_ms": 1} for at in (6, 7, 8)]}
    told = last_entries([host, device, host, {}])
    assert [line.split()[:2] for line in told] == [
        ["5", "gloo:all_reduce"],
        *(["678"[place], "nccl:broadcast"] for place in range(3)),
        ["9", "gloo:all_reduce"],
    ]
    assert told[-1] == "9 gloo:all_reduce [[4]] scheduled in group 0 default_pg"
