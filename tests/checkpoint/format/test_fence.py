"""Attempts are fenced: whatever an older one was about to do when a newer one began, it will not publish anything."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disttrain.checkpoint.format import writer as write_module
from disttrain.checkpoint.format.fence import Attempt, FencedError, claim, guard, run_of
from disttrain.checkpoint.format.marker import About, committed, write_marker
from disttrain.checkpoint.format.writer import Job, pack_meta, write
from disttrain.errors import CheckpointError
from disttrain.run.folder import find_start, write_run
from disttrain.system.files import open_directory
from tests.checkpoint.make_format import META, tensors
from tests.support.checkpoints import make_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def job(directory: Path, attempt: Attempt, step: int = 9) -> Job:
    final = directory / f"step-{step:08d}"
    return Job(final, tensors(), pack_meta(META), About(step, run=attempt.run, attempt=attempt.number), attempt)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_attempts_count_and_share_the_run(tmp_path: Path) -> None:
    first, second, third = claim(tmp_path), claim(tmp_path), claim(tmp_path)
    assert [a.number for a in (first, second, third)] == [1, 2, 3]
    assert len({a.token for a in (first, second, third)}) == 3
    assert {a.run for a in (first, second, third)} == {run_of(tmp_path)}
    guard(tmp_path, third)
    for older in (first, second):
        with pytest.raises(FencedError, match=rf"is attempt {older.number} of the run .* but attempt 3 \(host"):
            guard(tmp_path, older)


def test_a_folder_that_was_moved_away_is_a_fence(tmp_path: Path) -> None:
    attempt = claim(tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FencedError, match="ATTEMPT is gone"):
        guard(tmp_path / "a", attempt)
    with pytest.raises(FencedError):
        job(tmp_path / "a", attempt).run()
    assert not (tmp_path / "a").exists(), "a process of the old run has made the folder anew"


PLACES = {
    "before it writes": (write_module, "_check_space"),
    "while it writes": (write_module, "dcp_save"),
    "before the rename": (os, "rename"),
    "before the marker": (write_module, "write_marker"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_stale_process_publishes_nothing(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer attempt begins, and commits the same step, right between the older one's look and its step."""
    directory = tmp_path / "checkpoints"
    stale = claim(directory)
    job(directory, stale, 3).run()
    owner, name = PLACES[place]
    known: Callable[..., Any] = getattr(owner, name)
    seen: list[Any] = []

    def overtaken(*arguments: Any, **more: Any) -> Any:
        if name == "rename" and Path(arguments[1]).name != "step-00000009":
            return known(*arguments, **more)
        monkeypatch.setattr(owner, name, known)
        newer = claim(directory)
        job(directory, newer).run()
        seen.extend((newer, tree(directory)))
        return known(*arguments, **more)

    monkeypatch.setattr(owner, name, overtaken)
    with pytest.raises(FencedError, match="it will not publish anything"):
        job(directory, stale).run()
    newer, before = seen
    assert tree(directory) == before, "the newer attempt's files were changed"
    found, passed_over = committed(directory)
    assert [(c.path.name, c.about.attempt) for c in found] == [("step-00000003", 1), ("step-00000009", 2)]
    assert passed_over == []
    guard(directory, newer)


