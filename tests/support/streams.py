"""What a run gets from shards that lie somewhere: the batches of an epoch, to compare with those from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disttrain.data.cache.shard_cache import CacheConfig
from disttrain.data.decode.fields import Field
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.loader.loaders import LoaderConfig, TrainLoader
from disttrain.data.order.sample_order import Order, OrderConfig
from disttrain.data.reader.sample_reader import Reader
from disttrain.data.remote.ranges import RetryConfig
from disttrain.parallel.config import BatchPlan

QUICK = RetryConfig(attempts=8, base_seconds=0.0, timeout_seconds=30)
GIB = 2**30


def names(where: str | Path) -> str:
    """The shards of a place as a pattern."""
    return f"{where}/train-{{000..003}}.tar"


def stream(spec: str | Sequence[str], cache: Path) -> list[tuple[list[str], list[Any]]]:
    """Keys and values of an epoch's batches, by a cache that holds three shards."""
    index = ShardIndex.open(spec, write_sidecars=False)
    most = 3.2 * max(shard.size_bytes for shard in index.shards)
    config = CacheConfig(str(cache), most / GIB, prefetch_threads=1, retry=QUICK)
    reader = Reader(index, {"x": Field("x.npy")}, cache=config)
    order = Order(index.sizes, OrderConfig(5, seed=1, lanes=1, window=8))
    loader = TrainLoader(reader, order, BatchPlan(5, 5, 1), config=LoaderConfig(threads=2))
    found = [(batch["__key__"], batch["x"].tolist()) for batch in loader]
    reader.store.finish()
    return found


def assert_same(folder: Path, url: str, cache: Path) -> None:
    """A run from a server gets the batches of a run from the folder."""
    streamed = stream(names(url), cache)
    assert len(streamed) == 9
    assert streamed == stream(names(folder), cache)
