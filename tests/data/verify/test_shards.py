"""Verification: each kind of fault is named with its place, in local and remote shards, and sound data has none."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from disttrain.data.index.build import md5_of
from disttrain.data.index.shard_index import Shard
from disttrain.data.index.sidecar import build_table, sidecar_path, write_sidecar_file
from disttrain.data.verify.decode_check import Decoders
from disttrain.data.verify.shards import first_fields, shard_faults
from disttrain.errors import ConfigError
from tests.support.servers import RangeServer, range_server
from tests.support.shards import npy
from tests.support.tars import write_tar

Members = list[tuple[str, bytes]]
Found = Callable[..., list[str]]

SOUND: Members = [(f"{n}.{ext}", value) for n in range(4) for ext, value in (("cls", b"1"), ("x.npy", npy([n, 2])))]
FIELDS = ("cls", "x.npy")


def replaced(name: str, content: bytes) -> Members:
    return [(there, content if there == name else value) for there, value in SOUND]


@pytest.fixture
def server(tmp_path: Path, cache_home: Path) -> Iterator[RangeServer]:
    with range_server(tmp_path) as running:
        yield running


@pytest.fixture(params=["local", "remote"])
def found(request: pytest.FixtureRequest, tmp_path: Path, server: RangeServer) -> Found:
    """The faults of a shard in the test's folder, by its path and by its URL, each without that place."""

    def call(recorded: Shard | None = None, *, fields: tuple[str, ...] = FIELDS, decode: bool = True) -> list[str]:
        place = str(tmp_path) if request.param == "local" else server.url
        shard = replace(recorded or Shard("", -1, -1), path=f"{place}/a.tar")
        faults, _ = shard_faults(shard, fields=fields, decoding=Decoders() if decode else None)
        return [fault.replace(place, "PLACE") for fault in faults]

    return call


def test_a_sound_shard_has_no_faults(tmp_path: Path, found: Found) -> None:
    path = Path(write_tar(tmp_path / "a.tar", SOUND))
    assert found() == []
    assert found(decode=False) == []
    write_sidecar_file(str(path), build_table(str(path)))
    assert found(Shard("", 4, path.stat().st_size, md5=md5_of(str(path)))) == []


def test_damage(tmp_path: Path, found: Found) -> None:
    path = Path(write_tar(tmp_path / "a.tar", SOUND))
    os.truncate(path, 10 * 512 + 100)
    assert found() == ["shard PLACE/a.tar at byte 5120: a header is cut off; the file ends at byte 5220"]
    os.truncate(path, 8 * 512)
    assert found() == ["shard PLACE/a.tar at byte 4096: the end block is missing; the file ends at byte 4096"]
    os.truncate(path, 3 * 512 + 7)
    assert found() == [
        "shard PLACE/a.tar at byte 1024: member '0.x.npy' of 144 bytes is cut off; the file ends at byte 1543"
    ]
    path.write_bytes(b"\x1f\x8b" * 600)
    assert found() == ["shard PLACE/a.tar at byte 0: not a tar file (decompress it first if it is compressed)"]
    path.write_bytes(b"")
    assert found() == ["shard PLACE/a.tar at byte 0: the file is empty"]


def test_keys_and_fields(tmp_path: Path, found: Found) -> None:
    write_tar(tmp_path / "a.tar", [*SOUND[:3], ("0.cls", b"1"), ("2.cls", b"1"), ("2.cls", b"1"), ("2.x.npy", npy(1))])
    assert found() == [
        "shard PLACE/a.tar at byte 3584: sample '0' occurs twice, with other samples in between",
        "shard PLACE/a.tar at byte 5632: sample '2' has field 'cls' twice",
        "shard PLACE/a.tar at byte 2560: sample '1' lacks field 'x.npy', has cls",
    ]
    assert found(fields=("x.np",))[-1] == "shard PLACE/a.tar: no sample has field 'x.np'; did you mean 'x.npy'?"
    assert found(fields=("cls", "x.npy;cls"))[2:] == []


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("2.cls", b"cat", "not a class number: b'cat'"),
        ("2.x.npy", npy([1, 2])[:-3], "a damaged npy array"),
        ("2.x.npy", b"text", "not an npy array"),
        (
            "2.x.npy",
            npy([1, 2]).replace(b"(2,), }" + b" " * 14, b"(True, True, True), }"),
            "an npy array of shape (True, True, True)",
        ),
    ],
)
def test_what_does_not_decode(tmp_path: Path, found: Found, name: str, content: bytes, reason: str) -> None:
    write_tar(tmp_path / "a.tar", replaced(name, content))
    offset = 4608 if name == "2.cls" else 5632
    [fault] = found()
    assert fault.startswith(f"shard PLACE/a.tar at byte {offset}: sample '2', field '{name[2:]}': {reason}")
    assert found(decode=False) == []