@pytest.mark.parametrize("name", ["open", "replace"])
def test_a_stale_process_does_not_turn_latest_back(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overtaken before or after it has written what is to replace ``LATEST``; its checkpoint is committed by then."""
    directory = tmp_path / "checkpoints"
    stale = claim(directory)
    known: Callable[..., Any] = getattr(os, name)

    def overtaken(*arguments: Any, **more: Any) -> Any:
        if "LATEST" not in str(arguments[0]):
            return known(*arguments, **more)
        monkeypatch.setattr(os, name, known)
        job(directory, claim(directory), 12).run()
        return known(*arguments, **more)

    monkeypatch.setattr(os, name, overtaken)
    with pytest.raises(FencedError, match="it will not publish anything"):
        job(directory, stale).run()
    assert (directory / "LATEST").read_text() == "step-00000012\n"
    assert [c.path.name for c in committed(directory)[0]] == ["step-00000009", "step-00000012"]
    assert {path.name for path in directory.iterdir()} == {"ATTEMPT", "LATEST", "step-00000009", "step-00000012"}


def test_a_new_attempt_clears_what_older_ones_left_unfinished_and_nothing_else(tmp_path: Path) -> None:
    done = make_checkpoint(tmp_path, "step-00000001", 1)
    for name in ("step-00000002", "step-00000002.2", "step-00000003.a1-ff.tmp", "mine.tmp", ".gone-a1-ff-0", "notes"):
        make_checkpoint(tmp_path, name, 0, marker=False)
    claim(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ATTEMPT", "notes", done.name]


def test_the_fence_survives_a_damaged_file(tmp_path: Path) -> None:
    attempt = claim(tmp_path)
    for content in (b"", b"{", b"[]", b"\xff"):
        (tmp_path / "ATTEMPT").write_bytes(content)
        with pytest.raises(FencedError):
            guard(tmp_path, attempt)
        assert claim(tmp_path).number == 1


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in its place")
    with pytest.raises(CheckpointError, match=r"the checkpoint folder .* cannot be written"):
        claim(tmp_path / "checkpoints")


def own_run(folder: Path, name: str) -> tuple[Path, Attempt]:
    """An interrupted run with a checkpoint of step 3."""
    directory = folder / name / "checkpoints"
    attempt = claim(directory)
    job(directory, attempt, 3).run()
    write_run(folder / name, {"status": "running", "id": attempt.run})
    return folder / name, attempt


def test_auto_begins_an_attempt_before_it_looks(tmp_path: Path) -> None:
    run_dir, older = own_run(tmp_path, "run")
    half = make_checkpoint(run_dir / "checkpoints", f"step-00000009.{older.label}.tmp", 9, marker=False)
    start = find_start(run_dir, "auto")
    assert start.checkpoint == run_dir / "checkpoints" / "step-00000003"
    assert start.notes == [
        f"skipped: checkpoint {half} was never committed",
        f"resuming from {run_dir / 'checkpoints' / 'step-00000003'}",
    ], "what was cleared away is not told"
    assert not half.exists()
    assert start.attempt is not None
    assert (start.attempt.run, start.attempt.number) == (older.run, 2)
    with pytest.raises(FencedError):
        guard(run_dir / "checkpoints", older)


def test_another_runs_checkpoint_is_not_restored_unasked(tmp_path: Path) -> None:
    run_dir, ours = own_run(tmp_path, "ours")
    other_dir, other = own_run(tmp_path, "other")
    moved = run_dir / "checkpoints" / "step-00000008"
    os.rename(other_dir / "checkpoints" / "step-00000003", moved)
    about = About(8, run=other.run)
    with open_directory(moved) as opened:
        write_marker(opened, about, {})
    with pytest.raises(CheckpointError) as caught:
        find_start(run_dir, "auto")
    for word in (str(moved), f"made by run {other.run}", f"belongs to run {ours.run}", f"--resume {moved}"):
        assert word in str(caught.value), f"the message does not say {word!r}"
    assert find_start(run_dir, str(moved)).checkpoint == moved, "what is named is taken"


def test_checkpoints_under_another_runs_record_are_not_restored_unasked(tmp_path: Path) -> None:
    run_dir, ours = own_run(tmp_path, "ours")
    write_run(run_dir, {"status": "running", "id": "else"})
    with pytest.raises(CheckpointError, match=f"the record of run else, but the checkpoints beside it .* {ours.run}"):
        find_start(run_dir, "auto")


def test_a_bare_checkpoint_in_an_empty_folder_is_not_restored_unasked(tmp_path: Path) -> None:
    source, _ = own_run(tmp_path, "source")
    bare = tmp_path / "bare" / "checkpoints"
    bare.mkdir(parents=True)
    os.rename(source / "checkpoints" / "step-00000003", bare / "step-00000003")
    with pytest.raises(CheckpointError, match="an unknown run"):
        find_start(bare.parent, "auto")


def test_a_checkpoint_without_a_run_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "run" / "checkpoints", "step-00000003", tensors=tensors(), meta=META, global_step=3)
    assert find_start(tmp_path / "run", "auto").checkpoint == path
    assert json.loads((path.parent / "ATTEMPT").read_text())["number"] == 1
