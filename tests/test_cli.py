"""What the command line makes of errors that nobody foresaw."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest

from disttrain import cli
from disttrain.commands import jobs
from disttrain.run import folder as folder_module


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(folder_module, "_begun", {})


@pytest.mark.parametrize("has_run", [False, True])
def test_an_error_of_our_own_is_two_lines_and_a_file(
    has_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" if has_run else tmp_path
    if has_run:
        folder.mkdir()
        for begun in (folder, tmp_path / "z", folder):  # the one begun last counts
            folder_module.note_begun(begun)
    library: dict[str, Any] = {"__name__": "yaml"}
    exec(compile("def load(*_, **__): raise TypeError", "/x/disttrain/.venv/yaml.py", "exec"), library)
    monkeypatch.setattr(jobs, "find_runs", library["load"])
    assert cli.main(["jobs", "."]) == 1
    text = capsys.readouterr().err
    assert re.match(r"disttrain: error: unexpected TypeError at jobs\.py:\d+ in main: .*\n  hint: .*\n$", text)
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


def test_a_broken_pipe_is_the_outputs_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def users(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "a process of the user's has died")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "find_runs", users)
        with pytest.raises(BrokenPipeError, match="a process of the user's"):
            cli.main(["jobs", "."])
    silenced: list[object] = []
    monkeypatch.setattr(cli, "silence", silenced.append)

    def print_table(*_: object, **__: object) -> None:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904 - as rich does

    monkeypatch.setattr(jobs, "find_runs", print_table)
    assert cli.main(["jobs", "."]) == 0
    assert silenced


def test_a_mistake_is_printed_once_on_each_node(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for rank in range(4):
        names = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        assert cli.main(["fitt"]) == 2
        told.append(capsys.readouterr().err.partition(":")[2].partition(":")[0].strip())
    assert told == ["error (rank 0 of 4)", "", "error (rank 2 of 4)", ""]


def test_a_path_that_the_system_refuses_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path, why in (("a" * 5000, "File name too long"), ("loop/x", "is a link to itself")):
        assert cli.main(["report", path]) == 2
        text = capsys.readouterr().err
        assert text.count("disttrain: error") == 1
        assert why in text