def test_every_value_that_does_not_decode_is_named(tmp_path: Path) -> None:
    members = [(f"{n:04}.cls", b"x" if n % 3 == 0 else b"1") for n in range(1000)]  # more than are decoded at once
    path = write_tar(tmp_path / "a.tar", members)
    faults, samples = shard_faults(Shard(path, -1, -1), fields=(), decoding=Decoders())
    assert samples == 1000
    assert [fault.split("'")[1] for fault in faults] == [f"{n:04}" for n in range(0, 1000, 3)]


def test_what_a_manifest_records(tmp_path: Path, found: Found) -> None:
    path = Path(write_tar(tmp_path / "a.tar", SOUND))
    size, md5 = path.stat().st_size, md5_of(str(path))
    assert found(Shard("", 5, size)) == ["shard PLACE/a.tar holds 4 samples, but its manifest says 5"]
    assert found(Shard("", 4, 7, md5=md5)) == [f"shard PLACE/a.tar has {size} bytes, but its manifest says 7"]
    assert found(Shard("", 4, size, md5="0" * 32), decode=False) == [
        f"shard PLACE/a.tar has MD5 {md5}, but its manifest says {'0' * 32}"
    ]
    os.truncate(path, 3 * 512 + 7)  # the rest is hashed in spite of the damage
    assert found(Shard("", 4, -1, md5=md5))[-1].startswith(f"shard PLACE/a.tar has MD5 {md5_of(str(path))}, but")


def test_a_sidecar_that_does_not_fit(tmp_path: Path, found: Found) -> None:
    path = write_tar(tmp_path / "a.tar", SOUND)
    write_sidecar_file(path, build_table(path))
    sidecar = sidecar_path(path)
    text = sidecar.read_text()
    sidecar.write_text(text.replace("cls 2560 ", "cls 2048 "))
    assert found(decode=False) == [
        "sidecar PLACE/a.idx does not match its shard: sample '1' is cls at byte 2560 of size 1, x.npy at byte 3584 of"
        " size 144 in the shard, cls at byte 2048 of size 1, x.npy at byte 3584 of size 144 in the sidecar:"
        " run `disttrain shards index`"
    ]
    head, first, *others = text.splitlines()
    sidecar.write_text("\n".join([head, *others, first]) + "\n")
    assert found(decode=False) == [
        "sidecar PLACE/a.idx lists the samples in a different order than its shard: run `disttrain shards index`"
    ]
    sidecar.write_text("v1.2 4\ncls 512\n")
    assert found() == ["sidecar PLACE/a.idx is damaged or points outside its shard: run `disttrain shards index`"]


def test_a_shard_that_is_not_there(tmp_path: Path, server: RangeServer) -> None:
    assert shard_faults(Shard(f"{tmp_path}/a.tar", -1, -1), fields=()) == (
        [f"shard {tmp_path}/a.tar does not exist"],
        0,
    )
    [fault], _ = shard_faults(Shard(f"{server.url}/a.tar?signature=secret", -1, -1), fields=())
    assert fault.startswith(f"shard {server.url}/a.tar?...: HTTP 404")
    assert "secret" not in fault


def test_a_server_that_fails_halfway_is_named_after_what_was_found(tmp_path: Path, server: RangeServer) -> None:
    members = [("0.cls", b"cat"), ("1.bin", bytes(9 * 2**20)), ("2.cls", b"2")]
    write_tar(tmp_path / "a.tar", members)
    wanted = f"bytes={4 * 2**20}-"
    server.on_request = lambda name, range_: server.fail("a.tar", "status:403") if range_.startswith(wanted) else None
    faults, samples = shard_faults(
        Shard(f"{server.url}/a.tar", -1, -1, md5="0" * 32), fields=(), decoding=Decoders({"bin": "txt"})
    )
    assert samples == 2
    assert [fault.partition(" (1 attempt")[0] for fault in faults] == [
        f"shard {server.url}/a.tar at byte 512: sample '0', field 'cls': not a class number: b'cat'",
        f"shard {server.url}/a.tar: HTTP 403: the server refused the request",
    ]


@pytest.mark.usefixtures("without_waits")
def test_a_server_that_fails_at_the_sidecar_is_named_after_what_was_found(tmp_path: Path, server: RangeServer) -> None:
    write_tar(tmp_path / "a.tar", [("0.cls", b"1"), ("1.txt", b"1")])
    server.fail("a.idx", *["status:500"] * 9)
    faults, samples = shard_faults(Shard(f"{server.url}/a.tar", -1, -1), fields=("cls",))
    assert samples == 2
    assert [fault.partition(" (8 attempts")[0] for fault in faults] == [
        f"shard {server.url}/a.tar at byte 1536: sample '1' lacks field 'cls', has txt",
        f"sidecar {server.url}/a.idx: HTTP 500: the server refused the request",
    ]


