"""Fields: defaults of samples that lack them, compressed values, values without elements, and what is refused."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from disttrain.data.decode import external, fields as decoding
from disttrain.data.decode.field import Field
from disttrain.data.decode.fields import BadValuesError, RawValues, decode
from disttrain.data.decode.images import RandomResizedCrop
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.loader.batches import BatchMaker
from disttrain.data.loader.transforms import HooksConfig, pad_tensors
from disttrain.data.reader.sample_reader import Reader
from disttrain.data.verify.decode_check import Decoders
from disttrain.errors import ConfigError, DataError
from tests.support.shards import npy, write_shard


def raw(*values: bytes) -> RawValues:
    return RawValues([memoryview(value) for value in values])


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


# Defaults.


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        (Field("f.cls", default=-1), b"3", [3, -1, 3, -1]),
        (Field("f.txt", default=""), b"words", ["words", "", "words", ""]),
        (Field("f.json", default={"boxes": []}), b"[1]", [[1], {"boxes": []}, [1], {"boxes": []}]),
        (Field("f.npy", dtype="float32", default=0.5), npy(np.float32(2)), [2.0, 0.5, 2.0, 0.5]),
        (Field("f.npy", dtype="int64", shape=(2,), default=7), npy(np.arange(2)), [[0, 1], [7, 7], [0, 1], [7, 7]]),
        (Field("f.bin", decoder="tensor", dtype="uint8", shape=(0,), default=1), b"", [[], [], [], []]),
        (Field("f.txt.gz", default="-"), gzip.compress(b"packed", mtime=0), ["packed", "-", "packed", "-"]),
    ],
)
def test_a_sample_without_an_optional_field_gets_its_default(
    tmp_path: Path, field: Field, value: bytes, expected: list[Any]
) -> None:
    extension = field.alternatives[0]
    samples = [
        {"__key__": f"s{n}", "cls": str(n).encode()} | ({extension: value} if n % 2 == 0 else {}) for n in range(4)
    ]
    reader = Reader(ShardIndex.open(write_shard(tmp_path / "a.tar", samples)), {"n": Field("cls"), "f": field})
    found = reader.samples(np.arange(4))
    assert (plain(found.fields["f"]), found.bad) == (expected, {})
    assert plain(found.fields["n"]) == [0, 1, 2, 3]
    assert isinstance(found.fields["f"], Tensor) == isinstance(reader.read(np.array([0, 2]))["f"], Tensor)
    assert plain(reader.read(np.array([3, 1]))["f"]) == [expected[1]] * 2
    (batch,) = BatchMaker(reader).make(np.array([[3, 2]]))
    assert plain(batch["f"]) == [expected[1], expected[0]]


def test_what_is_not_optional_is_still_bad_beside_it(tmp_path: Path) -> None:
    samples = [
        {"__key__": "s0", "cls": b"0", "a.txt": b"a"},
        {"__key__": "s1", "a.txt": b"b"},
        {"__key__": "s2", "cls": b"2"},
        {"__key__": "s3", "cls": b"none"},
    ]
    reader = Reader(
        ShardIndex.open(write_shard(tmp_path / "a.tar", samples)), {"n": Field("cls"), "a": Field("a.txt", default="-")}
    )
    with pytest.raises(DataError, match="sample 's1' has no field 'n'"):
        reader.read(np.arange(3))
    found = reader.samples(np.arange(4), mark_bad=True)
    assert sorted(found.bad) == [1, 3]
    assert found.fields["a"] == ["a", "-", "-", "a"]


def test_a_default_everywhere_in_the_first_shard_is_warned_of(tmp_path: Path) -> None:
    index = ShardIndex.open(write_shard(tmp_path / "a.tar", [{"__key__": "a", "cls": b"1"}]))
    with pytest.warns(UserWarning, match=r"field 'c' \(extension 'captoin.txt'\) does not occur in the first shard"):
        reader = Reader(index, {"c": Field("captoin.txt", default="")})
    assert reader.read(np.array([0])) == {"c": [""]}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ext": "cls", "default": 1.5}, "default is 1.5"),
        ({"ext": "cls", "default": True}, "default is True"),
        ({"ext": "cls", "default": 2**63}, "does not fit int64"),
        ({"ext": "txt", "default": 0}, "default is 0"),
        ({"ext": "x.npy", "default": 0}, "a default but no dtype"),
        ({"ext": "x.npy", "dtype": "uint8", "default": 300}, "does not fit uint8"),
        ({"ext": "x.npy", "dtype": "int32", "default": 0.5}, "does not fit int32"),
        ({"ext": "x.npy", "dtype": "float32", "default": 0, "pad": 0}, "default cannot be combined with pad"),
        ({"ext": "png", "default": 0}, "a default but no shape"),
        ({"ext": "png", "shape": (3, 2, 2), "default": 256}, "does not fit uint8"),
        ({"ext": "bin", "default": ""}, "cannot be combined with the decoder 'bytes'"),
        ({"ext": "pth", "default": 0}, "cannot be combined with the decoder 'torch'"),
    ],
)
def test_a_default_that_does_not_fit_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Field(**settings)


# gzip.


def test_compressed_values_decode_by_the_extension_before() -> None:
    arrays = [np.arange(6, dtype=np.int16).reshape(2, 3) + n for n in range(3)]
    packed = [gzip.compress(npy(array)) for array in arrays]
    assert torch.equal(torch.as_tensor(decode(Field("x.npy.gz"), raw(*packed))), torch.from_numpy(np.stack(arrays)))
    assert decode(Field("a.json.gz"), raw(gzip.compress(b"[1]") + gzip.compress(b"") + b"\0\0")) == [[1]]
    assert decode(Field("a.gz", decoder="txt"), raw(gzip.compress(b"a") + gzip.compress(b"b"))) == ["ab"]
    assert decode(Field("cls.gz"), raw(gzip.compress(b"7"))).tolist() == [7]  # type: ignore[union-attr]
    assert decode(Field("a.nii.gz", decoder="bytes"), raw(packed[0])) == [packed[0]], "bytes are not as they are"
    verifying = Decoders()
    assert verifying.wants("x.npy.gz")
    assert verifying.faults("x.npy.gz", packed) == {}
    assert "not an npy array" in verifying.faults("x.npy.gz", [gzip.compress(b"no")])[0]
    for wrong in ("npy;npy.gz", "x.gz", "x.nii.gz"):
        with pytest.raises(ConfigError):
            Field(wrong)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"plain", "decompression failed"),
        (b"", "truncated"),
        (gzip.compress(b"12", mtime=0)[:-4], "truncated"),
        (gzip.compress(b"12", mtime=0) + b"trailing", "decompression failed"),
        (gzip.compress(bytes(5000), mtime=0), "more than 1,000 bytes when decompressed"),
        (gzip.compress(bytes(600), mtime=0) * 2, "more than 1,000 bytes"),
    ],
)
def test_compressed_values_are_bounded_and_whole(value: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_EXPANDED", 1000)
    with pytest.raises(BadValuesError) as caught:
        decode(Field("txt.gz"), raw(gzip.compress(b"fine"), value))
    assert list(caught.value.faults) == [1]
    assert words in caught.value.faults[1]


def test_other_decoders_do_not_expand_without_bound_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "MAX_EXPANDED", 10_000)
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.zeros(5000))
    bombs = [(Field("a.npz", decoder="webdataset:npz"), stream.getvalue())]
    saved = io.BytesIO()
    torch.save(torch.zeros(1).expand(10**12), saved)
    bombs.append((Field("pth"), saved.getvalue()))
    with zipfile.ZipFile(io.BytesIO(saved.getvalue())) as plain_zip, io.BytesIO() as squeezed:
        with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as out:
            for name in plain_zip.namelist():
                out.writestr(name, plain_zip.read(name) if "data/0" not in name else bytes(20_000))
        bombs.append((Field("pth"), squeezed.getvalue()))
    for field, bomb in bombs:
        with pytest.raises(BadValuesError, match=r"decompressed|the size of its file"):
            decode(field, raw(bomb))
    header = (
        b"\x93NUMPY\x01\x00\x46\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}"
    )
    for size in (0, 4):
        with pytest.raises(BadValuesError, match="npy array"):
            decode(Field("npy"), RawValues(pieces=(np.frombuffer(header + bytes(size), np.uint8), *one(header, size))))


def one(header: bytes, size: int) -> tuple[Any, Any]:
    return np.array([0]), np.array([len(header) + size])


# Nothing in it.


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (0, 0), (2, 0, 3)])
@pytest.mark.parametrize("hooks", [HooksConfig(), HooksConfig(lambda sample, random: sample)])
def test_arrays_without_elements_are_read_stacked_and_padded(
    tmp_path: Path, shape: tuple[int, ...], hooks: HooksConfig
) -> None:
    stream = io.BytesIO()
    np.savez(stream, x=np.empty(shape, np.float32))
    saved = io.BytesIO()
    torch.save(torch.empty(shape), saved)
    content = {
        "x.npy": npy(np.empty(shape, np.float32)),
        "r.bin": b"",
        "z.npz": stream.getvalue(),
        "t.pth": saved.getvalue(),
    }
    samples = [{"__key__": f"s{n}", **content} for n in range(6)]
    fields = {
        "x": Field("x.npy"),
        "r": Field("r.bin", decoder="tensor", dtype="float32", shape=shape),
        "z": Field("z.npz", decoder="webdataset:npz"),
        "t": Field("t.pth"),
        "p": Field("x.npy", pad=1.0),
    }
    reader = Reader(ShardIndex.open(write_shard(tmp_path / "a.tar", samples)), fields)
    batches = BatchMaker(reader, hooks).make(np.arange(6).reshape(2, 3))
    assert len(batches) == 2
    for batch in batches:
        for name in ("x", "r", "t", "p"):
            assert batch[name].shape == (3, *shape), name
        assert [value["x"].shape for value in batch["z"]] == [shape] * 3
        assert batch["p_lengths"].tolist() == [shape[0]] * 3
    assert [len(values) for values in reader.read(np.empty(0, np.int64)).values()] == [0] * 5
    with pytest.raises(BadValuesError, match="4 bytes, but float32 of shape"):
        decode(fields["r"], raw(b"", bytes(4)))


def test_some_of_the_arrays_may_be_empty(tmp_path: Path) -> None:
    lengths = [0, 3, 0, 0]
    samples = [{"__key__": f"s{n}", "x.npy": npy(np.ones((length, 4), np.float32))} for n, length in enumerate(lengths)]
    reader = Reader(
        ShardIndex.open(write_shard(tmp_path / "a.tar", samples)), {"x": Field("x.npy"), "p": Field("x.npy", pad=0)}
    )
    first, second = BatchMaker(reader).make(np.array([[0, 1], [2, 3]]))
    assert [value.shape for value in first["x"]] == [(0, 4), (3, 4)]
    assert first["p"].shape == (2, 3, 4)
    assert second["x"].shape == second["p"].shape == (2, 0, 4)
    padded, counts = pad_tensors("x", [torch.empty(0, 0)] * 2, 0)
    assert (padded.shape, counts.tolist()) == ((2, 0, 0), [0, 0])


def test_settings_of_images_without_effect_are_refused() -> None:
    for settings in (
        {"ext": "cls", "mode": "gray"},
        {"ext": "x.npy", "orient": True},
        {"ext": "x.npy", "max_pixels": 5},
        {"ext": "png", "classes": 3},
        {"ext": "png", "mode": "grey"},
        {"ext": "png", "mode": "mask", "shape": (3, 4, 4)},
        {"ext": "png", "mode": "rgb", "shape": (1, 4, 4)},
        {"ext": "png", "mode": "gray", "backend": "simplejpeg"},
        {"ext": "png", "max_pixels": 0},
        {"ext": "png", "mode": "mask", "augment": RandomResizedCrop()},
    ):
        with pytest.raises(ConfigError, match=settings["ext"]):
            Field(**settings)  # type: ignore[arg-type]
