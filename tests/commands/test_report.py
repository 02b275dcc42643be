"""``disttrain report`` as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from disttrain.commands.report import main
from disttrain.errors import ConfigError, DataError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"format": 1, "name": "small"}')
    (folder / "metrics.csv").write_text("step,epoch,time,train/loss\n1,0,1.0,0.5\n2,0,2.0,0.25\n")
    return folder


def test_it_prints_the_path_of_the_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report' / 'report.html'}\n"
    assert (run / "report" / "loss.png").is_file(), "the picture is not beside the page"


def test_out_names_the_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}\n"
    assert not (run / "report").exists(), "something was written to the run folder"


def test_mistakes_are_raised_for_the_command_line_to_print(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        main([str(tmp_path / "absent")])
    with pytest.raises(ConfigError, match="2 runs"):
        main([str(run), str(tmp_path / "other")])


def test_wrong_arguments_end_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "usage: disttrain report" in capsys.readouterr().err


def test_it_loads_neither_torch_nor_lightning(run: Path) -> None:
    code = (
        "import sys; from disttrain.commands.report import main; assert main(sys.argv[1:]) == 0;"
        "print(sorted({'torch', 'lightning', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"it failed:\n{done.stderr}"
    assert done.stdout.splitlines()[-1] == "[]", f"loaded: {done.stdout}"
