"""Which steps make a streak, what a rollback leaves out for it, and which checkpoint it goes back to."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain import UpdateGuard
from disttrain.callbacks.checkpointing.guarded import Guarded
from disttrain.callbacks.update_guard.rollback import read_rollbacks, write_rollbacks
from disttrain.callbacks.update_guard.streak import Rollback, Streak, merged, planned_steps, roll_back, targets
from disttrain.checkpoint.format.marker import About, Committed, Metric
from disttrain.checkpoint.format.retention import Keep
from disttrain.errors import CheckpointError, ConfigError


def after(steps: str, *, patience: int = 3, first: int = 1) -> Streak:
    """A streak after steps that were updated (.), bad (b) or left out as planned (p)."""
    streak = Streak(patience)
    for step, kind in enumerate(steps, start=first):
        streak.add(step, left_out=kind != ".", planned=kind == "p")
    return streak


@pytest.mark.parametrize(
    ("steps", "first", "last", "bad"),
    [
        ("", 0, 0, []),
        ("..bb", 3, 4, [3, 4]),
        ("bb..", 0, 0, []),
        ("..bbb", 3, 5, [3, 4, 5]),
        ("..bbbbb", 3, 7, [3, 4, 5, 6, 7]),
        ("..bbb..b", 3, 5, [3, 4, 5]),  # what comes after it is for the replay
        ("..bbb.bbbb", 3, 5, [3, 4, 5]),
        (".ppp", 2, 4, []),
        (".pppp.", 0, 0, []),
        (".ppbb", 2, 5, [4, 5]),
        (".ppbbb", 2, 6, [4, 5, 6]),
        (".bpb", 2, 4, [2, 4]),
    ],
)
def test_a_streak_is_what_was_left_out_in_a_row(steps: str, first: int, last: int, bad: list[int]) -> None:
    streak = after(steps)
    assert (streak.first, streak.last, streak.bad) == (first, last, bad)
    assert streak.too_long is (len(bad) >= 3)
    again = Streak(3)
    again.load(streak.state())
    assert again == streak


def test_a_rollback_leaves_out_the_streak_and_some_before_it() -> None:
    streak = after("bbbb", first=20)
    assert roll_back(streak, from_step=30, to_step=8, margin=5) == Rollback(30, 8, 15, 23)
    assert roll_back(streak, from_step=30, to_step=17, margin=5) == Rollback(30, 17, 18, 23), "it is not replayed"
    assert roll_back(streak, from_step=30, to_step=8, margin=0) == Rollback(30, 8, 20, 23)
    one, two = Rollback(30, 8, 15, 17), Rollback(60, 48, 51, 52)
    assert planned_steps([one, two]) == {15, 16, 17, 51, 52}
    assert merged([one], [one, two]) == [one, two]


def test_the_newest_checkpoint_from_before_the_margin_comes_first() -> None:
    found = [Committed(Path(f"step-{step}"), step) for step in (4, 8, 12, 16, 20)]

    def order(first: int, margin: int) -> list[int]:
        return [entry.global_step for entry in targets(found, first=first, margin=margin)]

    assert order(17, 0) == [16, 12, 8, 4]
    assert order(16, 0) == [12, 8, 4], "a checkpoint of step 16 holds that step"
    assert order(17, 2) == [12, 8, 4, 16]
    assert order(17, 15) == [4, 8, 12, 16], "where none is from before the margin, the oldest"
    assert order(4, 0) == []


def test_checkpoints_from_before_a_streak_are_not_pruned() -> None:
    found = [Committed(Path(f"step-{step}"), step) for step in (4, 8, 12, 16)]
    assert [entry.global_step for entry in Keep(1).superfluous(found)] == [4, 8, 12]
    assert [entry.global_step for entry in Keep(1, below_step=10).superfluous(found)] == [12]


@pytest.mark.parametrize(("every", "margin"), [(5, 10), (5, 2), (1, 10), (7, 0), (20, 10), (3, 3)])
def test_there_is_always_one_from_before_the_margin(every: int, margin: int) -> None:
    """Whenever a streak begins, with one checkpoint kept; and no more than two besides."""
    guarded = Guarded(lambda: 0, margin)
    found: list[Committed] = []
    for step in range(1, 150):
        ready = [entry.global_step for entry in found if entry.global_step < step - margin]
        if step > margin + 2 * every:
            assert ready, f"a streak that begins at step {step} has only {found}"
            assert ready[-1] >= step - 2 * (margin + every), "it is older than need be"
        if step % every == 0:
            found.append(Committed(Path(f"step-{step}"), step))
            gone = guarded.widen(Keep(1), step).superfluous(found)
            found = [entry for entry in found if entry not in gone]
            assert len(found) <= (2 if every >= margin else 3), found
    assert Guarded(lambda: 0, None).widen(Keep(1), 50).superfluous(found) == found[:-1], "it never goes back"


def test_what_was_the_best_at_one_to_go_back_to_is_kept() -> None:
    """The loss falls from save to save but for one: the best at step 20 is that of 15, which 25 replaces."""
    losses = {5: 5.0, 10: 4.0, 15: 3.0, 20: 3.5, 25: 2.0, 30: 1.0}
    found = [
        Committed(Path(f"step-{step}"), step, About(step, metric=Metric("val/loss", loss, "min")))
        for step, loss in losses.items()
    ]
    keep = Guarded(lambda: 0, 10).widen(Keep(1, best=["step-30"]), 30)  # before step 21
    assert [entry.global_step for entry in keep.superfluous(found)] == [5, 10]
    assert [entry.global_step for entry in Keep(1, best=["step-30"]).superfluous(found)] == [5, 10, 15, 20, 25]


def test_the_record_of_rollbacks(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path / "skipped") == []
    made = [Rollback(30, 8, 15, 17), Rollback(60, 48, 51, 52)]
    write_rollbacks(tmp_path / "skipped", made)
    assert read_rollbacks(tmp_path / "skipped") == made
    for damage in ("", "{}", "[]", '{"rollbacks": [{"to_step": 3}]}'):
        (tmp_path / "skipped" / "rollbacks.json").write_text(damage)
        with pytest.raises(CheckpointError, match=r"rollbacks\.json, which says what batches are to be left out"):
            read_rollbacks(tmp_path / "skipped")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_rollbacks(tmp_path / "file" / "skipped", made)


@pytest.mark.parametrize("settings", [{"rollbacks": -1}, {"margin": -1}, {"patience": 0}, {"spikes": 1.0}])
def test_settings_out_of_range(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"guard.{next(iter(settings))} is|guard.patience 0|margin -1"):
        UpdateGuard(**settings)  # type: ignore[arg-type]
