"""Indexing: what has not changed is not read again, what has is found out, MD5s are kept only where that is safe."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain.data.index import build as build_module
from disttrain.data.index.build import index_shards, md5_of
from disttrain.data.index.shard_index import ShardIndex, write_manifest
from disttrain.data.index.sidecar import build_table, fitting_sidecar, sidecar_path
from disttrain.errors import DataError, ShardError
from tests.support.servers import RangeServer, range_server
from tests.support.shards import write_numbered, write_shard


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    (tmp_path / "data").mkdir()
    return write_numbered(tmp_path / "data", [30, 7, 12])


@pytest.fixture
def server(tmp_path: Path, paths: list[str], cache_home: Path) -> Iterator[RangeServer]:
    with range_server(tmp_path / "data") as running:
        yield running


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards whose headers were read."""
    found: list[str] = []

    def build(path: str, **options: object) -> object:
        found.append(os.path.basename(path))
        return build_table(path)

    monkeypatch.setattr("disttrain.data.index.sidecar.build_table", build)
    monkeypatch.setattr(build_module, "build_table", build)
    return found


def recorded(path: Path) -> list[str]:
    return [entry.get("md5sum", "") for entry in json.loads(path.read_text())["shardlist"]]


def later() -> None:
    time.sleep(0.02)  # more than the grain of a file's times


def test_an_unchanged_shard_is_not_read_again(paths: list[str], scanned: list[str]) -> None:
    found = index_shards(paths)
    assert found.sidecars == {"written": 3}
    assert [shard.num_samples for shard in found.shards] == [30, 7, 12]
    assert len(scanned) == 3
    assert index_shards(paths) == build_module.Indexed(found.shards, sidecars={"unchanged": 3}, kept={}, num_hashed=0)
    assert len(scanned) == 3
    assert index_shards(paths, anew=True).sidecars == {"right": 3}
    assert len(scanned) == 6


def test_what_changed_is_read_again(paths: list[str], scanned: list[str]) -> None:
    index_shards(paths)
    scanned.clear()
    later()
    before = os.stat(paths[0])
    write_shard(Path(paths[0]), [{"__key__": f"new-{n:03}", "cls": b"1"} for n in range(30)])
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))  # the date does not tell
    os.utime(paths[1])  # the date tells what is not so
    sidecar_path(paths[2]).write_text("garbage")
    assert index_shards(paths).sidecars == {"written": 3}
    assert sorted(scanned) == ["train-000.tar", "train-001.tar", "train-002.tar"]
    assert all(fitting_sidecar(path)[0] is not None for path in paths)


def test_a_subtly_wrong_sidecar_is_fixed_by_force(paths: list[str]) -> None:
    index_shards(paths)
    sidecar = sidecar_path(paths[0])
    right = sidecar.read_text()
    sidecar.write_text(right.replace("train-00003.", "train-33333."))  # not among the members that are looked at
    assert index_shards(paths[:1], anew=True).sidecars == {"written": 1}
    assert sidecar.read_text() == right


def test_unreadable_shards_do_not_keep_the_others_from_being_indexed(paths: list[str]) -> None:
    for path in paths[:2]:
        os.truncate(path, 5000)
    with pytest.raises(ShardError, match=r"train-000.tar at byte .* \(and 1 more; `disttrain shards verify` names"):
        index_shards(paths)
    assert [sidecar_path(path).exists() for path in paths] == [False, False, True]


