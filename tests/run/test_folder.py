"""The folder of a run: where an attempt starts, and what happens to an older run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from disttrain.errors import CheckpointError
from disttrain.run.folder import (
    Start,
    best_checkpoint,
    choose_start,
    find_start,
    finished_by_this_job,
    launch_id,
    note_begun,
    take_back,
    write_run,
)
from disttrain.system.reading import read_run
from tests.support.checkpoints import make_checkpoint


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """An interrupted run with checkpoints of steps 2 and 10."""
    run = tmp_path / "runs" / "mine"
    make_checkpoint(run / "checkpoints", "step-10", 10)
    make_checkpoint(run / "checkpoints", "step-2", 2)
    write_run(run, {"status": "running"})
    return run


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_auto_continues_an_interrupted_run_from_its_newest_checkpoint(run_dir: Path) -> None:
    before = tree(run_dir)
    path = run_dir / "checkpoints" / "step-10"
    assert choose_start(run_dir, "auto") == Start(path, [f"resuming from {path}"])
    assert tree(run_dir) == before, "the folder was changed"


@pytest.mark.parametrize("status", [None, "failed", "preempted"])
def test_auto_continues_whatever_is_not_complete(run_dir: Path, status: str | None) -> None:
    if status is None:
        (run_dir / "run.json").unlink()
    else:
        write_run(run_dir, {"status": status})
    assert choose_start(run_dir, "auto").checkpoint == run_dir / "checkpoints" / "step-10"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_damaged_record_does_not_hide_the_checkpoints(run_dir: Path, content: bytes) -> None:
    (run_dir / "run.json").write_bytes(content)
    assert read_run(run_dir) == {}
    assert choose_start(run_dir, "auto").checkpoint == run_dir / "checkpoints" / "step-10"


def test_auto_starts_anew_where_there_is_nothing(tmp_path: Path) -> None:
    assert choose_start(tmp_path / "none", "auto") == Start(None, [])
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert choose_start(tmp_path / "empty", "auto") == Start(None, [])


def test_auto_passes_over_torn_checkpoints_and_says_why(run_dir: Path) -> None:
    checkpoints = run_dir / "checkpoints"
    cut = make_checkpoint(checkpoints, "step-20", 20)
    (cut / "__0_0.distcp").write_bytes(b"ten")
    bare = make_checkpoint(checkpoints, "step-30", 30, marker=False)
    half = make_checkpoint(checkpoints, "step-40.tmp", 40, marker=False)
    start = choose_start(run_dir, "auto")
    assert start.checkpoint == checkpoints / "step-10"
    assert start.notes == [
        f"skipped: checkpoint {cut} is torn: __0_0.distcp has 3 bytes, but its marker says 7",
        f"skipped: checkpoint {bare} was never committed",
        f"skipped: checkpoint {half} was never committed",
        f"resuming from {checkpoints / 'step-10'}",
    ]


def test_auto_starts_anew_where_all_checkpoints_are_torn(run_dir: Path) -> None:
    for path in (run_dir / "checkpoints").iterdir():
        (path / "COMMITTED").unlink()
    start = choose_start(run_dir, "auto")
    assert start.checkpoint is None
    assert [note.partition(":")[0] for note in start.notes] == ["skipped"] * 2
    assert run_dir.exists()


def test_auto_goes_on_from_the_end_of_a_complete_run(run_dir: Path) -> None:
    """Which leaves nothing to do; only where its checkpoints are gone a new run takes its folder."""
    write_run(run_dir, {"status": "completed"})
    before = tree(run_dir)
    start = choose_start(run_dir, "auto")
    last = run_dir / "checkpoints" / "step-10"
    assert start == Start(last, ["the run in this folder is complete", f"resuming from {last}"])
    assert tree(run_dir) == before, "the run was changed"
    shutil.rmtree(run_dir / "checkpoints")
    start, aside = choose_start(run_dir, "auto"), run_dir.with_name("mine.1")
    told = ["the run in this folder is complete", f"starting over; the older run was moved to {aside}"]
    assert start == Start(None, told, aside)
    assert not run_dir.exists()


def test_never_sets_any_run_aside_under_the_next_free_number(run_dir: Path) -> None:
    for number in (1, 2, 3):
        before = tree(run_dir)
        start = choose_start(run_dir, "never")
        assert start.checkpoint is None
        assert start.notes == [f"starting over; the older run was moved to {run_dir.with_name(f'mine.{number}')}"]
        assert tree(run_dir.with_name(f"mine.{number}")) == before
        run_dir.mkdir()
        write_run(run_dir, {"attempt": number})
    names = sorted(path.name for path in run_dir.parent.iterdir())
    assert names == ["mine", "mine.1", "mine.2", "mine.3"]


def test_never_leaves_a_folder_alone_that_holds_no_run(tmp_path: Path) -> None:
    assert choose_start(tmp_path / "none", "never") == Start(None, [])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    assert choose_start(tmp_path / "notes", "never") == Start(None, [])
    assert (tmp_path / "notes" / "todo.txt").exists()


@pytest.mark.parametrize("status", ["running", "completed"])
def test_a_path_names_a_checkpoint_or_a_run(run_dir: Path, tmp_path: Path, status: str) -> None:
    write_run(run_dir, {"status": status})
    older = run_dir / "checkpoints" / "step-2"
    assert choose_start(tmp_path / "new", str(older)) == Start(older, [f"resuming from {older}"])
    newest = run_dir / "checkpoints" / "step-10"
    assert choose_start(tmp_path / "new", str(run_dir)).checkpoint == newest
    assert choose_start(run_dir, str(older)).checkpoint == older
    assert run_dir.exists(), "naming a checkpoint sets nothing aside"


def test_a_path_that_cannot_be_resumed_is_refused(run_dir: Path, tmp_path: Path) -> None:
    torn = run_dir / "checkpoints" / "step-10"
    (torn / "meta.pt").unlink()
    with pytest.raises(CheckpointError, match=r"is torn: meta\.pt is missing, but its marker says 4"):
        choose_start(run_dir, str(torn))
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        choose_start(run_dir, str(tmp_path / "typo"))
    (tmp_path / "bare" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no committed checkpoint") as caught:
        choose_start(run_dir, str(tmp_path / "bare"))
    assert "--resume never" in caught.value.hint


def test_the_best_and_the_last_checkpoint(run_dir: Path) -> None:
    checkpoints = run_dir / "checkpoints"
    assert best_checkpoint(run_dir, "last") == checkpoints / "step-10"
    assert best_checkpoint(run_dir, "best") == checkpoints / "step-10", "the newest where none was kept as the best"
    write_run(run_dir, {"status": "completed", "best": {"step": 2, "value": 0.5}})
    assert best_checkpoint(run_dir, "best") == checkpoints / "step-2"
    assert best_checkpoint(run_dir, "last") == checkpoints / "step-10"
    assert best_checkpoint(run_dir, str(checkpoints / "step-2")) == checkpoints / "step-2"
    write_run(run_dir, {"status": "completed", "best": None})
    assert best_checkpoint(run_dir, "best") == checkpoints / "step-10"


class Launcher:
    """Stands for processes that the same launcher has started: this one, and others before it."""

    def __init__(self, kind: str, run_dir: Path, patch: pytest.MonkeyPatch) -> None:
        self.kind, self.run_dir = kind, run_dir
        for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
            patch.delenv(name, raising=False)
        if kind == "torchrun":
            patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
            self.mark: dict[str, Any] = {"launch": launch_id()}
        else:
            patch.setenv("SLURM_JOB_ID", "21")
            patch.setenv("SLURM_RESTART_COUNT", "1")
            self.mark = {"slurm_job": "21"}

    def trained(self, *attempts: tuple[int, int | None], status: str = "running") -> None:
        """Write a record of attempts by this launcher, from and to these steps, after one of another's."""
        own = [{"from_step": first, "to_step": last, **self.mark} for first, last in attempts]
        write_run(self.run_dir, {"status": status, "attempts": [{"from_step": 0, "launch": "x@y:1:2"}, *own]})


