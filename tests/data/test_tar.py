"""The tar scanner: every format that tools write is read as Python's tarfile reads it, every damage is named."""

from __future__ import annotations

import contextlib
import io
import os
import random
import tarfile
from pathlib import Path
from typing import Literal

import pytest

from disttrain.data.tar import BLOCK, Member, scan_members
from disttrain.errors import ShardError

FORMATS: dict[str, Literal[0, 1, 2]] = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def reference(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        return [Member(info.name, info.offset_data, info.size) for info in tar if info.isreg()]


def with_checksum(header: bytes) -> bytes:
    total = sum(header) - sum(header[148:156]) + 8 * 0x20
    return header[:148] + b"%06o\0 " % total + header[156:]


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_members_are_those_that_tarfile_finds(tmp_path: Path, format: int) -> None:
    contents = [b"", b"x", b"y" * 511, b"z" * 512, b"w" * 513, b"v" * 200_000]
    path = write_tar(tmp_path / "a.tar", [(f"dir/{i:03}.bin", content) for i, content in enumerate(contents)], format)
    found = list(scan_members(str(path)))
    assert found == reference(path), f"format {format}: other members than tarfile's"
    data = path.read_bytes()
    read = [data[member.offset : member.offset + member.size] for member in found]
    assert read == contents, "the offsets do not lead to the contents"


@pytest.mark.parametrize(
    ("format", "name"),
    [
        (tarfile.USTAR_FORMAT, "d" * 120 + "/" + "n" * 90 + ".jpg"),  # the prefix field
        (tarfile.GNU_FORMAT, "d" * 300 + "/" + "n" * 200 + ".jpg"),  # a long name member
        (tarfile.GNU_FORMAT, "größe/ключ.jpg"),
        (tarfile.PAX_FORMAT, "d" * 300 + "/" + "n" * 200 + ".jpg"),
        (tarfile.PAX_FORMAT, "größe/ключ.jpg"),
        (tarfile.PAX_FORMAT, "a/" * 40_000 + "x.jpg"),  # a header larger than the read window
    ],
)
def test_long_and_foreign_names(tmp_path: Path, format: int, name: str) -> None:
    path = write_tar(tmp_path / "a.tar", [("first.txt", b"1"), (name, b"22"), ("last.txt", b"333")], format)
    assert [(m.name, m.size) for m in scan_members(str(path))] == [("first.txt", 1), (name, 2), ("last.txt", 3)]


def test_pax_global_headers_and_times_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by a test"}) as tar:
        info = tarfile.TarInfo("a.txt")
        info.size, info.mtime = 3, 1.25  # a fractional time gets a PAX header of its own
        tar.addfile(info, io.BytesIO(b"abc"))
    assert list(scan_members(str(path))) == reference(path)


def test_what_is_no_regular_file_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind, size in [
            ("folder", tarfile.DIRTYPE, 0),
            ("link", tarfile.SYMTYPE, 0),
            ("hard", tarfile.LNKTYPE, 4096),  # some writers give the target's size, but no content follows
            ("pipe", tarfile.FIFOTYPE, 0),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "elsewhere", size
            tar.addfile(info)
        info = tarfile.TarInfo("file.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"ok"))
    assert [member.name for member in scan_members(str(path))] == ["file.txt"]
    assert list(scan_members(str(path))) == reference(path)


def test_base_256_size(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.bin", b"q" * 700), ("b.bin", b"r")])
    data = path.read_bytes()
    path.write_bytes(with_checksum(data[:124] + b"\x80" + (700).to_bytes(11, "big") + data[136:BLOCK]) + data[BLOCK:])
    assert [(member.name, member.size) for member in scan_members(str(path))] == [("a.bin", 700), ("b.bin", 1)]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["base 256", "pax size"])
def test_a_member_of_more_than_eight_gibibytes(tmp_path: Path, format: Literal[1, 2]) -> None:
    size = 9 * 2**30 + 5
    info = tarfile.TarInfo("big.bin")
    info.size = size
    header = info.tobuf(format)
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:  # a sparse file: takes no room on the disk
        file.write(header)
        file.truncate(len(header) + -(-size // BLOCK) * BLOCK + 2 * BLOCK)
    assert list(scan_members(str(path))) == [Member("big.bin", len(header), size)]


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_truncation_at_every_kind_of_place(tmp_path: Path, format: int) -> None:
    name = "d" * 90 + "/" + "n" * 80 + ".jpg"
    whole = write_tar(tmp_path / "whole.tar", [("a.jpg", b"1" * 900), (name, b"2" * 100)], format)
    data = whole.read_bytes()
    last = reference(whole)[-1]
    end = last.offset + -(-last.size // BLOCK) * BLOCK
    cut = tmp_path / "cut.tar"
    for length in sorted({*range(0, end + BLOCK, 128), *range(1, end + BLOCK, 509), end, end + 1, end + BLOCK - 1}):
        cut.write_bytes(data[:length])
        with pytest.raises(ShardError) as caught:
            list(scan_members(str(cut)))
        assert f"shard {cut} at byte " in caught.value.what, f"cut at {length}: {caught.value}"
        assert length < BLOCK or f"the file ends at byte {length}" in caught.value.what, (
            f"cut at {length}: {caught.value}"
        )
    cut.write_bytes(data[: end + BLOCK])  # one end block is enough
    assert len(list(scan_members(str(cut)))) == 2


def test_missing_end_block_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"abc")])
    os.truncate(path, 2 * BLOCK)
    with pytest.raises(ShardError, match="at byte 1024: the end block is missing"):
        list(scan_members(str(path)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"too short", "not a tar file"),
        (b"\x1f\x8b" + b"\x08" * 2000, "not a tar file (a compressed one must be unpacked)"),
        (b"plain text " * 100, "not a tar file"),
    ],
    ids=["empty", "short", "gz", "text"],
)
def test_what_is_no_tar(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(ShardError) as caught:
        list(scan_members(str(path)))
    assert words in caught.value.what


def test_a_real_gz_file_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        for number in range(50):
            info = tarfile.TarInfo(f"{number}.bin")
            content = random.Random(number).randbytes(100)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ShardError, match="compressed one must be unpacked"):
        list(scan_members(str(tmp_path / "a.tar")))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"cannot open shard .*none\.tar: No such file"):
        list(scan_members(str(tmp_path / "none.tar")))


def test_damaged_header_in_the_middle_has_its_offset(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"abc"), ("b.txt", b"def")])
    data = bytearray(path.read_bytes())
    data[2 * BLOCK + 5] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ShardError, match="at byte 1024: a damaged header"):
        list(scan_members(str(path)))


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"abc")])
    data = path.read_bytes()
    path.write_bytes(with_checksum(data[:156] + b"S" + data[157:BLOCK]) + data[BLOCK:])
    with pytest.raises(ShardError, match="sparse"):
        list(scan_members(str(path)))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:  # the PAX way to say it
        info = tarfile.TarInfo("GNUSparseFile.0/a.txt")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        tar.addfile(info)
    with pytest.raises(ShardError, match="sparse"):
        list(scan_members(str(path)))


