"""The reader against Python's tarfile: any samples, in any order, from any number of shards and threads."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from disttrain.data.decode.fields import Field
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.reader import mmap, open_shards
from disttrain.data.reader.mmap import is_on_local_disk
from disttrain.data.reader.sample_reader import Reader
from disttrain.errors import DataError, DecodeError, ShardError
from tests.support.shards import npy, tar_samples, write_numbered, write_shard

quick = settings(derandomize=True, deadline=None, max_examples=60)
NAMES = ("cls", "bin", "x.npy", "json")


@pytest.fixture(scope="module", params=["mapped", "mapped, as if not in memory", "read"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test for each way of coming by bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmap, "is_on_local_disk", lambda folder: request.param != "read")
        if "not in memory" in request.param:
            patch.setattr(mmap, "_COLD_SECONDS", -1.0)
        yield


@dataclass(frozen=True)
class Truth:
    """Shards of varied contents and what tarfile reads from them."""

    paths: list[str]
    samples: list[tuple[str, dict[str, bytes]]]

    def index(self) -> ShardIndex:
        return ShardIndex.open(self.paths)

    def reader(self) -> Reader:
        return Reader(self.index(), {name: Field(name, decoder="bytes") for name in NAMES})

    def expected(self, ids: list[int]) -> dict[str, list[bytes]]:
        return {name: [self.samples[i][1][name] for i in ids] for name in NAMES}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """Seven shards: contents from nothing to more than the gap that is read over, some with a field more."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    paths, number = [], 0
    for shard, size in enumerate((1, 9, 17, 3, 5, 12, 2)):
        samples = []
        for place in range(size):
            fields = {
                "cls": str(number % 10).encode(),
                "bin": random.bytes(int(random.choice([0, 1, 511, 512, 513, 3000, 20_000]))),
                "x.npy": npy(random.standard_normal((2, 3)).astype(np.float32)),
                "json": b'{"n": %d}' % number,
            }
            if shard % 2:
                fields["a.txt"] = b"first of all"  # the writer sorts them
            samples.append({"__key__": f"s{shard}-{place:03d}", **fields})
            number += 1
        paths.append(write_shard(folder / f"part-{shard}.tar", samples))
    return Truth(paths, tar_samples(paths))


def ids_of(numbers: list[int]) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


def check_bytes(found: dict[str, object], expected: dict[str, list[bytes]], ids: list[int]) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        different = [i for i, ours, theirs in zip(ids, found[name], values, strict=True) if ours != theirs]  # type: ignore[call-overload]
        assert not different, f"field {name!r} of samples {different} is not what tarfile reads"


def test_all_samples_in_order(truth: Truth) -> None:
    ids = list(range(len(truth.samples)))
    reader = truth.reader()
    check_bytes(reader.read(ids_of(ids)), truth.expected(ids), ids)
    assert reader.keys(ids_of(ids)) == [key for key, _ in truth.samples]


@quick
@given(st.lists(st.integers(0, 48), min_size=1, max_size=60))
def test_any_samples_in_any_order_with_repeats(truth: Truth, ids: list[int]) -> None:
    reader = truth.reader()
    check_bytes(reader.read(ids_of(ids)), truth.expected(ids), ids)
    assert reader.keys(ids_of(ids)) == [truth.samples[i][0] for i in ids]


def test_the_fields_asked_for_under_the_names_given(truth: Truth) -> None:
    ids = [40, 3, 3, 17]
    reader = Reader(truth.index(), {"label": Field("cls"), "info": Field("json"), "x": Field("x.npy")})
    found = reader.read(ids_of(ids))
    assert list(found) == ["label", "info", "x"]
    assert found["info"] == [{"n": i} for i in ids]
    assert isinstance(found["label"], torch.Tensor)
    assert found["label"].tolist() == [i % 10 for i in ids]
    expected = [np.frombuffer(truth.samples[i][1]["x.npy"][-24:], np.float32).reshape(2, 3) for i in ids]
    np.testing.assert_array_equal(np.asarray(found["x"]), np.stack(expected))


def test_a_batch_does_not_share_memory_with_a_later_one(truth: Truth) -> None:
    reader = Reader(truth.index(), {"x": Field("x.npy")})
    first = reader.read(ids_of([1, 2]))["x"]
    assert isinstance(first, torch.Tensor)
    before = first.clone()
    second = reader.read(ids_of([30, 31]))["x"]
    assert isinstance(second, torch.Tensor)
    second.zero_()
    assert torch.equal(first, before), "a batch changed when a later one was read and written"