@pytest.fixture(params=["torchrun", "SLURM"])
def launcher(request: pytest.FixtureRequest, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """What has started this process, and earlier ones."""
    return Launcher(request.param, run_dir, monkeypatch)


def test_a_restart_goes_on_with_what_its_launch_has_saved(launcher: Launcher, run_dir: Path, tmp_path: Path) -> None:
    newest = run_dir / "checkpoints" / "step-10"
    elsewhere = make_checkpoint(tmp_path / "other" / "checkpoints", "step-5", 5)
    launcher.trained((5, None))
    for resume in ("never", str(elsewhere), str(run_dir / "checkpoints" / "step-2")):
        start = find_start(run_dir, resume)
        assert start.checkpoint == newest, f"--resume {resume}"
        assert f"restarted by {launcher.kind}, so --resume {resume} is treated as auto" in start.notes
        assert not run_dir.with_name("mine.1").exists(), "the run was set aside"
    launcher.trained((11, None))
    later = make_checkpoint(tmp_path / "other" / "checkpoints", "step-11", 11)
    assert find_start(run_dir, str(later)).checkpoint == later, "nothing was saved since it was named"
    launcher.trained((5, 9), (9, 9), status="completed")
    for resume in ("auto", "never"):
        assert find_start(run_dir, resume).checkpoint == newest, "a run that this launch has completed was begun anew"
    assert finished_by_this_job(run_dir)


def test_a_start_that_is_no_restart_does_what_it_is_told(launcher: Launcher, run_dir: Path) -> None:
    older = run_dir / "checkpoints" / "step-2"
    launcher.trained()  # by another launcher
    assert find_start(run_dir, str(older)).checkpoint == older
    launcher.trained((5, 5))  # stopped before its first step
    assert find_start(run_dir, str(older)).checkpoint == older
    launcher.trained((5, None))
    note_begun(run_dir)  # as in a script that trains twice
    assert find_start(run_dir, str(older)).checkpoint == older
    launcher.trained((5, 9), status="completed")
    assert not finished_by_this_job(run_dir)
    assert find_start(run_dir, "never").aside == run_dir.with_name("mine.1")


def test_a_run_without_checkpoints_has_neither(tmp_path: Path) -> None:
    for which in ("best", "last"):
        with pytest.raises(CheckpointError, match="holds no committed checkpoint") as caught:
            best_checkpoint(tmp_path, which)
        assert "train first" in caught.value.hint


def test_a_record_is_written_whole_and_readable_by_others(tmp_path: Path) -> None:
    write_run(tmp_path, {"status": "running", "best": {"step": 3}})
    write_run(tmp_path, {"status": "completed"})
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"], "temporary files are left"
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "completed"} == read_run(tmp_path)
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o644
    assert read_run(tmp_path / "none") == {}


def test_a_start_that_came_to_nothing_is_taken_back(run_dir: Path) -> None:
    write_run(run_dir, {"status": "completed"})
    before = tree(run_dir)
    start = choose_start(run_dir, "never")
    assert start.aside is not None
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("x")
    take_back(run_dir, start.aside)
    assert tree(run_dir) == before
    assert not start.aside.exists()