def test_a_shard_that_is_written_to_meanwhile_is_an_error(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def md5(path: str, size: int) -> str:
        later()
        os.utime(paths[1])
        return md5_of(path, size)

    monkeypatch.setattr(build_module, "md5_of", md5)
    with pytest.raises(ShardError, match=r"train-001.tar was written to while it was read"):
        index_shards(paths, md5=True)


def test_md5s_are_kept_where_the_shard_has_not_changed(paths: list[str], tmp_path: Path) -> None:
    manifest = tmp_path / "data" / "t.json"
    later()
    found = index_shards(paths, manifest=manifest, md5=True)
    assert found.num_hashed == 3
    write_manifest(manifest, found.shards, name="t")
    expected = [md5_of(path) for path in paths]
    assert recorded(manifest) == expected
    for md5 in (True, False):
        again = index_shards(paths, manifest=manifest, md5=md5)
        assert (again.num_hashed, [shard.md5 for shard in again.shards]) == (0, expected)
    assert index_shards(paths, manifest=manifest, md5=True, anew=True).num_hashed == 3
    assert [shard.md5 for shard in index_shards(paths).shards] == ["", "", ""]


def test_md5s_are_not_kept_where_a_date_hides_the_change(paths: list[str], tmp_path: Path) -> None:
    manifest = tmp_path / "data" / "t.json"
    later()
    write_manifest(manifest, index_shards(paths, manifest=manifest, md5=True).shards, name="t")
    later()
    before = os.stat(paths[0])
    content = bytearray(Path(paths[0]).read_bytes())
    content[512] ^= 1
    Path(paths[0]).write_bytes(content)
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    without = index_shards(paths, manifest=manifest)
    assert [bool(shard.md5) for shard in without.shards] == [False, True, True]
    found = index_shards(paths, manifest=manifest, md5=True)
    assert found.num_hashed == 1
    assert [shard.md5 for shard in found.shards] == [md5_of(path) for path in paths]


def test_no_file_is_overwritten_that_is_no_manifest(paths: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.json is not a shard manifest") as caught:
        index_shards(paths, manifest=tmp_path / "notes.json")
    assert "choose another name" in caught.value.hint


def test_remote_shards_are_asked_for_once(server: RangeServer, paths: list[str], tmp_path: Path) -> None:
    urls = [f"{server.url}/train-{number:03}.tar" for number in range(3)]
    manifest = tmp_path / "t.json"
    found = index_shards(urls, manifest=manifest, md5=True)
    assert (found.sidecars, found.kept, found.num_hashed) == ({}, {"written": 3}, 3)
    assert [shard.md5 for shard in found.shards] == [md5_of(path) for path in paths]
    write_manifest(manifest, found.shards, name="t")
    for md5 in (True, False):
        server.requests.clear()
        again = index_shards(urls, manifest=manifest, md5=md5)
        assert (again.shards, again.kept, again.num_hashed) == (found.shards, {"unchanged": 3}, 0)
        assert len(server.requests) == 3
    assert not list((tmp_path / "data").glob("*.idx")), "something was written beside the shards"

    local = ShardIndex.open(paths, write_sidecars=False)
    there = ShardIndex.open(str(manifest))
    assert [there.key(n) for n in range(49)] == [local.key(n) for n in range(49)]

    write_shard(Path(paths[1]), [{"__key__": f"other-{n}", "cls": b"1"} for n in range(5)])
    changed = index_shards(urls, manifest=manifest, md5=True)
    assert (changed.kept, changed.num_hashed) == ({"unchanged": 2, "written": 1}, 1)
    assert changed.shards[1].md5 == md5_of(paths[1])
    forced = index_shards(urls, manifest=manifest, md5=True, anew=True)
    assert (forced.kept, forced.num_hashed) == ({"written": 3}, 3)


def test_local_and_remote_shards_together(server: RangeServer, paths: list[str]) -> None:
    found = index_shards([paths[2], f"{server.url}/train-001.tar", paths[0]])
    assert [shard.num_samples for shard in found.shards] == [12, 7, 30]
    assert (found.sidecars, found.kept) == ({"written": 2}, {"written": 1})


def test_a_remote_shard_that_is_missing_is_named(server: RangeServer) -> None:
    with pytest.raises(ShardError, match=r"none\.tar\?\.\.\.: HTTP 404") as caught:
        index_shards([f"{server.url}/none.tar?signature=secret", f"{server.url}/train-001.tar"])
    assert "secret" not in str(caught.value)