def test_an_extension_may_have_alternatives(tmp_path: Path) -> None:
    samples = [
        {"__key__": "a", "one.bin": b"1"},
        {"__key__": "b", "two.bin": b"22"},
        {"__key__": "c", "two.bin": b"333", "one.bin": b"4444"},
    ]
    index = ShardIndex.open(write_shard(tmp_path / "a.tar", samples))
    found = Reader(index, {"v": Field("one.bin;two.bin")}).read(ids_of([2, 1, 0]))
    assert found == {"v": [b"4444", b"22", b"1"]}, "the first alternative that a sample has comes first"


def test_many_threads_read_the_same_bytes(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_shards, "_MOST", 2)
    reader = truth.reader()
    random = np.random.default_rng(1)
    batches = [random.integers(0, len(truth.samples), 20).tolist() for _ in range(120)]
    with ThreadPoolExecutor(8) as pool:
        for ids, found in zip(batches, pool.map(lambda b: reader.read(ids_of(b)), batches), strict=True):
            check_bytes(found, truth.expected(ids), ids)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_shards, "_MOST", 3)
    reader = Reader(ShardIndex.open(write_numbered(tmp_path, [2] * 10)), {"x": Field("x.npy")})

    def num_open() -> int:
        links = []
        for number in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{number}"))
            except FileNotFoundError:  # the listing's own
                continue
        return sum(link.startswith(str(tmp_path)) and link.endswith(".tar") for link in links)

    for sample in (*range(20), *range(19, -1, -1)):
        found = reader.read(ids_of([sample]))["x"]
        assert isinstance(found, torch.Tensor)
        assert found.tolist() == [[float(sample)] * 3], f"sample {sample}"
        assert num_open() <= 3, f"{num_open()} shards are open after sample {sample}"
    everything = reader.read(ids_of(list(range(20))))["x"]
    assert isinstance(everything, torch.Tensor)
    assert everything[:, 0].tolist() == list(range(20)), "a batch over more shards than may stay open"
    assert num_open() <= 3
    del reader
    assert num_open() == 0, "a reader that is gone leaves shards open"


def test_the_mean_size_counts_whole_shards(truth: Truth) -> None:
    total = sum(Path(path).stat().st_size for path in truth.paths)
    assert truth.reader().mean_sample_bytes() == pytest.approx(total / len(truth.samples))


def test_a_field_that_does_not_occur_names_the_nearest(truth: Truth) -> None:
    with pytest.raises(DataError) as caught:
        Reader(ShardIndex.open(truth.paths, name="data.val"), {"image": Field("x.np", decoder="npy")})
    for word in ("data.val", "'image'", "'x.np'", truth.paths[0], "bin, cls, json, x.npy", "did you mean 'x.npy'?"):
        assert word in str(caught.value), f"the message does not say {word!r}"


def test_a_sample_without_a_field_is_named(tmp_path: Path) -> None:
    whole = [{"__key__": f"k{i}", "cls": b"1", "json": b"1"} for i in range(4)]
    torn = [*whole[:2], {"__key__": "torn", "cls": b"1"}, *whole[2:]]
    paths = [write_shard(tmp_path / "a.tar", whole), write_shard(tmp_path / "b.tar", torn)]
    reader = Reader(ShardIndex.open(paths), {"cls": Field("cls"), "info": Field("json")})
    assert reader.read(ids_of([5, 7]))["info"] == [1, 1], "samples that have the field are read"
    with pytest.raises(DataError) as caught:
        reader.read(ids_of([0, 5, 6]))
    for word in (paths[1], "'torn'", "'info'", "'json'"):
        assert word in str(caught.value), f"the message does not say {word!r}"


def test_a_value_that_does_not_decode_is_named(tmp_path: Path) -> None:
    good = [{"__key__": f"k{i}", "cls": b"7"} for i in range(3)]
    bad = [{"__key__": "fine", "cls": b"1"}, {"__key__": "broken", "cls": b"seven"}]
    paths = [write_shard(tmp_path / "a.tar", good), write_shard(tmp_path / "b.tar", bad)]
    reader = Reader(ShardIndex.open(paths), {"label": Field("cls")})
    with pytest.raises(DecodeError) as caught:
        reader.read(ids_of([1, 4, 0]))
    offset = Path(paths[1]).read_bytes().index(b"seven")
    for word in (paths[1], f"byte {offset}:", "'broken'", "'label'", "(cls)", "b'seven'", "data.fields.label"):
        assert word in str(caught.value), f"the message does not say {word!r}"


