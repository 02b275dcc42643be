"""Statistics of a data set: exact extremes and sums, histograms that lose nothing, and classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from disttrain.data.index.shard_index import Shard, ShardIndex, describe_shard
from disttrain.data.index.sidecar import build_table
from disttrain.data.verify.statistics import Sizes, Statistics, count_values, in_order
from tests.support.servers import RangeServer, range_server
from tests.support.shards import write_numbered, write_shard


@given(st.lists(st.lists(st.integers(0, 2**40), max_size=20), max_size=5), st.integers(1, 20))
def test_histograms_lose_nothing(parts: list[list[int]], max_bins: int) -> None:
    sizes = Sizes()
    for part in parts:
        sizes.add(np.array(part, dtype=np.int64))
    every = sorted(size for part in parts for size in part)
    assert (sizes.count, sizes.total) == (len(every), sum(every))
    bins = sizes.histogram(max_bins)
    assert bool(bins) == bool(every)
    if every:
        assert (sizes.min, sizes.max) == (every[0], every[-1])
        assert len(bins) <= max_bins
        assert (bins[0][0], bins[-1][1]) == (every[0], every[-1])
        assert all(upper + 1 == lower for (_, upper, _), (lower, _, _) in pairwise(bins))
        assert [n for _, _, n in bins] == [sum(low <= size <= high for size in every) for low, high, _ in bins]


def test_the_numbers_of_shards(tmp_path: Path) -> None:
    samples = [{"__key__": "0", "jpg": b"x" * 700, "cls": b"1"}, {"__key__": "1", "png": b"y" * 20, "cls": b"10"}]
    paths = [
        write_shard(tmp_path / "a.tar", samples),
        write_shard(tmp_path / "b.tar", [*samples, samples[1] | {"__key__": "2"}]),
    ]
    numbers = Statistics()
    for path in paths:
        numbers.add(build_table(path), Path(path).stat().st_size)
    assert numbers.per_shard == (2, 3)
    assert (numbers.shards.count, numbers.shards.total) == (2, sum(Path(path).stat().st_size for path in paths))
    assert (numbers.samples.count, numbers.samples.min, numbers.samples.max) == (5, 22, 701)
    told = {name: (s.count, s.min, s.max, s.total, s.mean) for name, s in numbers.fields.items()}
    assert told == {"jpg": (2, 700, 700, 1400, 700.0), "cls": (5, 1, 2, 8, 1.6), "png": (3, 20, 20, 60, 20.0)}


@pytest.fixture
def server(tmp_path: Path, cache_home: Path) -> Iterator[RangeServer]:
    with range_server(tmp_path) as running:
        yield running


def test_classes_are_counted_here_and_there(tmp_path: Path, server: RangeServer) -> None:
    [path] = write_numbered(tmp_path, [103])
    expected = Counter({"0": 26, "1": 26, "2": 26, "3": 25})
    assert count_values(describe_shard(path), build_table(path), "cls") == expected
    shard = describe_shard(f"{server.url}/train-000.tar")
    server.requests.clear()
    assert count_values(shard, ShardIndex([shard]).table(0), "cls") == expected
    assert len(server.requests) <= 3, "a request a value"


def test_values_that_are_far_apart_absent_or_odd(tmp_path: Path) -> None:
    samples = [{"__key__": f"{n}", "bin": bytes(100_000), **({"cls": b"7\n"} if n % 2 else {})} for n in range(6)]
    path = write_shard(tmp_path / "a.tar", [*samples, {"__key__": "odd", "cls": b"\xff" * 100}])
    found = count_values(Shard(path, 7, -1), build_table(path), "cls", max_bytes=3)
    assert found == {"7": 3, "(none)": 3, "\\xff\\xff\\xff": 1}
    assert count_values(Shard(path, 7, -1), build_table(path), "txt") == {"(none)": 7}


def test_the_order_of_classes() -> None:
    assert [name for name, _ in in_order(Counter(["10", "9", "2", "cat", "(none)", "0", "-1"]))] == [
        "0", "2", "9", "10", "-1", "cat", "(none)",
    ]  # fmt: skip
