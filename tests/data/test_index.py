"""The index: samples as WebDataset groups them, sidecars that are trusted only when they fit, manifests, patterns."""

from __future__ import annotations

import gc
import io
import json
import os
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from disttrain.data.index import (
    Shard,
    ShardIndex,
    describe_shard,
    expand,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from disttrain.data.sidecar import (
    ShardTable,
    build_table,
    load_table,
    read_sidecar,
    sidecar_is_fresh,
    sidecar_path,
    split_name,
    write_sidecar_file,
)
from disttrain.errors import DataError, ShardError


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> str:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def write_plain(path: Path, num_samples: int, first: int = 0) -> str:
    numbers = range(first, first + num_samples)
    members = [(f"{i:04}.{ext}", f"{ext}{i}".encode() * (i + 1)) for i in numbers for ext in ("cls", "image.npy")]
    return write_tar(path, members)


def contents(path: str) -> list[tuple[str, dict[str, bytes]]]:
    """Keys, fields and bytes by the table."""
    data = Path(path).read_bytes()
    spans = load_table(path).spans()
    return [(key, {f: data[o : o + n] for f, (o, n) in fields.items()}) for key, fields in spans.items()]


def webdataset_contents(path: str) -> list[tuple[str, dict[str, bytes]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its file open
        samples: list[dict[str, Any]] = list(webdataset.WebDataset(path, shardshuffle=False, empty_check=False))
        gc.collect()
    return [(s["__key__"], {field: value for field, value in s.items() if field[0] != "_"}) for s in samples]


def age(path: str | Path, seconds: float) -> None:
    """Set a file's time relative to now."""
    now = 1_700_000_000
    os.utime(path, ns=(int((now + seconds) * 1e9),) * 2)


def test_grouping_is_webdatasets(tmp_path: Path) -> None:
    members = [
        ("000.cls", b"1"),
        ("000.jpg", b"\xff\xd8"),
        ("001.JPG", b"upper"),
        ("001.seg.png", b"mask"),
        ("cats/000.jpg", b"a"),
        ("cats/000.cls", b"0"),
        ("cats.v2/000.left.jpg", b"dot in a folder"),
        ("dogs/000.jpg", b""),
        ("без/ключ.txt", b"not ASCII"),
        ("d" * 200 + "/" + "n" * 120 + ".txt", b"long"),
        ("__meta__/readme.txt", b"skipped by webdataset"),
        ("__info__", b"skipped too"),
        ("__pycache/x.txt", b"no closing underscores: a sample"),
        ("deep/__meta__/y.txt", b"only the first folder counts"),
        ("no_extension", b"skipped"),
        ("z/no_extension", b"skipped"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    ours, theirs = contents(path), webdataset_contents(path)
    assert [key for key, _ in ours] == [key for key, _ in theirs], "other keys than webdataset's"
    for (key, fields), (_, expected) in zip(ours, theirs, strict=True):
        assert fields == expected, f"sample {key!r} differs from webdataset's"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_tar_formats_give_webdatasets_samples(tmp_path: Path, format: int) -> None:
    members = [(f"{'f' * 60}/{'g' * 60}/{i:03}.{ext}", bytes([i]) * 700 * i) for i in range(5) for ext in ("a", "b.c")]
    path = write_tar(tmp_path / "a.tar", members, format)
    assert contents(path) == webdataset_contents(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ("a", "txt")),
        ("./a.txt", ("a", "txt")),
        ("x/y.z/a.seg.PNG", ("x/y.z/a", "seg.png")),
        (".hidden", None),
        ("x/.hidden.txt", None),
        ("plain", None),
        ("x.y/plain", None),
        ("a.", None),
        ("__x__/a.txt", None),
        ("__a.b__", None),
        ("__x/a.txt", ("__x/a", "txt")),
        ("y/__x__/a.txt", ("y/__x__/a", "txt")),
    ],
)
def test_split_name(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected


def test_dot_files_and_folders_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("data.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in (".DS_Store.x", "data.d/._a.jpg", "data.d/a.jpg"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    assert build_table(str(path)).keys == ["data.d/a"]


def test_samples_may_lack_fields(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"x"), ("1.png", b"yy"), ("1.cls", b"1")])
    table = build_table(path)
    assert table.fields == ("jpg", "png", "cls")
    assert table.sizes.tolist() == [[1, -1, -1], [-1, 2, 1]]
    assert {key: list(fields) for key, fields in table.spans().items()} == {"0": ["jpg"], "1": ["png", "cls"]}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.jpg", "b.jpg", "a.cls"], "sample key 'a' occurs twice, apart"),
        (["a.jpg", "a.jpg"], "sample 'a' has field 'jpg' twice"),
        (["a.jpg", "a.JPG"], "sample 'a' has field 'jpg' twice"),
        (["folder/plain"], "holds no samples"),
    ],
)
def test_faults_of_samples_are_named(tmp_path: Path, names: list[str], words: str) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, b"x") for name in names])
    with pytest.raises(ShardError) as caught:
        build_table(path)
    assert words in caught.value.what
    assert path in caught.value.what
    assert "twice" not in words or f"at byte {(2 * len(names) - 1) * 512}" in caught.value.what


