"""Data that several tests read, packed once a session."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain.commands import shards
from disttrain.meeting import reserve_port


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
