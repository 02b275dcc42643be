"""Data that several tests read, packed once a session."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain.commands import shards
from disttrain.distributed.rendezvous import reserve_port

_PROCESSES = ("ranks", "launching", "torchrun", "sameness", "slurm", "slurm_jobs", "preemption", "memory", "kills")
"""Modules of ``tests.support`` that start processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests whose file uses one of these modules; ``make test-fast`` leaves them out."""
    starts = tuple(f"tests.support.{name}" for name in _PROCESSES)
    for item in items:
        values = vars(getattr(item, "module", item)).values()
        modules = {getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in values}
        if any(str(module).startswith(starts) for module in modules):
            item.add_marker("ranks")


def pytest_collection_finish() -> None:
    """Have garbage collections, of which each fit makes some, pass over what is imported by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as shards: train (4), val and test."""
    folder = tmp_path_factory.mktemp("digits")
    assert shards.main(["pack", "sklearn:digits", str(folder), "--shards", "4"]) == 0
    return folder


@pytest.fixture(scope="session")
def diabetes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's diabetes as shards: train, val and test."""
    folder = tmp_path_factory.mktemp("diabetes")
    assert shards.main(["pack", "sklearn:diabetes", str(folder), "--shards", "2"]) == 0
    return folder


@pytest.fixture
def port() -> Iterator[int]:
    """A port that no other program takes while the test runs."""
    with reserve_port() as number:
        yield number
