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

from disttrain.data.index.tar import LocalFile, Member, Unread, scan_source
from disttrain.data.index.tar_header import BLOCK
from disttrain.errors import ShardError
from tests.support.tars import scan_members

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
        (b"\x1f\x8b" + b"\x08" * 2000, "not a tar file (decompress it first if it is compressed)"),
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
    with pytest.raises(ShardError, match="decompress it first"):
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


def header(name: bytes, content: bytes = b"", **fields: bytes) -> bytes:
    """A ustar header and its content; ``fields`` are written over the header's, by their offset."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[124:136] = b"%011o\0" % len(content)
    block[156:157], block[257:265] = b"0", b"ustar\x0000"
    for place, value in fields.items():
        offset = int(place.removeprefix("at"))
        block[offset : offset + len(value)] = value
    return with_checksum(bytes(block)) + content + bytes(-len(content) % BLOCK)


END = bytes(2 * BLOCK)


def scanned(path: Path, data: bytes) -> tuple[list[tuple[str, bytes]], list[Unread]]:
    """Names and contents of what is read, and what is not."""
    path.write_bytes(data)
    unread: list[Unread] = []
    with LocalFile(str(path)) as file:
        members = list(scan_source(file, unread=unread.append))
    return [(m.name, data[m.offset : m.offset + m.size]) for m in members], unread


def test_a_hard_link_has_the_contents_that_it_names(tmp_path: Path) -> None:
    longest = b"d/" * 60 + b"x.cls"
    pax = b"%d linkpath=" % (len(longest) + 14) + longest + b"\n"
    data = (
        header(b"a.cls", b"one")
        + header(b"b.cls", at156=b"1", at157=b"a.cls")
        + header(b"c.cls", at156=b"1", at157=b"b.cls", at124=b"00000000003\0")  # a size without contents
        + header(b"l", longest + b"\0", at156=b"L")
        + header(b"-", b"two")
        + header(b"x", pax, at156=b"x")
        + header(b"d.cls", at156=b"1", at157=b"cut off")
        + header(b"e.cls", b"three", at156=b"1", at157=b"a.cls")  # POSIX: a link with contents of its own
    )
    expected = [("a.cls", b"one"), ("b.cls", b"one"), ("c.cls", b"one"), (longest.decode(), b"two"), ("d.cls", b"two")]
    assert scanned(tmp_path / "a.tar", data + END) == ([*expected, ("e.cls", b"three")], [])
    with LocalFile(str(tmp_path / "a.tar")) as file:  # from the middle on, as a sidecar is checked
        assert [member.name for member in scan_source(file, start=2 * BLOCK)][:2] == ["b.cls", "c.cls"]


def test_a_hard_link_to_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"'b\.cls' is a hard link to 'a\.cls', which does not come before it"):
        scanned(tmp_path / "a.tar", header(b"b.cls", at156=b"1", at157=b"a.cls") + header(b"a.cls", b"1") + END)


def test_what_is_not_read_is_reported(tmp_path: Path) -> None:
    kinds = [(b"2", "a symbolic link to 'a.cls'"), (b"3", "a character device"), (b"6", "a pipe")]
    kinds += [(b"M", "a file continued from another volume"), (b"\xff", "a member of type 'ÿ'")]
    links = b"".join(header(b"%d.cls" % n, at156=kind, at157=b"a.cls") for n, (kind, _) in enumerate(kinds))
    through = header(b"h.cls", at156=b"1", at157=b"0.cls")  # a hard link to the symbolic one
    read, unread = scanned(
        tmp_path / "a.tar", header(b"a.cls", b"1") + header(b"d", at156=b"5") + links + through + END
    )
    assert read == [("a.cls", b"1")]
    assert [(member.name, member.kind) for member in unread] == [
        *((f"{n}.cls", words) for n, (_, words) in enumerate(kinds)),
        ("h.cls", "a hard link to '0.cls'"),
    ]
    assert unread[0].offset == 3 * BLOCK


@pytest.mark.parametrize("gap", [1, 2, 20, 300])
def test_archives_one_after_the_other_are_all_read(tmp_path: Path, gap: int) -> None:
    globals_ = header(b"g", b"16 path=all.cls\n", at156=b"g")
    data = globals_ + header(b"a", b"1") + bytes(gap * BLOCK) + header(b"b.cls", b"2") + END
    assert scanned(tmp_path / "a.tar", data)[0] == [("all.cls", b"1"), ("b.cls", b"2")], "the second has no global name"


@pytest.mark.parametrize("rest", [b"x", b"junk" * 200, bytes(3 * BLOCK + 7) + b"x" * 600])
def test_bytes_after_the_end_block_are_named(tmp_path: Path, rest: bytes) -> None:
    whole = header(b"a.cls", b"1") + END
    assert scanned(tmp_path / "a.tar", whole + bytes(100_001))[0] == [("a.cls", b"1")], "zeros are padding"
    with pytest.raises(ShardError, match=r"at byte (2048|3584): \d+ bytes after the end block are not a tar"):
        scanned(tmp_path / "a.tar", whole + rest)


def test_prefixes_by_magic_and_version(tmp_path: Path) -> None:
    for magic in (b"ustar\x0000", b"ustar\0\0\0", b"ustar\x0001", b"ustar 00"):
        read, _ = scanned(tmp_path / "a.tar", header(b"a.txt", b"1", at257=magic, at345=b"deep/folder") + END)
        assert read == [("deep/folder/a.txt", b"1")], magic
    for magic in (b"ustar  \0", bytes(8)):  # GNU has times there, version 7 nothing
        read, _ = scanned(tmp_path / "a.tar", header(b"a.txt", b"1", at257=magic, at345=b"14000000000") + END)
        assert read == [("a.txt", b"1")], magic


def test_signed_checksums(tmp_path: Path) -> None:
    data = bytearray(header("café.txt".encode("latin-1"), b"1"))
    data[148:156] = b"%06o\0 " % (int(data[148:154], 8) - 256)
    read, _ = scanned(tmp_path / "a.tar", bytes(data) + END)
    assert read == [("caf\udce9.txt", b"1")]
    for wrong in (b"-00001\0 ", b"0o1234\0 ", b"1_0000\0 ", b"        "):
        data[148:156] = wrong
        with pytest.raises(ShardError, match="not a tar file"):
            scanned(tmp_path / "a.tar", bytes(data) + END)


def test_extended_headers_are_read_in_linear_time(tmp_path: Path) -> None:
    records = b"".join(b"%d k%06d=v\n" % (13, n) for n in range(100_000))  # 1.3 MiB: hours if it were quadratic
    read, _ = scanned(
        tmp_path / "a.tar", header(b"x", records + b"14 path=a.txt\n", at156=b"x") + header(b"b", b"1") + END
    )
    assert read == [("a.txt", b"1")]
    for kind in (b"x", b"L"):
        with pytest.raises(ShardError, match=r"a header of 4194305 bytes; at most 4194304 are read"):
            scanned(tmp_path / "a.tar", header(b"x", bytes(4 * 2**20 + 1), at156=kind) + header(b"b", b"1") + END)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (b"9" * 5000 + b" path=a\n", "a damaged PAX header"),
        (b"-9 path=a\n", "a damaged PAX header"),
        (b"99 path=a\n", "a damaged PAX header"),
        (b"9 path=abc\n", "a damaged PAX header"),
        (b"0 =\n", "a damaged PAX header"),
        (b"5000 size=" + b"7" * 4989 + b"\n", "in a PAX header is not a number"),
        (b"11 size=-5\n", "in a PAX header is not a number"),
        ("13 size=٣٣\n".encode(), "in a PAX header is not a number"),
        (b"28 size=9999999999999999999\n", "is cut off"),
        (b"12 path=a\0b\n", "has a NUL byte in its name"),
    ],
)
def test_pax_records_that_are_none(tmp_path: Path, records: bytes, words: str) -> None:
    with pytest.raises(ShardError, match=words):
        scanned(tmp_path / "a.tar", header(b"x", records, at156=b"x") + header(b"b", b"1") + END)


def test_a_size_in_base_256_that_is_negative(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="is negative"):
        scanned(tmp_path / "a.tar", header(b"a.txt", at124=b"\xff" * 12) + END)


def test_a_pax_size_is_the_members_not_that_of_a_header_between(tmp_path: Path) -> None:
    data = header(b"x", b"9 size=3\n", at156=b"x") + header(b"l", b"name.txt\0", at156=b"L") + header(b"b", b"123")
    assert scanned(tmp_path / "a.tar", data + END)[0] == [("name.txt", b"123")]
