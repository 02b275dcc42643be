"""The recipes reach what they state, and are ordinary code that research code imports from a wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from disttrain.system.reading import read_run
from tests.support.ranks import run_cli

ROOT = Path(__file__).parent.parent


def fit(recipe: str, data: Path, run_dir: Path, *more: str, ranks: int = 2) -> dict[str, float]:
    """Train a recipe as it stands; gives its test metrics."""
    arguments = [
        *("fit", "--config", f"recipes/{recipe}.yaml", "--trainer.run_dir", str(run_dir)),
        *(f"--data.{split}={data}/{split}.json" for split in ("train", "val", "test")),
        *more,
    ]
    run_cli(ranks, arguments, folder=run_dir.parent / f"{run_dir.name}-logs", timeout=300).ok()
    result: dict[str, float] = read_run(run_dir)["result"]
    return result


@pytest.mark.slow
def test_diabetes_is_better_than_the_mean(diabetes: Path, tmp_path: Path) -> None:
    result = fit("diabetes", diabetes, tmp_path / "run")
    assert result["test/r2"] >= 0.45, f"R2 is {result['test/r2']:.3f}"
    again = fit("diabetes", diabetes, tmp_path / "one", ranks=1)
    assert {k: round(v, 4) for k, v in again.items()} == {k: round(v, 4) for k, v in result.items()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_digits_reaches_its_accuracy(digits: Path, tmp_path: Path, seed: int) -> None:
    result = fit("digits", digits, tmp_path / "run", "--seed_everything", str(seed))
    assert result["test/accuracy"] >= 0.975, f"test accuracy is {result['test/accuracy']:.4f}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked: what `pip install` would put into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_recipes_with_their_settings(wheel: Path) -> None:
    for name in ("digits", "diabetes"):
        for suffix in (".py", ".yaml"):
            assert (wheel / "recipes" / f"{name}{suffix}").is_file(), f"recipes/{name}{suffix} is not in the wheel"
    assert (wheel / "disttrain" / "py.typed").is_file()


@pytest.mark.slow
def test_the_readme_script_trains_under_torchrun_and_resumes(wheel: Path, digits: Path, tmp_path: Path) -> None:
    """The script as printed, from outside the source tree, with the wheel alone."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    scripts = [block for block in blocks if "DigitsTask" in block]
    assert len(scripts) == 1
    (tmp_path / "research.py").write_text(scripts[0])
    shutil.copytree(digits, tmp_path / "data" / "digits")
    environment = {**os.environ, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "research.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_run(tmp_path / "runs" / "wide")
    assert record["status"] == "completed"
    assert record["attempts"][0]["world_size"] == 2
    assert record["best"]["value"] >= 0.95, f"best validation accuracy is {record['best']['value']:.4f}"
