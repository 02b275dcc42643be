"""What the command line makes of errors that nobody foresaw."""

from __future__ import annotations

import operator
import re
from pathlib import Path

import pytest

from disttrain import cli, runs
from disttrain.commands import jobs


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(runs, "_begun", set())


@pytest.mark.parametrize("has_run", [False, True])
def test_an_error_of_our_own_is_two_lines_and_a_file(
    has_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" if has_run else tmp_path
    if has_run:
        folder.mkdir()
        runs.note_begun(folder)
    monkeypatch.setattr(jobs, "find_runs", operator.index)
    assert cli.main(["jobs", "."]) == 1
    text = capsys.readouterr().err
    assert re.match(r"disttrain: error: unexpected TypeError at jobs\.py:\d+ in main: .*\n  mend: .*\n$", text)
    (file,) = folder.glob("traceback-*.txt")
    assert str(file) in text
    assert "Traceback (most recent call last)" in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_an_error_in_users_code_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def users(*_: object, **__: object) -> None:
        raise TypeError("a bug of the user's")

    monkeypatch.setattr(jobs, "find_runs", users)
    with pytest.raises(TypeError, match="a bug of the user's"):
        cli.main(["jobs", "."])


def test_a_path_that_the_system_refuses_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path, why in (("a" * 5000, "File name too long"), ("loop/x", "is a link to itself")):
        assert cli.main(["report", path]) == 2
        text = capsys.readouterr().err
        assert text.count("disttrain: error") == 1
        assert why in text
