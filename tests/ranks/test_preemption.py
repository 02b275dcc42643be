"""Asked to stop, at any place and on any rank: saved at a step boundary, exit code 75, and nothing lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from disttrain.checkpoint.format.reader import committed
from disttrain.system.reading import read_run
from tests.support.preemption import STEPS, Stop, fit, stop_and_resume
from tests.support.ranks import Outcome
from tests.support.weights import differing, final_weights


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that nothing stops, by strategy; made when it is first asked for."""
    folder = tmp_path_factory.mktemp("whole")

    class Whole(dict[str, Path]):
        def __missing__(self, strategy: str) -> Path:
            fit(folder / strategy, digits, strategy).ok()
            self[strategy] = folder / strategy
            return self[strategy]

    return Whole()


def assert_stopped(outcome: Outcome, cause: str) -> None:
    """Every rank ended with 75, and rank 0 alone said why."""
    assert outcome.codes == [75] * len(outcome.codes), f"exit codes {outcome.codes}\n{outcome.text}"
    assert "Traceback" not in outcome.text, outcome.text
    assert len(re.findall(rf"disttrain: stopped at step \d+ by {cause};", outcome.text)) == 1, outcome.text


STOPS = [
    # A validation under way on the rank that is not asked: it is left, saved as due, and done again.
    ("ddp", Stop("validation", 10, ranks=(1,)), 10),
    pytest.param("fsdp", Stop("train", 5, ranks=(1,)), 6, marks=pytest.mark.slow),
    pytest.param("fsdp", Stop("validation", 20, skew=1.0), 20, marks=pytest.mark.slow),
    pytest.param("ddp", Stop("train", 19, "SIGUSR1", skew=1.0), 20, marks=pytest.mark.slow),
    pytest.param("ddp", Stop("train", 9, "SIGINT"), 10, marks=pytest.mark.slow),
    pytest.param("ddp", Stop("save", 8, ranks=(0,)), 9, marks=pytest.mark.slow),
    pytest.param("fsdp", Stop("save", 10, ranks=(1,), skew=1.0), 11, marks=pytest.mark.slow),
    pytest.param("ddp", Stop("end", STEPS, ranks=(1,)), STEPS, marks=pytest.mark.slow),
    pytest.param("ddp", Stop("train", 18), 19, marks=pytest.mark.slow),  # the last step of an epoch
    pytest.param("ddp", Stop("setup", ranks=(1,), skew=2.0), None, marks=pytest.mark.slow),
    pytest.param("ddp", Stop("sanity", signal="SIGINT", ranks=(0,)), None, marks=pytest.mark.slow),
    pytest.param("ddp", Stop("start"), None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("strategy", "stop", "saved_at"), STOPS)
def test_stopped_and_resumed_gives_the_same_bits(
    digits: Path, tmp_path: Path, whole: dict[str, Path], strategy: str, stop: Stop, saved_at: int | None
) -> None:
    found = stop_and_resume(tmp_path / "run", whole[strategy], digits, strategy, stop)
    ranks = f"rank {stop.ranks[0]}" if len(stop.ranks) == 1 else "rank [01]"
    assert_stopped(found.outcome, f"{stop.signal} on {ranks}")
    assert (found.saved_at, found.resumed_at) == (saved_at, saved_at or 0), found.outcome.text
    assert not found.different, f"not equal bit by bit: {found.different}"
    assert found.ledger_equal

    run, uninterrupted = read_run(tmp_path / "run"), read_run(whole[strategy])
    assert [run[name] for name in ("status", "best", "result")] == [
        uninterrupted[name] for name in ("status", "best", "result")
    ]
    assert [attempt.get("status") for attempt in run["attempts"]] == ["preempted", None]
    assert run["attempts"][0]["stop_reason"].startswith(f"preempted by {stop.signal}")
    assert run["attempts"][0]["to_step"] == (saved_at or 0)


def test_the_stop_file_and_the_time_limit(digits: Path, tmp_path: Path) -> None:
    """One rank: the file is taken away when it was obeyed; the limit counts from the start of the process."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    outcome = fit(run_dir, digits, "ddp", ranks=1)
    assert_stopped(outcome, "the file STOP")
    assert "nothing was to be saved yet" in outcome.text
    assert not (run_dir / "STOP").exists()
    outcome = fit(run_dir, digits, "ddp", ["--trainer.stop_after", "0.01s"], ranks=1)
    assert_stopped(outcome, "trainer.stop_after")
    assert [attempt["to_step"] for attempt in read_run(run_dir)["attempts"]] == [0, 0]


@pytest.mark.slow
def test_stopped_at_every_start_the_run_still_ends_and_is_the_same(
    digits: Path, tmp_path: Path, whole: dict[str, Path]
) -> None:
    """Stopped again while it makes up for a validation, and again after its last step."""
    run_dir = tmp_path / "run"
    for stop in (Stop("validation", 10), Stop("validation", 10, ranks=(1,)), Stop("end", STEPS), Stop("end", STEPS)):
        outcome = fit(run_dir, digits, "ddp", stop.arguments())
        assert outcome.codes == [75, 75], outcome.text
    fit(run_dir, digits, "ddp").ok()
    steps = [(attempt["from_step"], attempt["to_step"]) for attempt in read_run(run_dir)["attempts"]]
    assert steps == [(0, 10), (10, 10), (10, STEPS), (STEPS, STEPS), (STEPS, STEPS)]
    assert not differing(final_weights(whole["ddp"]), final_weights(run_dir))
    assert read_run(run_dir)["result"] == read_run(whole["ddp"])["result"]
    assert len(committed(run_dir / "checkpoints")[0]) <= 3, "stops pile up checkpoints"
