"""What leaves a folder of checkpoints when something is saved, and when a run goes on from an earlier one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from disttrain.checkpoint.cleanup import leave_behind, prune
from disttrain.checkpoint.format.fence import FencedError, claim
from disttrain.checkpoint.format.marker import abandoned, committed, remove
from disttrain.checkpoint.format.retention import Keep
from disttrain.checkpoint.remote.copies import Mirror, MirrorConfig, begin
from disttrain.errors import CheckpointError
from disttrain.run.folder import choose_start
from tests.support.checkpoints import make_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 4, 8 and 12."""
    for step in (4, 8, 12):
        make_checkpoint(tmp_path / "checkpoints", f"step-{step:08d}", step)
    return tmp_path / "checkpoints"


def counting(folder: Path) -> list[str]:
    return [entry.path.name for entry in committed(folder)[0]]


def aside(folder: Path) -> list[str]:
    return [entry.path.name for entry in abandoned(folder)]


def test_what_is_later_than_a_start_no_longer_counts(folder: Path) -> None:
    attempt = claim(folder)
    told = leave_behind(folder, 8, start=folder / "step-00000008", attempt=attempt)
    assert told == "the run continues from step 8; later checkpoints were abandoned: renamed to step-00000012.abandoned"
    assert counting(folder) == ["step-00000004", "step-00000008"]
    assert (folder / "LATEST").read_text() == "step-00000008\n"
    assert leave_behind(folder, 8, start=folder / "step-00000008", attempt=attempt) == "", "there is nothing left"

    new = make_checkpoint(folder, "step-00000009", 9)
    prune(folder, Keep(1, ["step-00000008"]), attempt, new=new, step=9)
    assert counting(folder) == ["step-00000008", "step-00000009"]
    assert aside(folder) == ["step-00000012.abandoned"], "it may still be wanted"
    new = make_checkpoint(folder, "step-00000012", 12)
    prune(folder, Keep(1), attempt, new=new, step=12)
    assert counting(folder) == ["step-00000012"]
    assert aside(folder) == [], "the run has come as far by itself"


def test_what_was_committed_now_is_never_pruned(folder: Path) -> None:
    new = make_checkpoint(folder, "step-00000009", 9)
    prune(folder, Keep(1), None, new=new, step=9)
    assert counting(folder) == ["step-00000009", "step-00000012"]


def test_a_start_elsewhere_and_a_faulty_checkpoint_of_the_same_step(folder: Path, tmp_path: Path) -> None:
    elsewhere = make_checkpoint(tmp_path / "other", "step-00000008", 8)
    assert "step-00000008.abandoned, step-00000012.abandoned" in leave_behind(folder, 8, start=elsewhere)
    assert counting(folder) == ["step-00000004"]
    make_checkpoint(folder, "step-00000004.2", 4)
    leave_behind(folder, 4, start=folder / "step-00000004.2", faulty=[folder / "step-00000004"])
    assert counting(folder) == ["step-00000004.2"]


def test_what_was_set_aside_can_be_gone_on_from(folder: Path) -> None:
    """By its old name alone: under the other one it would not be found by the next start."""
    leave_behind(folder, 8, start=folder / "step-00000008")
    with pytest.raises(CheckpointError, match="was abandoned") as caught:
        choose_start(folder.parent, str(folder / "step-00000012.abandoned"))
    assert "rename it to step-00000012, then" in caught.value.hint
    (folder / "step-00000012.abandoned").rename(folder / "step-00000012")
    assert choose_start(folder.parent, "auto").checkpoint == folder / "step-00000012"


def test_a_start_from_nothing_leaves_all(folder: Path) -> None:
    leave_behind(folder, 0)
    assert counting(folder) == []
    assert not (folder / "LATEST").exists()


def test_later_copies_go_and_only_the_newest_attempt_may_do_that(folder: Path, tmp_path: Path) -> None:
    mirror = Mirror(MirrorConfig(f"file://{tmp_path}/copies"))
    attempt, _ = begin(folder, mirror)
    for name in ("step-00000008", "step-00000012"):
        for file in (folder / name).iterdir():
            copy = tmp_path / "copies" / f"{name}.a1-0a" / file.name
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    told = leave_behind(folder, 8, start=folder / "step-00000008", attempt=attempt, mirror=mirror)
    assert "deleted the copies step-00000012.a1-0a" in told
    assert [one.name for one in mirror.committed()[0]] == ["step-00000008.a1-0a"]
    claim(folder)
    with pytest.raises(FencedError):
        leave_behind(folder, 4, start=folder / "step-00000004", attempt=attempt)
    assert counting(folder) == ["step-00000004", "step-00000008"]


def test_a_look_while_checkpoints_come_and_go(tmp_path: Path) -> None:
    folder, ended = tmp_path / "checkpoints", threading.Event()
    folder.mkdir()
    errors: list[BaseException] = []

    def look() -> None:
        while not ended.is_set():
            try:
                committed(folder)
            except BaseException as error:
                errors.append(error)

    looking = [threading.Thread(target=look) for _ in range(2)]
    for thread in looking:
        thread.start()
    for step in range(100):  # nine at a time: there is much to look at
        make_checkpoint(folder, f"step-{step:08d}", step)
        remove(folder / f"step-{step - 9:08d}")
    ended.set()
    for thread in looking:
        thread.join()
    assert not errors, f"{len(errors)} looks failed, the first with {errors[0]!r}"


def test_a_folder_that_may_not_be_read_is_one_error(folder: Path) -> None:
    """As another user than root, whom nothing is forbidden."""
    program = "import sys; from pathlib import Path; from disttrain.checkpoint.format.marker import committed\n"
    program += "sys.path.clear()\ntry: committed(Path(sys.argv[1]))\nexcept Exception as error: print(repr(error))"
    folder.chmod(0o000)
    try:
        if os.getuid() == 0:
            child = f"import os, sys; from disttrain.checkpoint.format import marker; os.setuid(65534)\n{program}"
            done = subprocess.run([sys.executable, "-c", child, str(folder)], capture_output=True, text=True)
            assert "CheckpointError" in done.stdout, done.stdout + done.stderr
            assert "cannot be read: Permission denied" in done.stdout, done.stdout
        else:
            with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
                committed(folder)
    finally:
        folder.chmod(0o755)
