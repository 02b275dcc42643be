"""Shards that are others than they were: told or refused, and copies are not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from disttrain.data.index.evidence import check_appended, check_evidence, evidence, notices
from disttrain.data.index.shard_index import Shard, ShardIndex, read_manifest, write_manifest
from disttrain.errors import CheckpointError
from tests.support.tars import set_time, write_plain, write_tar


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    (tmp_path / "data").mkdir()
    found = [write_plain(tmp_path / f"data/t-{number}.tar", 5, first=10 * number) for number in range(3)]
    for path in found:
        set_time(path, 0)
    return found


def opened(paths: list[str]) -> ShardIndex:
    return ShardIndex.open(paths, write_sidecars=False, name="data.train")


def saved(paths: list[str]) -> dict[str, Any]:
    return evidence(opened(paths), reads_contents=True)


def test_the_same_shards_are_the_same(paths: list[str]) -> None:
    assert check_evidence(saved(paths), opened(paths)) == ""


def test_a_shard_of_the_same_size_with_other_contents_is_an_error(paths: list[str]) -> None:
    before = saved(paths)
    data = Path(paths[1]).read_bytes()
    Path(paths[1]).write_bytes(data.replace(b"cls12" * 3, b"cls99" * 3))
    with pytest.raises(CheckpointError, match=r"data.train: shard .*t-1.tar was replaced since") as caught:
        check_evidence(before, opened(paths))
    assert "--initialize_from" in caught.value.hint
    Path(paths[1]).write_bytes(data)
    set_time(paths[1], 60)
    told = check_evidence(before, opened(paths))
    assert "1 of 3 shards, such as" in told, "another date alone ends nothing"
    assert "parts of 1 of them were compared and match" in told


def test_copied_shards_are_the_same(paths: list[str], tmp_path: Path) -> None:
    before = saved(paths)
    (tmp_path / "copy").mkdir()
    copies = [shutil.copy(path, tmp_path / "copy") for path in paths]
    assert "3 of 3 shards" in check_evidence(before, opened([str(path) for path in copies]))


@pytest.mark.parametrize("before", [{}, {"count": 3}, {"count": "x", "stamps": 5}, {"count": 3, "stamps": "0" * 8}])
def test_older_and_odd_checkpoints_have_no_evidence(paths: list[str], before: dict[str, Any]) -> None:
    index = opened(paths)
    assert check_evidence(before, index) == ""
    check_appended(before, index.names_hash(), index)


def test_shards_whose_contents_were_not_read_are_only_told(paths: list[str]) -> None:
    before = evidence(opened(paths), reads_contents=False)
    set_time(paths[0], 60)
    assert "none could be compared, so their contents may differ" in check_evidence(before, opened(paths))


def test_remote_shards_are_known_by_version_and_md5() -> None:
    def index(version: str, md5: str) -> ShardIndex:
        return ShardIndex([Shard("s3://b/a.tar", 3, 100, version=version, md5=md5)], name="data.train")

    before = evidence(index("v1", "0" * 32), reads_contents=True)
    assert check_evidence(before, index("v1", "0" * 32)) == ""
    assert "parts of 1 of them" in check_evidence(before, index("v2", "0" * 32))
    with pytest.raises(CheckpointError, match="was replaced"):
        check_evidence(before, index("v2", "1" * 32))
    from_manifest = evidence(index("", "a" * 32), reads_contents=True)
    assert check_evidence(from_manifest, index("", "a" * 32)) == ""
    with pytest.raises(CheckpointError, match="was replaced"):
        check_evidence(from_manifest, index("", "b" * 32))


def test_evidence_of_many_shards_is_bounded() -> None:
    many = ShardIndex([Shard(f"s3://b/{n}.tar", 1, 100, version=f"v{n}") for n in range(20_000)])
    before = evidence(many, reads_contents=True)
    assert len(before["stamps"]) <= 8 * 16_384
    assert len(before["contents"]) == 8 * 1024
    assert check_evidence(before, many) == ""
    others = [Shard(s.path, 1, 100, version=s.version + "x" * (n == 777)) for n, s in enumerate(many.shards)]
    assert "2 of 20000 shards" in check_evidence(before, ShardIndex(others)), "those that share its stamp"


def test_appended_shards_are_named(paths: list[str]) -> None:
    first = opened(paths[:2])
    with pytest.raises(
        CheckpointError, match=r"started with 2 of these shards, and 1 was appended since, from .*t-2.tar"
    ):
        check_appended(saved(paths[:2]), first.names_hash(), opened(paths))
    check_appended(saved(paths[1:]), opened(paths[1:]).names_hash(), opened(paths))


def test_a_shard_that_is_named_twice_is_told_however_it_is_spelled(paths: list[str], tmp_path: Path) -> None:
    assert list(notices(opened(paths))) == []
    os.symlink(tmp_path / "data", tmp_path / "link")
    os.link(paths[0], tmp_path / "hard.tar")
    for again in (paths[0], f"{tmp_path}/data/../data/t-0.tar", f"{tmp_path}/link/t-0.tar", f"{tmp_path}/hard.tar"):
        [told] = notices(opened([*paths, again]))
        assert told.startswith(f"data.train lists shard {paths[0]} twice"), told
        assert (f"also as {again}" in told) == (again != paths[0])
    [told] = notices(opened([f"{tmp_path}/data/t-*.tar", f"{tmp_path}/link/t-{{0..2}}.tar"]))
    assert "(and 2 more)" in told
    url = Shard("s3://b/a.tar", 3, 100)
    assert len(list(notices(ShardIndex([url, url])))) == 1


def test_links_that_look_like_fields_are_told(tmp_path: Path) -> None:
    import tarfile

    path = write_tar(tmp_path / "a.tar", [("a.cls", b"1")])
    with tarfile.open(path, "a") as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"b{number}.cls")
            info.type, info.linkname = tarfile.SYMTYPE, "a.cls"
            tar.addfile(info)
    for write_sidecars in (True, False):  # it has no sidecar, so each start tells
        index = ShardIndex.open(path, write_sidecars=write_sidecars, name="data.train")
        [told] = notices(index)
        assert "holds 'b0.cls' at byte 1024, a symbolic link to 'a.cls', one of 3 in 1 shards" in told
        assert not (tmp_path / "a.idx").exists()
    write_manifest(tmp_path / "m.json", index.shards, name="m")
    with pytest.warns(UserWarning, match=r"holds 'b0\.cls'.*links and devices are not read"):
        ShardIndex.open(str(tmp_path / "m.json")).table(0)


def test_shards_newer_than_the_manifest_with_their_md5(paths: list[str], tmp_path: Path) -> None:
    shards = [Shard(path, 5, os.stat(path).st_size, md5="0" * 32) for path in paths]
    write_manifest(tmp_path / "m.json", shards, name="m")
    set_time(tmp_path / "m.json", 10)
    assert read_manifest(tmp_path / "m.json") == shards
    set_time(paths[1], 20)
    with pytest.warns(UserWarning, match=r"data: shard .*t-1\.tar is newer than .*m\.json, which has its MD5"):
        read_manifest(tmp_path / "m.json")
