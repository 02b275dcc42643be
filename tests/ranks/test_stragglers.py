"""The rank that the others wait for is named, with what it spends its time on, in the record and the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.callbacks.stragglers import Quantiles, find_slow
from disttrain.report import write_report
from disttrain.system.reading import read_run
from tests.support.preemption import fit


@pytest.mark.slow
def test_a_slow_rank_is_found_in_a_real_run(digits: Path, tmp_path: Path) -> None:
    name = "--trainer.callbacks"
    slow = [f"{name}+=tests.support.callbacks.Slowly", f"{name}.seconds=0.05", f"{name}.rank=1"]
    fit(tmp_path / "run", digits, "ddp", slow).ok()
    record = read_run(tmp_path / "run")
    events = [event["text"] for event in record["events"] if event["kind"] == "slow rank"]
    assert len(events) == 1, events
    assert events[0].startswith("rank 1 on ")
    one, other = record["ranks"]
    assert other["forward_p50"] >= one["forward_p50"] + 0.08, "two micro batches, 50 ms each"
    waits = {each["rank"]: each["communication_p50"] + each["rest_p50"] for each in (one, other)}
    assert waits[0] > waits[1] + 0.04, "the fast rank waits for the slow one"
    page = write_report([tmp_path / "run"]).read_text()
    assert "Forward pass, median" in page
    assert "rank 1 on " in page


@pytest.mark.slow
def test_a_rank_that_is_slow_in_its_backward_pass_is_found_too(digits: Path, tmp_path: Path) -> None:
    name = "--trainer.callbacks"
    fit(tmp_path / "run", digits, "ddp", [f"{name}+=tests.support.troubles.SlowBackward", f"{name}.seconds=0.03"]).ok()
    record = read_run(tmp_path / "run")
    events = [event["text"] for event in record["events"] if event["kind"] == "slow rank"]
    assert len(events) == 1, events
    assert events[0].startswith("rank 1 on ")
    one, other = record["ranks"]
    assert other["backward_p50"] >= one["backward_p50"] + 0.04, "two micro batches, 30 ms each"
    assert one["communication_p50"] > other["communication_p50"] + 0.02, "the fast rank waits for the slow one there"


def quantiles(
    rank: int, step: float, wait: float, forward: float, *, backward: float = 0.0, alone: bool = True
) -> Quantiles:
    medians = {"step": step, "wait": wait, "forward": forward, "backward": backward}
    return {
        "rank": rank,
        "host": "node",
        "backward_alone": alone,
        **{f"{name}_p50": median for name, median in medians.items()},
    }


def test_what_counts_as_slow() -> None:
    even = [quantiles(rank, 1.0, 0.01, 0.3) for rank in range(4)]
    assert find_slow(even) == {}
    waits = [*even[:3], quantiles(3, 1.0, 0.5, 0.3)]
    assert find_slow(waits)[3] == (
        "rank 3 on node holds up the others: of a step of 1,000 ms it takes 800 ms alone (data wait 500 ms, forward"
        " pass 300 ms, backward pass 0 ms), the median rank 310 ms"
    )
    # Twice as slow, but in a part that hardly counts.
    assert find_slow([quantiles(0, 1.0, 0, 0.01), quantiles(1, 1.0, 0, 0.02)]) == {}
    assert find_slow([quantiles(0, 1.0, 0, 0.1)]) == {}
    # Under FSDP a backward pass holds the waiting for others.
    for alone in (True, False):
        slow = [quantiles(0, 1.0, 0, 0.1, alone=alone), quantiles(1, 1.0, 0, 0.1, backward=0.5, alone=alone)]
        assert list(find_slow(slow)) == ([1] if alone else [])
