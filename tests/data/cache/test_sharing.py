"""Threads and processes that share a cache: each shard is fetched once, and nobody waits for a reader or a dead one."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from disttrain.data.cache.shard_cache import ShardCache
from disttrain.data.decode.fields import Field
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.reader.sample_reader import Reader
from tests.support.caches import config_of, kept_in, shards_of, take
from tests.support.ranks import run_ranks
from tests.support.servers import RangeServer

pytestmark = pytest.mark.usefixtures("cache_home")


def test_a_reader_does_not_hold_up_those_that_waited_for_the_same_fetch(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shards_of(server)[0]
    cache = ShardCache(config_of(8, shard, tmp_path / "c"))
    fetching, waiting = Event(), Event()
    flock = fcntl.flock

    def noted(fd: Any, how: int) -> None:
        if how == fcntl.LOCK_SH:
            waiting.set()
        flock(fd, how)

    def hold(name: str, range_: str) -> None:
        fetching.set()
        assert waiting.wait(60)

    server.requests.clear()
    server.on_request = hold
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.open, shard)
        assert fetching.wait(60)
        monkeypatch.setattr(fcntl, "flock", noted)
        second = pool.submit(cache.open, shard)
        fds = [first.result(60), second.result(60)]  # the first stays open meanwhile
    for fd in fds:
        os.close(fd)
    assert len(server.requests) == 2, "its size and its bytes"


def test_a_waiter_goes_on_where_the_fetch_failed(server: RangeServer, tmp_path: Path) -> None:
    shard = shards_of(server)[0]
    cache = ShardCache(config_of(8, shard, tmp_path / "c"))
    server.fail("train-000.tar", *["status:500"] * 3)
    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(cache.open, shard) for _ in range(4)]
    failed = [reader for reader in readers if reader.exception() is not None]
    assert len(failed) == 1, "one met all the faults"
    for reader in set(readers) - set(failed):
        os.close(reader.result())


CHILD = """
import sys
from disttrain.data.cache import shard_cache as cache
from disttrain.data.index.shard_index import Shard
cache._CHUNK_BYTES = 1000
url, size, version, directory = sys.argv[1:]
cache.ShardCache(cache.CacheConfig(directory)).open(Shard(url, 10, int(size), version=version))
"""


def test_killed_in_the_middle_of_a_download(server: RangeServer, tmp_path: Path) -> None:
    shards = shards_of(server)
    reached = Event()
    server.on_request = lambda name, range_: reached.set() if range_.startswith("bytes=5000-") else None
    server.fail("train-000.tar", *[""] * 6, "stall")  # after its size and five pieces
    arguments = [shards[0].path, str(shards[0].size_bytes), shards[0].version, str(tmp_path / "c")]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments])
    assert reached.wait(60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    [left] = kept_in(tmp_path / "c").glob("*.part")
    assert left.stat().st_size == shards[0].size_bytes
    assert not list(kept_in(tmp_path / "c").glob("*.tar"))

    cache = ShardCache(config_of(1, shards[0], tmp_path / "c"))
    take(cache, shards[1], server)
    assert not left.exists(), "what the dead one left takes room"
    take(cache, shards[0], server)


def bytes_in(directory: Path) -> int:
    """What a cache takes, while others evict from it."""
    used = 0
    for path in directory.iterdir():
        with suppress(FileNotFoundError):
            used += path.stat().st_size if path.suffix in (".tar", ".part") else 0
    return used


def read_all(url: str, home: str, directory: str, num_shards: float) -> None:
    """Read all samples of eight shards in an order of one's own, through a shared cache; check every one."""
    os.environ["DISTTRAIN_CACHE"] = home  # the server that ranks are forked from has an older environment
    index = ShardIndex.open(f"{url}/train-{{000..007}}.tar")
    rank = int(os.environ["RANK"])
    config = config_of(num_shards, index.shards[0], Path(directory))
    reader = Reader(index, {"x": Field("x.npy")}, cache=config)
    ids = list(range(80))
    random.Random(rank).shuffle(ids)
    for first in range(0, 80, 5):
        some = np.array(ids[first : first + 5])
        assert reader.read(some)["x"][:, 0].tolist() == some.tolist()
        used = bytes_in(kept_in(Path(directory)))
        assert used <= config.max_bytes, f"{used} of {config.max_bytes} bytes"


def test_four_processes_fetch_each_shard_once(server: RangeServer, tmp_path: Path, cache_home: Path) -> None:
    sizes = {shard.path.rpartition("/")[2]: shard.size_bytes for shard in shards_of(server)}
    server.bytes_served.clear()
    run_ranks(4, read_all, server.url, str(cache_home), str(tmp_path / "c"), 8, folder=tmp_path / "logs").ok()
    fetched = {name: served - 5 for name, served in server.bytes_served.items()}  # each process asks for its size
    assert fetched == sizes


def test_four_processes_share_a_cache_smaller_than_all(server: RangeServer, tmp_path: Path, cache_home: Path) -> None:
    shards = shards_of(server)
    directory = tmp_path / "c"
    cache = ShardCache(config_of(3, shards[0], directory))
    fd = cache.open(shards[5])
    whole = [range_ for name, range_ in server.requests if name == "train-005.tar"]
    run_ranks(4, read_all, server.url, str(cache_home), str(directory), 3, folder=tmp_path / "logs").ok()
    again = [range_ for name, range_ in server.requests if name == "train-005.tar"][len(whole) :]
    assert again == ["bytes=0-0"] * 4, "a shard that is held was fetched again"
    os.close(fd)