def test_sidecar_is_dalis_and_comes_back(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "train-000000.tar", 4)
    table = build_table(path)
    assert write_sidecar_file(path, table)
    assert sidecar_path(path).name == "train-000000.idx"
    lines = sidecar_path(path).read_text().splitlines()
    assert lines[:2] == ["v1.2 4", "cls 512 4 0000.cls image.npy 1536 10 0000.image.npy"]
    again = read_sidecar(path)
    assert again is not None
    assert_same_table(again, table)


def assert_same_table(found: ShardTable, expected: ShardTable) -> None:
    assert found.keys == expected.keys
    assert found.fields == expected.fields
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    np.testing.assert_array_equal(found.sizes, expected.sizes)


def test_a_fresh_sidecar_saves_reading_the_shard(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "a.tar", 3)
    expected = build_table(path)
    write_sidecar_file(path, expected)
    size = os.path.getsize(path)
    Path(path).write_bytes(b"\1" * size)  # no longer a tar: whatever is read now comes from the sidecar
    age(path, 0)
    age(sidecar_path(path), 0)  # the same time is fresh enough
    assert_same_table(load_table(path), expected)
    assert describe_shard(path) == Shard(path, 3, size)


def test_a_stale_sidecar_is_not_trusted_and_is_replaced(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "a.tar", 3)
    write_sidecar_file(path, build_table(path))
    write_plain(tmp_path / "a.tar", 5)
    age(path, 0)
    age(sidecar_path(path), -1)
    assert not sidecar_is_fresh(path)
    assert len(load_table(path)) == 5
    assert describe_shard(path).num_samples == 5
    assert sidecar_is_fresh(path)
    assert sidecar_path(path).read_text().startswith("v1.2 5\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage\n",
        "v1.2\n",
        "v1.2 many\n",
        "v1.1 1\ncls 512 1 0000.cls\n",  # an older version
        "v1.2 2\ncls 512 1 0000.cls\n",  # fewer samples than it says
        "v1.2 1\ncls 512\n",
        "v1.2 1\ncls 512 one 0000.cls\n",
        "v1.2 1\ncls 512 999999 0000.cls\n",  # points outside the shard
        "v1.2 1\ncls -512 1 0000.cls\n",
        "v1.2 1\ncls 512 1 noextension\n",
    ],
)
def test_a_wrong_sidecar_is_not_trusted(tmp_path: Path, text: str) -> None:
    path = write_plain(tmp_path / "a.tar", 3)
    expected = build_table(path)
    sidecar_path(path).write_text(text)
    assert read_sidecar(path) is None
    assert_same_table(load_table(path), expected)


def test_keys_with_white_space_have_no_sidecar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("two words.txt", b"x"), ("b.txt", b"y")])
    assert not write_sidecar_file(path, build_table(path))
    assert not sidecar_path(path).exists()
    assert describe_shard(path).num_samples == 2


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
    assert (len(index), index.key(0), index.key(4), index.fields()) == (9, "0000", "0002", ("cls", "image.npy"))


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


def test_patterns(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = ["t-000.tar", "t-001.tar", "t-002.tar", "sub/t-000.tar", "odd[1].tar", ".t-009.tar"]
    for name in names:
        write_plain(tmp_path / name, 1)

    def found(pattern: str) -> list[str]:
        return [os.path.relpath(path, tmp_path) for path in expand(f"{tmp_path}/{pattern}")]

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
        expand(f"{tmp_path}/trian-{{000000..000002}}.tar", name="data.train")
    assert "data.train: shard" in caught.value.what
    assert "trian-000000.tar does not exist (and 2 more)" in caught.value.what
    assert "did you mean 'train-000000.tar'?" in caught.value.mend
    with pytest.raises(DataError, match="no file matches"):
        expand(f"{tmp_path}/val-*.tar")
    with pytest.raises(DataError) as caught:
        expand(f"{tmp_path}/none/val-0.tar")
    assert "holds no .tar files" in caught.value.mend
    with pytest.raises(DataError, match="has a brace without its partner"):
        expand(f"{tmp_path}/train-{{000..001.tar")


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