@pytest.mark.parametrize("size", [b"-0000000777\0", b"0o000000777\0", b"9" * 11 + b"\0"])
def test_a_size_that_is_no_number(tmp_path: Path, size: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"abc")])
    data = path.read_bytes()
    path.write_bytes(with_checksum(data[:124] + size + data[136:BLOCK]) + data[BLOCK:])
    with pytest.raises(ShardError, match="is not a number"):
        list(scan_members(str(path)))


def test_damage_raises_nothing_but_shard_errors(tmp_path: Path) -> None:
    members = [("a.txt", b"abc"), ("größe/" + "n" * 150, b"2" * 600), ("c.txt", b"")]
    data = write_tar(tmp_path / "whole.tar", members).read_bytes()
    draw = random.Random(0)
    path = tmp_path / "damaged.tar"
    for _ in range(400):
        block = draw.randrange(0, 10) * BLOCK
        header = bytearray(data[block : block + BLOCK])
        for _ in range(draw.randrange(1, 4)):
            header[draw.randrange(BLOCK)] = draw.randrange(256)
        path.write_bytes(data[:block] + with_checksum(bytes(header)) + data[block + BLOCK :])
        with contextlib.suppress(ShardError):
            for member in scan_members(str(path)):
                assert member.offset + member.size <= len(data), f"{member} lies outside the file"
