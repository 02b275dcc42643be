"""Short campaigns: runs that are brought down again and again, and lose nothing. Long ones: ``benchmarks/chaos.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.callbacks.records.sample_ledger import read_ledger
from tests.support.chaos import disk
from tests.support.chaos.campaign import TREE, Campaign, fit_arguments, start, whole_run
from tests.support.chaos.launcher import run_under_torchrun
from tests.support.chaos.plan import IN_SAVE, STEPS, Fault, Layout, schedule

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
needs_mounts = pytest.mark.skipif(not disk.can_mount(), reason="file systems cannot be mounted here: no disk to fill")
ONE, TWO, FOUR = Layout(1, "ddp"), Layout(2, "fsdp"), Layout(4, "ddp")


def test_the_schedule_follows_from_its_seed() -> None:
    """And has every kind of fault, in an order that every attempt can meet."""
    made = schedule(1, [TWO], attempts=40, small_disk=True, hangs=True)
    assert made == schedule(1, [TWO], attempts=40, small_disk=True, hangs=True)
    assert made != schedule(2, [TWO], attempts=40, small_disk=True, hangs=True)
    ends = [attempt.faults[-1] for attempt in made[:-1]]
    assert {fault.place for fault in ends if fault.act == "kill"} >= set(IN_SAVE)
    acts = {fault.act for attempt in made for fault in attempt.faults}
    assert acts == {"kill", "kill-all", "terminate", "pause", "hang", "leave", "eio", "full", "read-only"}
    assert [fault.step for fault in ends] == sorted(fault.step for fault in ends)
    assert {what for attempt in made for what in attempt.between} == {"shard", "truncate", "flip", "marker"}
    assert made[-1].faults == (), "the last one goes on to the end"


@pytest.mark.slow
def test_one_rank_brought_down_six_times(digits: Path, tmp_path: Path) -> None:
    whole = whole_run(tmp_path / "whole", digits, ONE)
    rows = Campaign(tmp_path, digits, 6, schedule(6, [ONE], attempts=5), whole).run()
    assert sum(row.kill for row in rows) >= 4, rows


@pytest.mark.slow
@needs_mounts
def test_two_ranks_on_a_disk_that_fills_up(digits: Path, tmp_path: Path) -> None:
    whole = whole_run(tmp_path / "whole", digits, TWO)
    attempts = schedule(7, [TWO], attempts=12, small_disk=True)
    rows = Campaign(tmp_path, digits, 7, attempts, whole, small_disk=True).run()
    assert {"full and go on, writing"} <= {row.fault for row in rows}, rows


@pytest.mark.slow
def test_layouts_that_change(digits: Path, tmp_path: Path) -> None:
    """With the tree's sums, the bits are those of any layout."""
    whole = whole_run(tmp_path / "whole", digits, ONE, TREE)
    attempts = schedule(3, [ONE, TWO, FOUR], attempts=8)
    assert {attempt.layout for attempt in attempts} == {ONE, TWO, FOUR}
    Campaign(tmp_path, digits, 3, attempts, whole, TREE).run()


@pytest.mark.slow
def test_torchrun_and_its_own_death(digits: Path, tmp_path: Path) -> None:
    layout = Layout(2, "ddp")
    whole = whole_run(tmp_path / "whole", digits, layout)
    rows = run_under_torchrun(tmp_path, digits, whole, layout)
    assert sum(row.kill for row in rows) == 6, rows


@needs_mounts
@pytest.mark.slow
def test_a_full_disk_that_ends_a_run_is_one_error(digits: Path, tmp_path: Path) -> None:
    """Whichever comes to it first, a checkpoint or the ledger of samples, which has no holes."""
    run_dir = tmp_path / "run"
    with disk.small_disk(run_dir, megabytes=8):
        ranks = start(ONE, fit_arguments(run_dir, digits, ONE), [Fault("full", "step", 9)], folder=tmp_path / "logs")
        outcome = ranks.wait()
        disk.make_sound(run_dir / "checkpoints")
        assert outcome.codes == [2], outcome.text
        assert outcome.text.count("disttrain: error") == outcome.text.count("hint:") == 1, outcome.text
        assert "No space left on device" in outcome.text, outcome.text
        assert "Traceback" not in outcome.text, outcome.text
        start(ONE, fit_arguments(run_dir, digits, ONE), folder=tmp_path / "again").wait().ok()
        assert list(read_ledger(run_dir / "ledger")) == list(range(STEPS))