@pytest.mark.parametrize("used", [False, True])
def test_a_shard_truncated_after_indexing_is_a_shard_error(tmp_path: Path, used: bool) -> None:
    paths = write_numbered(tmp_path, [3, 20])
    reader = Reader(ShardIndex.open(paths), {"x": Field("x.npy")})
    if used:
        reader.read(ids_of([3]))  # its table and its file are open by now
    os.truncate(paths[1], 4096)
    with pytest.raises(ShardError, match="byte") as caught:
        reader.read(ids_of([1, 22]))
    assert paths[1] in str(caught.value)
    found = reader.read(ids_of([0, 1, 2]))["x"]
    assert isinstance(found, torch.Tensor)
    assert found[:, 0].tolist() == [0, 1, 2], "the other shard cannot be read any more"


@pytest.mark.parametrize("table_read", [False, True])
def test_a_deleted_shard_is_a_shard_error(tmp_path: Path, table_read: bool) -> None:
    paths = write_numbered(tmp_path, [3, 20])
    index = ShardIndex.open(paths)
    reader = Reader(index, {"x": Field("x.npy")})
    if table_read:
        index.table(1)
    os.unlink(paths[1])
    with pytest.raises(ShardError, match="cannot open shard") as caught:
        reader.read(ids_of([1, 22]))
    assert paths[1] in str(caught.value)
    assert "hint:" in str(caught.value)


def test_a_shard_with_more_samples_than_indexed_is_a_shard_error(tmp_path: Path) -> None:
    paths = write_numbered(tmp_path, [3, 4])
    reader = Reader(ShardIndex.open(paths, write_sidecars=False), {"x": Field("x.npy")})
    write_numbered(tmp_path, [3, 5])
    with pytest.raises(ShardError, match="holds 5 samples, but the index of data says 4"):
        reader.read(ids_of([4]))


@pytest.mark.parametrize("sample", [7, 100])
def test_an_id_out_of_range_is_an_index_error(tmp_path: Path, sample: int) -> None:
    reader = Reader(ShardIndex.open(write_numbered(tmp_path, [3, 4])), {"x": Field("x.npy")})
    with pytest.raises(IndexError):
        reader.read(ids_of([sample]))


def test_what_lies_on_a_network_is_not_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = (("/", "overlay"), ("/data", "nfs4"), ("/data/scratch disk", "xfs"), ("/database", "ext4"))
    monkeypatch.setattr(mmap, "_mounts", lambda: mounts)
    local = {"/": True, "/data": False, "/data/a/b": False, "/data/scratch disk/c": True, "/database": True}
    found = {folder: is_on_local_disk.__wrapped__(folder) for folder in local}
    assert found == local


def test_an_empty_field_at_the_end_of_a_shard_is_read(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [{"__key__": "a", "one.bin": b"1" * 3072, "two.bin": b""}])
    reader = Reader(ShardIndex.open(path), {"v": Field("two.bin")})
    os.truncate(path, 512 + 3072 + 512)  # no end block: the empty field begins where the file ends, at a page's end
    assert (512 + 3072 + 512) % 4096 == 0
    assert reader.read(ids_of([0])) == {"v": [b""]}


def test_more_shards_than_the_limit_of_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ShardIndex.open(write_numbered(tmp_path, [1] * 150))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = max(map(int, os.listdir("/proc/self/fd"))) + 60

    def read(_: int) -> list[float]:
        found = reader.read(ids_of(list(range(150))))["x"]
        assert isinstance(found, torch.Tensor)
        return found[:, 0].tolist()

    try:
        for files_per_shard in (0, 4):  # what may not be raised, and what is
            monkeypatch.setattr(open_shards, "_FILES_PER_SHARD", files_per_shard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
            monkeypatch.setattr(open_shards, "_MOST", 40 if files_per_shard == 0 else 4096)
            reader = Reader(index, {"x": Field("x.npy")})
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == (600 if files_per_shard else low)
            with ThreadPoolExecutor(4) as pool:
                assert list(pool.map(read, range(12))) == [[float(n) for n in range(150)]] * 12
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_descriptor_left_has_its_own_hint(tmp_path: Path) -> None:
    reader = Reader(ShardIndex.open(write_numbered(tmp_path, [2])), {"x": Field("x.npy")})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        with pytest.raises(ShardError, match=r"Too many open files\n.*raise the limit of open files") as caught:
            reader.read(ids_of([0]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "ulimit -n" in caught.value.hint