def test_a_server_that_fails_while_the_rest_is_hashed_is_named_after_what_was_found(
    tmp_path: Path, server: RangeServer
) -> None:
    path = Path(write_tar(tmp_path / "a.tar", [("0.txt", b"1"), ("1.txt", b"2")]))
    path.write_bytes(path.read_bytes()[: 3 * 512] + b"damage" * 2 * 2**20)  # what follows is read for the MD5 alone
    wanted = f"bytes={4 * 2**20}-"
    server.on_request = lambda name, range_: server.fail("a.tar", "status:403") if range_.startswith(wanted) else None
    faults, samples = shard_faults(Shard(f"{server.url}/a.tar", 2, -1, md5="0" * 32), fields=("cls",))
    assert samples == 2
    assert [fault.partition(" (1 attempt")[0].partition(";")[0] for fault in faults] == [
        f"shard {server.url}/a.tar at byte 2048: a damaged header",
        f"shard {server.url}/a.tar: no sample has field 'cls'",
        f"shard {server.url}/a.tar: HTTP 403: the server refused the request",
    ]


def test_remote_bytes_come_once(tmp_path: Path, server: RangeServer) -> None:
    path = Path(write_tar(tmp_path / "a.tar", [(f"{n:03}.txt", b"t" * 50_000) for n in range(200)]))
    size = path.stat().st_size
    shard = Shard(f"{server.url}/a.tar", 200, size, md5=md5_of(str(path)))
    assert shard_faults(shard, fields=("txt",), decoding=Decoders()) == ([], 200)
    assert size <= server.bytes_served["a.tar"] <= size + 1
    server.bytes_served.clear()
    assert shard_faults(replace(shard, md5=""), fields=("txt",)) == ([], 200)
    assert server.bytes_served["a.tar"] < size * 1.2


def test_what_is_left_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"mp4": b"film", "pkl": b"cos\nsystem\n", "jpg": b"\xff\xd8", "bin": b"any", "cls": b"1"}
    path = write_tar(tmp_path / "a.tar", [(f"0.{ext}", value) for ext, value in values.items()])
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    decoders = Decoders()
    assert shard_faults(Shard(path, -1, -1), fields=(), decoding=decoders) == ([], 1)
    assert list(decoders.left_out) == ["mp4", "pkl", "jpg"]
    assert "has to be unpickled" in decoders.left_out["pkl"]
    assert "Pillow" in decoders.left_out["jpg"]


def test_images_are_decoded(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(stream, "png")
    members = [("0.png", stream.getvalue()), ("1.png", stream.getvalue()[:60]), ("2.png", b"no picture")]
    path = write_tar(tmp_path / "a.tar", members)
    faults, _ = shard_faults(Shard(path, -1, -1), fields=(), decoding=Decoders())
    assert [fault.partition(", field")[0] for fault in faults] == [
        f"shard {path} at byte {offset}: sample '{key}'" for offset, key in ((1536, "1"), (2560, "2"))
    ]


def test_a_decoder_may_be_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.cls", b"cat"), ("0.caption", b"\xff")])
    decoders = Decoders({"cls": "txt", "caption": "txt"})
    faults, _ = shard_faults(Shard(path, -1, -1), fields=(), decoding=decoders)
    assert [fault.partition(":")[0] for fault in faults] == [f"shard {path} at byte 1536"]
    assert decoders.left_out == {}
    with pytest.raises(ConfigError, match="no decoder named 'texf'"):
        Decoders({"cls": "texf"})


def test_the_fields_expected_are_the_first_samples(tmp_path: Path) -> None:
    (tmp_path / "broken.tar").write_bytes(b"")
    names = ["broken.tar", "a.tar"]
    write_tar(tmp_path / "a.tar", [("readme", b""), ("0.b", b""), ("0.a", b""), ("1.c", b"")])
    assert first_fields(str(tmp_path / name) for name in names) == ("b", "a")
    assert first_fields([str(tmp_path / "broken.tar"), str(tmp_path / "none.tar")]) == ()


def test_links_in_place_of_fields_are_faults(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.txt", b"1"), ("README", b"no sample")])
    with tarfile.open(path, "a") as tar:
        for number in range(8):
            info = tarfile.TarInfo(f"{number}.png" if number else "LINK")
            info.type, info.linkname = tarfile.SYMTYPE, "0.txt"
            tar.addfile(info)
    faults, samples = shard_faults(Shard(path, -1, -1), fields=("txt",))
    assert samples == 1
    assert faults[0] == f"shard {path}: '1.png' at byte 2560, a symbolic link to '0.txt', is not read"
    assert len(faults) == 6
    assert faults[5] == f"shard {path}: 2 more members are not read"
