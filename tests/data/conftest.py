"""What tests of remote shards stand on: a cache of their own, no waits, and shards that are served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain.data.remote import requests
from disttrain.data.remote.ranges import RetryConfig
from tests.support.servers import RangeServer, range_server
from tests.support.shards import write_numbered


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test keeps what it fetches for itself."""
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def without_waits(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has connections of its own, and waits for nothing between attempts."""
    monkeypatch.setattr(RetryConfig, "wait_seconds", lambda self, failed, chance: 0.0)
    monkeypatch.setattr(requests, "_FILESYSTEMS", {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of 45 samples in all."""
    path = tmp_path / "served"
    path.mkdir()
    write_numbered(path, [12, 9, 14, 10])
    return path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    """Eight shards of 10 samples, all of one size."""
    folder = tmp_path / "served"
    folder.mkdir()
    write_numbered(folder, [10] * 8)
    with range_server(folder) as running:
        yield running
