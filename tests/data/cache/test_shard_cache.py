"""The cache: whole shards only, fetched once for all of a node, never more bytes than allowed, evicted by plan."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from disttrain.data.cache import shard_cache as cache_module
from disttrain.data.cache.cached_shards import ShardStore
from disttrain.data.cache.eviction import Plan
from disttrain.data.cache.shard_cache import CacheConfig, ShardCache, name_of
from disttrain.data.decode.fields import Field
from disttrain.data.index.build import md5_of
from disttrain.data.index.shard_index import Shard, ShardIndex
from disttrain.data.loader.loaders import EvaluationLoader, LoaderConfig, TrainLoader
from disttrain.data.order.sample_order import Needs, Order, OrderConfig
from disttrain.data.reader.sample_reader import Reader
from disttrain.data.remote.ranges import RemoteError
from disttrain.errors import ConfigError, DataError, ShardError
from disttrain.parallel.config import BatchPlan
from tests.support.caches import QUICK, config_of, kept_in, shards_of, take
from tests.support.servers import RangeServer

pytestmark = pytest.mark.usefixtures("cache_home")


def held(cache: ShardCache, shards: list[Shard]) -> list[int]:
    return [number for number, shard in enumerate(shards) if cache.holds(shard)]


def needs_of(*rows: tuple[int, int, int]) -> Needs:
    return Needs(*np.array(rows, dtype=np.int64).T)


def test_a_shard_is_fetched_once_and_kept(server: RangeServer, tmp_path: Path) -> None:
    shards = shards_of(server)
    server.requests.clear()
    cache = ShardCache(config_of(8, shards[0], tmp_path / "c"))
    for _ in range(3):
        take(cache, shards[2], server)
    assert len(server.requests) == 2, "its size and its bytes"
    assert held(cache, shards) == [2]
    assert not list(kept_in(tmp_path / "c").glob("*.part"))


def test_eviction_follows_the_plan(server: RangeServer, tmp_path: Path) -> None:
    shards = shards_of(server)
    cache = ShardCache(config_of(3.5, shards[0], tmp_path / "c"))
    names = [name_of(shard) for shard in shards]
    plan = Plan(kept_in(tmp_path / "c"), names, needs_of((0, 0, 4), (1, 5, 9), (2, 20, 24), (3, 10, 14), (4, 0, 2)), 0)
    for number in (0, 1, 2):
        take(cache, shards[number], server)
    take(cache, shards[3], server)
    assert held(cache, shards) == [0, 1, 3], "the one needed last goes first"
    take(cache, shards[4], server)
    assert held(cache, shards) == [0, 1, 4]
    plan.stand_at(5)
    assert cache.prefetch(shards[3], 5)
    assert held(cache, shards) == [1, 3, 4], "of what nobody needs any more the oldest goes"
    assert cache.prefetch(shards[2], 15), "the other that nobody needs any more makes room"
    assert held(cache, shards) == [1, 2, 3]
    assert not cache.prefetch(shards[5], np.inf), "what is needed no sooner evicts nothing"
    assert held(cache, shards) == [1, 2, 3]
    plan.close()


def test_what_the_next_validation_needs_goes_after_what_nobody_needs(server: RangeServer, tmp_path: Path) -> None:
    shards = shards_of(server)
    config = config_of(4, shards[0], tmp_path / "c")
    training, validation = ShardStore(shards, config), ShardStore(shards, config)
    cache = ShardCache(config)

    def read(store: ShardStore, *numbers: int) -> list[int]:
        for number in numbers:
            fd = store.open(number)
            assert fd is not None
            os.close(fd)
        return held(cache, shards)

    training.follow(needs_of((0, 0, 9), (1, 20, 29), (2, 40, 10**9)), 0)
    assert read(training, 0, 7) == [0, 7]  # nobody needs shard 7
    validation.follow(needs_of((5, 0, 0), (6, 1, 1)), 0)
    assert len(list(kept_in(tmp_path / "c").glob("*.plan"))) == 2, "a validation drops the plan of the training"
    assert read(validation, 5, 6) == [0, 5, 6, 7]
    validation.finish(again=True)
    assert len(list(kept_in(tmp_path / "c").glob("*.plan"))) == 2

    assert read(training, 1) == [0, 1, 5, 6], "what nobody needs goes first"
    assert read(training, 2) in ([0, 1, 2, 5], [0, 1, 2, 6]), "then what the next validation needs"
    fetched = len(server.requests)
    validation.follow(needs_of((5, 0, 0), (6, 1, 1)), 0)
    assert read(validation, 5, 6) == [0, 1, 5, 6], "then what the training needs last"
    assert len(server.requests) == fetched + 2, "of two shards one was still there"
    validation.finish(again=True)
    assert read(training, 2) in ([0, 1, 2, 5], [0, 1, 2, 6])
    validation.finish()
    training.finish()
    assert not list(kept_in(tmp_path / "c").glob("*.plan"))


def test_a_shard_that_is_read_is_never_evicted(server: RangeServer, tmp_path: Path) -> None:
    shards = shards_of(server)
    cache = ShardCache(config_of(2, shards[0], tmp_path / "c"))
    fd = cache.open(shards[0])
    for number in (1, 2, 3, 4):
        take(cache, shards[number], server)
        assert held(cache, shards) == [0, number]
    os.close(fd)

    full = ShardCache(config_of(1, shards[0], tmp_path / "d", retry=replace(QUICK, budget_seconds=0)))
    fd = full.open(shards[0])
    with pytest.raises(DataError, match=r"has had no room for .*/train-001.tar") as error:
        full.open(shards[1])
    assert "data.cache.max_gib" in error.value.hint
    os.close(fd)
    assert held(full, shards) == [0]


def test_room_that_others_make_is_waited_for(server: RangeServer, tmp_path: Path) -> None:
    shards = shards_of(server)
    waits: list[float] = []

    def let_go(seconds: float) -> None:
        waits.append(seconds)
        os.close(fd)

    cache = ShardCache(config_of(1, shards[0], tmp_path / "c"), sleep=let_go)
    fd = cache.open(shards[0])
    take(cache, shards[1], server)
    assert len(waits) == 1


@pytest.mark.parametrize("fault", ["cut", "short", "wrong range", "status:500"])
def test_faults_leave_nothing_behind(server: RangeServer, tmp_path: Path, fault: str) -> None:
    shards = shards_of(server)
    cache = ShardCache(config_of(8, shards[0], tmp_path / "c"))
    server.fail("train-000.tar", *[fault] * 3)
    with pytest.raises(RemoteError, match=r"train-000.tar: .*3 attempts"):
        cache.open(shards[0])
    assert [path.name for path in kept_in(tmp_path / "c").iterdir() if path.suffix != ".TAG"] == ["space.lock"]
    take(cache, shards[0], server)


def test_a_shard_is_what_index_and_manifest_say(server: RangeServer, tmp_path: Path) -> None:
    shard = shards_of(server)[0]
    path = server.folder / "train-000.tar"
    cache = ShardCache(config_of(8, shard, tmp_path / "c"))
    take(cache, replace(shard, md5=md5_of(str(path)), version=""), server)
    with pytest.raises(ShardError, match=r"train-000.tar has MD5 \w+, but its manifest says 00"):
        cache.open(replace(shard, md5="00", version=""))
    with pytest.raises(ShardError, match=f"has {shard.size_bytes} bytes, but the index says 1024"):
        cache.open(replace(shard, size_bytes=1024, version=""))
    with pytest.raises(ShardError, match="and the version differs"):
        cache.open(replace(shard, version="old"))
    assert len([p for p in kept_in(tmp_path / "c").iterdir() if p.suffix in (".tar", ".part")]) == 1


def test_a_damaged_copy_is_fetched_again(server: RangeServer, tmp_path: Path) -> None:
    shard = shards_of(server)[0]
    cache = ShardCache(config_of(8, shard, tmp_path / "c"))
    take(cache, shard, server)
    os.truncate(kept_in(tmp_path / "c") / f"{name_of(shard)}.tar", 100)
    take(cache, shard, server)


def test_a_full_disk_is_named(server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = shards_of(server)[0]
    cache = ShardCache(config_of(8, shard, tmp_path / "c"))

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"is on a full disk; shard .*/train-000.tar of \d+ bytes was not fetched"):
        cache.open(shard)
    assert not list(kept_in(tmp_path / "c").glob("*.part"))


def test_a_copy_that_cannot_be_opened_is_named(server: RangeServer, tmp_path: Path) -> None:
    shard = shards_of(server)[0]
    cache = ShardCache(config_of(8, shard, tmp_path / "c"))
    (kept_in(tmp_path / "c") / f"{name_of(shard)}.tar").symlink_to(f"{name_of(shard)}.tar")
    with pytest.raises(
        DataError,
        match=r"/c/disttrain-shards-\d+ cannot be read or written: Too many levels .*/train-000.tar of \d+ bytes",
    ):
        cache.open(shard)


def test_a_cache_smaller_than_a_shard_is_refused(server: RangeServer, tmp_path: Path) -> None:
    shards = shards_of(server)
    with pytest.raises(ConfigError, match=r"cache.max_gib .* less than shard http://.*/train-000.tar of \d+ bytes"):
        ShardStore(shards, config_of(0.9, shards[0], tmp_path / "c"))
    assert not ShardStore([Shard("here.tar", 1, 10**12)]).has_remote


def test_a_folder_that_cannot_be_made_is_named(server: RangeServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be created or written"):
        ShardCache(CacheConfig(str(tmp_path / "file" / "c")))


@pytest.mark.parametrize(("field", "value"), [("max_gib", 0), ("prefetch_threads", -1)])
def test_settings_that_cannot_work(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"cache.{field} is {value}"):
        CacheConfig(**{field: value})


def batches_of(index: ShardIndex, threads: int, cache: CacheConfig | None, position: tuple[int, int]) -> list[Any]:
    reader = Reader(index, {"x": Field("x.npy")}, cache=cache)
    order = Order(index.sizes, OrderConfig(8, seed=1, lanes=2, window=16))
    loader = TrainLoader(
        reader,
        order,
        BatchPlan(8, 2, 2),
        rank=1,
        config=LoaderConfig(threads=threads),
        position=lambda: position,
    )
    found = [(batch["__key__"], batch["x"].tolist()) for batch in loader]
    reader.store.finish()
    return found


@pytest.mark.parametrize(("threads", "ahead"), [(0, 0), (2, 2)])
def test_the_loaders_read_the_same_from_afar(server: RangeServer, tmp_path: Path, threads: int, ahead: int) -> None:
    local = ShardIndex.open(str(server.folder / "train-{000..007}.tar"))
    there = ShardIndex.open(f"{server.url}/train-{{000..007}}.tar")
    config = config_of(2, there.shards[0], tmp_path / "c", prefetch_threads=ahead)
    for position in ((0, 0), (1, 4)):
        with pytest.warns(UserWarning, match="draws from .* at once, more than data.cache.max_gib"):
            streamed = batches_of(there, threads, config, position)
        assert streamed == batches_of(local, threads, None, position)

    def evaluated(index: ShardIndex) -> list[list[str]]:
        reader = Reader(index, {"x": Field("x.npy")}, cache=config)
        loaders = [EvaluationLoader(reader, micro_batch_size=7, num_ranks=3, rank=rank) for rank in range(3)]
        keys = [batch["__key__"] for loader in loaders for batch in loader]
        reader.store.finish()
        return keys

    assert evaluated(there) == evaluated(local)
    assert not list(kept_in(tmp_path / "c").glob("*.plan"))


def test_shards_are_fetched_ahead_in_the_order_of_the_plan(server: RangeServer, tmp_path: Path) -> None:
    shards = shards_of(server)
    server.requests.clear()
    fetched: list[str] = []
    all_asked, more_asked = Event(), Event()

    def note(name: str, range_: str) -> None:
        if range_ != "bytes=0-0":
            fetched.append(name)
            (all_asked if len(fetched) == 3 else more_asked if len(fetched) == 4 else Event()).set()

    server.on_request = note
    store = ShardStore(shards, config_of(3, shards[0], tmp_path / "c", prefetch_threads=1))
    store.follow(needs_of((4, 8, 9), (1, 4, 7), (6, 0, 3), (2, 10, 19)), 0)
    assert all_asked.wait(60)
    assert fetched == ["train-006.tar", "train-001.tar", "train-004.tar"]
    assert not more_asked.is_set(), "there was no room"
    for _ in range(cache_reads()):
        store.begin(5)
    assert more_asked.wait(60)
    assert fetched[3] == "train-002.tar"
    store.finish()


def cache_reads() -> int:
    """Reads after which a step counts as done."""
    from disttrain.data.cache import cached_shards

    return cached_shards._READS_AT_ONCE


def test_pieces_add_up(server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = shards_of(server)[0]
    monkeypatch.setattr(cache_module, "_CHUNK_BYTES", 1000)
    take(ShardCache(config_of(8, shard, tmp_path / "c")), shard, server)


def test_tars_that_the_cache_did_not_write_stay(server: RangeServer, tmp_path: Path) -> None:
    shards = shards_of(server)
    mine = tmp_path / "mine"
    mine.mkdir()
    tars = [mine / "own.tar", mine / f"{'0' * 32}.tar", mine / f"{name_of(shards[0])}.part"]
    for path in tars:
        path.write_bytes(bytes(shards[0].size_bytes))
    cache = ShardCache(config_of(1, shards[0], mine))
    for shard in shards:
        take(cache, shard, server)
    assert held(cache, shards) == [7]
    assert {path.stat().st_size for path in tars} == {shards[0].size_bytes}
    assert kept_in(mine).stat().st_mode & 0o777 == 0o700


def test_files_of_others_in_the_cache_are_refused(server: RangeServer, tmp_path: Path) -> None:
    config = config_of(1, shards_of(server)[0], tmp_path / "c")
    kept_in(tmp_path / "c").mkdir(parents=True, mode=0o700)
    (kept_in(tmp_path / "c") / ".nfs00000000a3f1").touch()  # removed on NFS while it was open
    ShardCache(config)
    (kept_in(tmp_path / "c") / "train-000.tar").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"holds 'train-000.tar', which the cache did not create") as error:
        ShardCache(config)
    assert "data.cache.directory" in error.value.hint
    assert (kept_in(tmp_path / "c") / "train-000.tar").read_bytes() == b"mine"


def test_a_folder_that_others_may_write_to_is_refused(server: RangeServer, tmp_path: Path) -> None:
    config = config_of(1, shards_of(server)[0], tmp_path / "c")
    kept_in(tmp_path / "c").mkdir(parents=True)
    kept_in(tmp_path / "c").chmod(0o777)
    with pytest.raises(DataError, match="other users can write to it"):
        ShardCache(config)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(server: RangeServer, tmp_path: Path) -> None:
    config = config_of(1, shards_of(server)[0], tmp_path / "c")
    kept_in(tmp_path / "c").mkdir(parents=True, mode=0o700)
    os.chown(kept_in(tmp_path / "c"), 12345, 12345)
    with pytest.raises(DataError, match="belongs to another user"):
        ShardCache(config)


def test_a_link_where_a_download_goes_is_not_followed(server: RangeServer, tmp_path: Path) -> None:
    shard = shards_of(server)[0]
    cache = ShardCache(config_of(8, shard, tmp_path / "c"))
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (kept_in(tmp_path / "c") / f"{name_of(shard)}.part").symlink_to(victim)
    with pytest.raises(DataError, match="cannot be read or written: Too many levels"):
        cache.open(shard)
    assert victim.read_text() == "precious"


def test_a_copy_that_was_changed_is_fetched_again(server: RangeServer, tmp_path: Path) -> None:
    shard = shards_of(server)[0]
    cache = ShardCache(config_of(8, shard, tmp_path / "c"))
    take(cache, shard, server)
    with open(kept_in(tmp_path / "c") / f"{name_of(shard)}.tar", "r+b") as file:
        file.seek(600)
        file.write(b"changed")
    fetched = server.bytes_served["train-000.tar"]
    take(cache, shard, server)
    take(cache, shard, server)
    assert server.bytes_served["train-000.tar"] == fetched + 1 + shard.size_bytes, "its size and its bytes, once"


@pytest.mark.parametrize("kind", ["sha-256", "google", "s3", "s3 with a key", "damaged", "none"])
def test_the_checksum_of_the_server_is_compared(server: RangeServer, tmp_path: Path, kind: str) -> None:
    shard = replace(shards_of(server)[0], version="")
    content = (server.folder / "train-000.tar").read_bytes()
    md5 = hashlib.md5(b"other", usedforsecurity=False)
    headers = {
        "sha-256": {"Repr-Digest": f"sha-256=:{b64(hashlib.sha256(b'other').digest())}:"},
        "google": {"x-goog-hash": f"crc32c=AAAAAA==,md5={b64(md5.digest())}"},
        "s3": {"ETag": f'"{md5.hexdigest()}"', "x-amz-request-id": "1", "x-amz-server-side-encryption": "AES256"},
        "s3 with a key": {"ETag": f'"{md5.hexdigest()}"', "x-amz-request-id": "1"}
        | {"x-amz-server-side-encryption": "aws:kms"},
        "damaged": {"Repr-Digest": "sha-256=:A:"},
        "none": {},
    }[kind]
    server.headers = headers
    cache = ShardCache(config_of(8, shard, tmp_path / "c"))
    if kind in ("sha-256", "google", "s3"):
        with pytest.raises(ShardError, match=r"train-000.tar has \w+ \w+, but the server says \w+"):
            cache.open(shard)
        digest = b64(hashlib.sha256(content).digest())
        server.headers = {"Repr-Digest": f"sha-256=:{digest}:"}
    take(cache, shard, server)


def b64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
