"""Sidecars: samples as WebDataset groups them, DALI's form, and nothing trusted that does not fit."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from disttrain.data.index.build import index_shards
from disttrain.data.index.shard_index import Shard, ShardIndex, describe_shard
from disttrain.data.index.sidecar import (
    ShardTable,
    build_table,
    fitting_sidecar,
    load_table,
    read_sidecar,
    sidecar_is_fresh,
    sidecar_path,
    split_name,
    write_sidecar_file,
)
from disttrain.errors import ShardError
from tests.support.tars import Contents, set_time, webdataset_contents, write_plain, write_tar


def contents(path: str) -> Contents:
    """Keys, fields and bytes by the table."""
    data = Path(path).read_bytes()
    spans = load_table(path).spans()
    return [(key, {f: data[o : o + n] for f, (o, n) in fields.items()}) for key, fields in spans.items()]


def assert_same_table(found: ShardTable, expected: ShardTable) -> None:
    assert found.keys == expected.keys
    assert found.fields == expected.fields
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    np.testing.assert_array_equal(found.sizes, expected.sizes)


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
        ("/a.txt", ("/a", "txt")),
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
        (["a.jpg", "b.jpg", "a.cls"], "sample key 'a' occurs twice, with other samples in between"),
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
    assert lines[:2] == ["v1.2 4", "cls 512 4 0000.cls bin 1536 4 0000.bin"]
    again = read_sidecar(path)
    assert again is not None
    assert_same_table(again, table)


def test_a_fresh_sidecar_saves_reading_the_shard(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "a.tar", 9)
    expected = build_table(path)
    write_sidecar_file(path, expected)
    content = bytearray(Path(path).read_bytes())
    content[1024:1536] = b"\1" * 512  # a header that is not looked at: the second one
    Path(path).write_bytes(content)
    set_time(path, 0)
    set_time(sidecar_path(path), 0)  # the same time is fresh enough
    with pytest.raises(ShardError):
        build_table(path)
    assert_same_table(load_table(path), expected)
    assert describe_shard(path) == Shard(path, 9, len(content))


REWRITTEN: dict[str, Callable[[Path], object]] = {
    "other keys": lambda path: write_plain(path, 3, first=1),
    "another order": lambda path: write_tar(path, [("b.cls", b"2"), ("a.cls", b"1"), ("c.cls", b"3")]),
    "another size in the middle": lambda path: write_tar(path, [("a.cls", b"1"), ("b.cls", b"22"), ("c.cls", b"3")]),
    "one more at the end": lambda path: write_tar(path, [(f"{key}.cls", b"1") for key in "abcd"]),
    "one fewer at the end": lambda path: write_tar(path, [("a.cls", b"1"), ("b.cls", b"2")]),
    "one more at the start": lambda path: write_tar(path, [(f"{key}.cls", b"1") for key in "0abc"]),
    "no tar": lambda path: path.write_bytes(b"\1" * 10240),
    "cut off": lambda path: os.truncate(path, 5 * 512),
}


@pytest.mark.parametrize("change", REWRITTEN)
def test_a_shard_rewritten_under_its_old_date_is_found_out(tmp_path: Path, change: str) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.cls", b"1"), ("b.cls", b"2"), ("c.cls", b"3")])
    write_sidecar_file(path, build_table(path))
    before = os.stat(path)
    assert fitting_sidecar(path)[0] is not None
    REWRITTEN[change](tmp_path / "a.tar")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` and `rsync -t` do
    assert sidecar_is_fresh(path)
    table, wrong = fitting_sidecar(path)
    assert table is None
    assert wrong
    if change not in ("no tar", "cut off"):
        assert_same_table(load_table(path), build_table(path))


@pytest.mark.parametrize(
    "rows",
    [
        ["cls 512 1 a.cls", "cls 1536 1 b.cls", "cls 2048 1 c.cls"],  # no room for a header
        ["cls 512 1 a.cls", "cls 1537 1 b.cls", "cls 2560 1 c.cls"],  # not at a block
        ["cls 512 1 a.cls", "cls 2560 1 c.cls", "cls 1536 1 b.cls"],  # samples out of order
        ["cls 512 1 a.cls txt 1536 1 a.txt", "cls 1536 1 b.cls", "cls 2560 1 c.cls"],  # members twice
        ["cls 512 1 a.cls", "cls 2560 1 c.cls"],  # one left out
    ],
)
def test_a_sidecar_that_no_tar_can_have_is_not_trusted(tmp_path: Path, rows: list[str]) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.cls", b"1"), ("b.cls", b"2"), ("c.cls", b"3")])
    sidecar_path(path).write_text("\n".join([f"v1.2 {len(rows)}", *rows]) + "\n")
    assert fitting_sidecar(path)[0] is None
    assert load_table(path).keys == ["a", "b", "c"]


def test_dalis_sidecar_of_a_tar_with_other_members_serves(tmp_path: Path) -> None:
    names = [".hidden", "__info__", "a.cls", "sub/._a.cls", "readme", "b.cls", ".DS_Store"]
    path = write_tar(tmp_path / "a.tar", [(name, b"1") for name in names])
    sidecar_path(path).write_text("v1.2 2\ncls 2560 1 a.cls\ncls 5632 1 b.cls\n")
    assert fitting_sidecar(path)[0] is not None, fitting_sidecar(path)[1]


def test_checking_a_sidecar_takes_a_few_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_plain(tmp_path / "a.tar", 500)
    write_sidecar_file(path, build_table(path))
    reads: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: reads.append(size) or pread(fd, size, offset))
    assert fitting_sidecar(path)[0] is not None
    assert len(reads) <= 4
    assert sum(reads) < 32 * 1024


def test_a_sidecar_that_cannot_be_read_is_not_trusted(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "a.tar", 3)
    sidecar_path(path).mkdir()  # root may read any file
    assert describe_shard(path, write_sidecar=False).num_samples == 3
    assert len(load_table(path)) == 3


def test_a_stale_sidecar_is_not_trusted_and_is_replaced(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "a.tar", 3)
    write_sidecar_file(path, build_table(path))
    write_plain(tmp_path / "a.tar", 5)
    set_time(path, 0)
    set_time(sidecar_path(path), -1)
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


def test_a_sidecar_that_passes_over_links_or_a_second_archive_is_not_trusted(tmp_path: Path) -> None:
    path = str(tmp_path / "a.tar")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind in (("a.cls", b"0"), ("b.cls", b"1"), ("c.cls", b"0"), ("d.cls", b"0"), ("e.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "a.cls" if kind == b"1" else "", int(kind == b"0")
            tar.addfile(info, io.BytesIO(b"1"))
    sidecar_path(path).write_text(
        "v1.2 4\n" + "".join(f"cls {at} 1 {key}.cls\n" for key, at in zip("acde", (512, 2048, 3072, 4096), strict=True))
    )
    table, wrong = fitting_sidecar(path)
    assert table is None
    assert "the shard has 'b.cls' at byte 512" in wrong
    assert load_table(path).keys == list("abcde")
    index_shards([path])  # DALI's form has no place for a link
    assert sidecar_path(path).exists(), "a file of another tool was removed"
    index = ShardIndex.open(path)
    assert (len(index), index.table(0).keys) == (5, list("abcde"))

    first, second = write_plain(tmp_path / "1.tar", 3), write_plain(tmp_path / "2.tar", 2, first=3)
    write_sidecar_file(first, build_table(first))
    both = str(tmp_path / "both.tar")
    Path(both).write_bytes(Path(first).read_bytes() + Path(second).read_bytes())
    sidecar_path(both).write_text(sidecar_path(first).read_text())
    assert "it does not list '0003.cls'" in fitting_sidecar(both)[1]
    assert load_table(both).keys == [f"{n:04}" for n in range(5)]
    write_sidecar_file(both, build_table(both))
    assert fitting_sidecar(both)[0] is not None, fitting_sidecar(both)[1]
