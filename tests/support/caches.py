"""Caches for a few of a server's shards, and reading through them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from disttrain.data.cache.shard_cache import CacheConfig, ShardCache
from disttrain.data.index.shard_index import Shard, describe_shard
from disttrain.data.remote.ranges import RetryConfig
from tests.support.servers import RangeServer

QUICK = RetryConfig(attempts=3, base_seconds=0.0)
GIB = 2**30


def shards_of(server: RangeServer) -> list[Shard]:
    """The eight shards that the fixture ``server`` has."""
    return [describe_shard(f"{server.url}/train-{number:03d}.tar") for number in range(8)]


def config_of(num_shards: float, shard: Shard, directory: Path, **more: Any) -> CacheConfig:
    """A cache for so many shards."""
    options: dict[str, Any] = {"retry": QUICK, "prefetch_threads": 0, **more}
    return CacheConfig(str(directory), num_shards * shard.size_bytes / GIB, **options)


def kept_in(directory: Path) -> Path:
    """The folder of a cache in a directory."""
    return CacheConfig(str(directory)).path


def take(cache: ShardCache, shard: Shard, server: RangeServer) -> None:
    """Read a shard through the cache, and let it go."""
    fd = cache.open(shard)
    assert os.pread(fd, 2**20, 0) == (server.folder / Path(shard.path).name).read_bytes()
    os.close(fd)
