"""The index: shards by patterns and manifests, in order, and their tables loaded once and never wrong."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from disttrain.data.index.patterns import places
from disttrain.data.index.shard_index import (
    Shard,
    ShardIndex,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from disttrain.data.index.sidecar import ShardTable, fitting_sidecar, sidecar_is_fresh, sidecar_path
from disttrain.errors import DataError, ShardError
from tests.support.tars import set_time, write_plain, write_tar


@pytest.mark.parametrize("may_write", [True, False])
def test_a_wrong_sidecar_is_told_once_and_replaced(tmp_path: Path, may_write: bool) -> None:
    paths = [write_plain(tmp_path / f"{name}.tar", 3) for name in "ab"]
    index = ShardIndex.open(paths, write_sidecars=True)
    index = ShardIndex(index.shards, name="data.train", write_sidecars=may_write)
    for path in paths:
        write_tar(Path(path), [(f"{n}.cls", b"1") for n in range(3)])
        set_time(path, 0)
    what = "it was rewritten" if may_write else "the shard's headers were read instead; run `disttrain shards index`"
    with pytest.warns(UserWarning, match=f"sidecar {sidecar_path(paths[0])} does not match .*{what}") as told:
        assert [index.table(number).keys for number in range(2)] == [["0", "1", "2"]] * 2
    assert len(told) == 1
    assert [fitting_sidecar(path)[0] is not None for path in paths] == [may_write] * 2


def test_a_table_is_loaded_once_however_many_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ShardIndex.open([write_plain(tmp_path / f"{name}.tar", 3) for name in "ab"])
    calls: list[str] = []
    here, go_on = Event(), Event()

    def slow(path: str) -> tuple[ShardTable | None, str]:
        calls.append(path)
        if path.endswith("a.tar"):
            here.set()
            assert go_on.wait(20)
        return fitting_sidecar(path)

    monkeypatch.setattr("disttrain.data.index.shard_index.fitting_sidecar", slow)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(index.table, 0) for _ in range(6)]
        assert here.wait(20)
        assert index.table(1).keys == ["0000", "0001", "0002"], "another shard's table waits for it"
        go_on.set()
        tables = [one.result() for one in asked]
    assert all(table is tables[0] for table in tables)
    assert len(calls) == 2


def test_a_table_that_could_not_be_loaded_is_tried_again(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "a.tar", 3)
    index = ShardIndex.open(path)
    os.rename(path, tmp_path / "gone")
    for _ in range(2):
        with pytest.raises(ShardError):
            index.table(0)
    os.rename(tmp_path / "gone", path)
    assert len(index.table(0)) == 3


def test_many_shards_are_opened_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(1200):
        write_tar(tmp_path / f"t-{number:04}.tar", [(f"{number}-{n}.cls", b"") for n in range(1 + number % 3)])
    for _ in range(2):  # by the headers, then by the sidecars
        index = ShardIndex.open(f"{tmp_path}/t-{{0000..1199}}.tar")
        assert index.sizes.tolist() == [1 + number % 3 for number in range(1200)]
    write_manifest(tmp_path / "t.json", index.shards, name="t")
    assert ShardIndex.open(f"{tmp_path}/t.json").shards == index.shards
    assert capsys.readouterr() == ("", ""), "no progress where nobody sees it"
    os.unlink(tmp_path / "t-0700.tar")
    with pytest.raises(DataError, match=r"t-0700\.tar does not exist"):
        ShardIndex.open(f"{tmp_path}/t-{{0000..1199}}.tar")
    with pytest.raises(DataError, match=r"t-0700\.tar, listed in .*, does not exist"):
        ShardIndex.open(f"{tmp_path}/t.json")


def test_a_sidecar_that_contradicts_its_manifest_is_an_error(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "a.tar", 3)
    index = ShardIndex([Shard(path, 4, -1)], name="data.train")
    with pytest.raises(ShardError, match=r"holds 3 samples, but the index of data\.train says 4"):
        index.table(0)


def test_manifest_comes_back_and_is_relative(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    shards = []
    for number in range(3):
        path = write_plain(tmp_path / "shards" / f"t-{number}.tar", number + 2)
        shards.append(Shard(path, number + 2, os.path.getsize(path), md5=f"{number}" * 32 if number else ""))
    manifest = tmp_path / "train.json"
    write_manifest(manifest, shards, name="toy", extra={"note": 1})
    content = json.loads(manifest.read_text())
    assert (content["__kind__"], content["wids_version"], content["name"]) == ("wids-shard-index-v1", 1, "toy")
    assert [entry["url"] for entry in content["shardlist"]] == ["shards/t-0.tar", "shards/t-1.tar", "shards/t-2.tar"]
    assert read_manifest(manifest) == shards
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    assert [Path(shard.path).parent for shard in read_manifest(moved / "train.json")] == [moved / "shards"] * 3
    index = ShardIndex.open(str(moved / "train.json"))
    assert (len(index), index.key(0), index.key(4), index.fields()) == (9, "0000", "0002", ("cls", "bin"))


def test_manifest_faults_are_named(tmp_path: Path) -> None:
    manifest = tmp_path / "train.json"
    with pytest.raises(DataError, match="does not exist"):
        read_manifest(manifest)
    for text in ("[", "{}", "[1]", '{"shardlist": [{"url": "a.tar"}]}'):
        manifest.write_text(text)
        with pytest.raises(DataError, match="is not a shard manifest"):
            read_manifest(manifest)
    path = write_plain(tmp_path / "a.tar", 3)
    write_manifest(manifest, [Shard(path, 3, 7)], name="toy")
    with pytest.raises(DataError, match=r"bytes, but .* says 7"):
        read_manifest(manifest)
    os.unlink(path)
    with pytest.raises(DataError, match=r"a\.tar, listed in .*, does not exist"):
        read_manifest(manifest)
    assert parse_manifest(manifest) == [Shard(path, 3, 7)]


@pytest.mark.parametrize(
    ("base", "url", "expected"),
    [
        ("", "a.tar", "{here}/a.tar"),
        ("", "/x/a.tar", "/x/a.tar"),
        ("", "file:///x/a%20b.tar", "/x/a b.tar"),
        ("", "s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("sub", "a.tar", "{here}/sub/a.tar"),
        ("/x/y/", "a.tar", "/x/y/a.tar"),
        ("file:///x/y", "z/a.tar", "/x/y/z/a.tar"),
        ("https://h/x", "z/a.tar", "https://h/x/z/a.tar"),
        ("https://h/x", "s3://bucket/a.tar", "s3://bucket/a.tar"),
    ],
)
def test_where_a_manifests_shards_are(tmp_path: Path, base: str, url: str, expected: str) -> None:
    content = {"wids_version": 1, **({"base": base} if base else {}), "shardlist": [{"url": url, "nsamples": 1}]}
    (tmp_path / "m.json").write_text(json.dumps(content))
    [shard] = parse_manifest(tmp_path / "m.json")
    assert os.path.normpath(shard.path) == os.path.normpath(expected.format(here=tmp_path))


def test_manifests_of_manifests_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"shardlist": [], "datasets": [{"source_url": "n.json"}]}))
    with pytest.raises(DataError, match=r"m\.json lists other data sets under 'datasets'") as caught:
        parse_manifest(tmp_path / "m.json")
    assert "list those manifests" in caught.value.hint


def test_patterns(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = ["t-000.tar", "t-001.tar", "t-002.tar", "sub/t-000.tar", "odd[1].tar", ".t-009.tar"]
    for name in names:
        write_plain(tmp_path / name, 1)

    def found(pattern: str) -> list[str]:
        return [os.path.relpath(path, tmp_path) for path in places(f"{tmp_path}/{pattern}")]

    assert found("t-{000..002}.tar") == names[:3]
    assert found("t-{002,000}.tar") == ["t-002.tar", "t-000.tar"]
    assert found("t-*.tar") == names[:3]
    assert found("{t-000,sub/t-*}.tar") == ["t-000.tar", "sub/t-000.tar"]
    assert found("*/t-*.tar") == ["sub/t-000.tar"]
    assert found("*.tar") == ["odd[1].tar", *names[:3]], "hidden files are not meant by a star"
    assert found("odd[1].tar") == ["odd[1].tar"]


def test_missing_shards_name_the_nearest(tmp_path: Path) -> None:
    write_plain(tmp_path / "train-000000.tar", 1)
    with pytest.raises(DataError) as caught:
        places(f"{tmp_path}/trian-{{000000..000002}}.tar", name="data.train")
    assert "data.train: shard" in caught.value.what
    assert "trian-000000.tar does not exist (and 2 more)" in caught.value.what
    assert "did you mean 'train-000000.tar'?" in caught.value.hint
    with pytest.raises(DataError, match="no file matches"):
        places(f"{tmp_path}/val-*.tar")
    with pytest.raises(DataError) as caught:
        places(f"{tmp_path}/none/val-0.tar")
    assert f"folder {tmp_path}/none does not exist" in caught.value.hint
    with pytest.raises(DataError, match="has an unmatched brace"):
        places(f"{tmp_path}/train-{{000..001.tar")


def test_open_takes_lists_and_numbers_through(tmp_path: Path) -> None:
    first, second = write_plain(tmp_path / "a.tar", 2), write_plain(tmp_path / "b.tar", 3, first=7)
    index = ShardIndex.open([second, f"{tmp_path}/a*.tar"])
    assert [shard.path for shard in index.shards] == [second, first]
    assert [index.key(number) for number in range(len(index))] == ["0007", "0008", "0009", "0000", "0001"]
    assert all(sidecar_is_fresh(path) for path in (first, second)), "opening writes the sidecars"
    with pytest.raises(DataError, match="names no shards"):
        ShardIndex.open([])


def test_open_can_leave_the_folder_alone(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "a.tar", 2)
    assert len(ShardIndex.open(path, write_sidecars=False)) == 2
    assert os.listdir(tmp_path) == ["a.tar"]
