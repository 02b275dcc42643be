"""A SLURM for all tests of this folder, and the run that theirs are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ranks import run_cli
from tests.support.slurm import Cluster
from tests.support.slurm_jobs import settings


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    one = Cluster(nodes=4)
    try:
        one.start()
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="session")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 local ranks that nothing stops; its sums do not depend on their number."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    words = [f"--{name}={value}" for name, value in settings(run_dir, digits).items()]
    run_cli(4, ["fit", "--config", "recipes/digits.yaml", *words], folder=run_dir.parent / "logs").ok()
    return run_dir
