"""Decoders: the batch path equals the single one, nothing is unpickled, and garbage is named by its place."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as npst
from jsonargparse import ArgumentParser
from numpy.typing import NDArray
from torch import Tensor

from disttrain.data.decode.fields import (
    BadValuesError,
    Decoded,
    Field,
    RandomResizedCrop,
    RawValues,
    check_safe,
    decode,
)
from disttrain.errors import ConfigError
from tests.support.shards import npy

quick = settings(derandomize=True, deadline=None, max_examples=100)
NUMBERS = ("uint8", "int16", "int32", "int64", "float16", "float32", "float64", "bool", "complex64")


def separate(values: Sequence[bytes]) -> RawValues:
    """The values as the reader gives them where their sizes differ: places in a buffer, here last one first."""
    sizes = np.array([len(value) for value in values])
    buffer = np.frombuffer(b"#".join([b"", *reversed(values), b""]), dtype=np.uint8)
    at = (1 + np.cumsum(sizes[::-1] + 1) - (sizes[::-1] + 1))[::-1]
    return RawValues(pieces=(buffer, at, sizes))


def block(values: Sequence[bytes]) -> RawValues:
    """The values as the reader gives them where all have one size: side by side in a buffer."""
    size = len(values[0])
    buffer = np.frombuffer(b"".join(values), dtype=np.uint8)
    return RawValues(pieces=(buffer, np.arange(len(values)) * size, np.full(len(values), size)))


def ways(values: Sequence[bytes]) -> list[RawValues]:
    one_size = len({len(value) for value in values}) == 1 and len(values[0]) > 0
    return [separate(values), block(values)] if one_size else [separate(values)]


def tensor_of(decoded: Decoded) -> Tensor:
    assert isinstance(decoded, Tensor), f"{type(decoded).__name__} instead of a tensor"
    return decoded


def refused(field: Field, values: Sequence[bytes]) -> list[dict[int, str]]:
    """What each way of giving the values says of the bad ones."""
    found = []
    for raw in ways(values):
        with pytest.raises(BadValuesError) as caught:
            decode(field, raw)
        found.append(caught.value.faults)
    return found


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return io.open, (str(self.path), "w")


@quick
@given(
    st.sampled_from(NUMBERS),
    npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
def test_arrays_of_one_shape_become_one_tensor(kind: str, shape: tuple[int, ...], count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    arrays = [(random.integers(-99, 99, shape) * 1.5).astype(kind) for _ in range(count)]
    for raw in ways([npy(array) for array in arrays]):
        found = tensor_of(decode(Field("x.npy"), raw))
        np.testing.assert_array_equal(found.numpy(), np.stack(arrays))
        assert found.numpy().dtype == np.dtype(kind)


def test_arrays_of_several_shapes_become_a_list() -> None:
    arrays = [np.arange(6.0).reshape(2, 3), np.arange(4.0).reshape(2, 2), np.float64(7)]
    found = decode(Field("npy"), separate([npy(array) for array in arrays]))
    assert isinstance(found, list)
    for ours, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(ours.numpy(), array)


@pytest.mark.parametrize(
    "arrays",
    [
        [np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(6, dtype=np.float32).reshape(3, 2)],
        [np.arange(3, dtype=np.float32), np.arange(3, dtype=np.int32)],
    ],
)
def test_values_of_one_size_but_other_headers_become_a_list(arrays: list[NDArray[Any]]) -> None:
    values = [npy(array) for array in arrays]
    assert len(values[0]) == len(values[1])
    for raw in ways(values):
        found = decode(Field("npy"), raw)
        assert isinstance(found, list)
        for ours, array in zip(found, arrays, strict=True):
            np.testing.assert_array_equal(ours.numpy(), array)
            assert ours.numpy().dtype == array.dtype


ONE, OTHER = np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
    ("field", "bad", "words"),
    [
        (Field("npy", shape=(2, 3)), OTHER, "shape (3, 2), but shape (2, 3) is declared"),
        (Field("npy", shape=(2, 3)), np.zeros((2, 3, 1), np.float32), "shape (2, 3, 1), but"),
        (Field("npy", dtype="float32"), ONE.astype(np.int32), "an array of int32, but float32 is declared"),
        (Field("npy", pad=0.0), np.float32(1), "a single number"),
    ],
)
def test_arrays_other_than_declared_are_bad_values(field: Field, bad: NDArray[Any], words: str) -> None:
    for raw in ways([npy(ONE)] * 3):
        assert tensor_of(decode(field, raw)).shape == (3, 2, 3)
    for values in ([npy(bad)] * 3, [npy(ONE), npy(bad), npy(bad)]):
        for faults in refused(field, values):
            assert list(faults) == [place for place, value in enumerate(values) if value == npy(bad)]
            assert all(words in what for what in faults.values()), faults


def test_arrays_to_be_padded_come_as_they_are() -> None:
    arrays = [np.arange(3.0), np.arange(5.0)]
    found = decode(Field("npy", pad=-1.0), separate([npy(array) for array in arrays]))
    assert isinstance(found, list)
    assert [row.tolist() for row in found] == [array.tolist() for array in arrays]


def test_the_error_tells_all_bad_values() -> None:
    (faults,) = refused(Field("cls"), [b"1", b"cat", b"22", b""])
    assert list(faults) == [1, 3]
    assert "'cat'" in faults[1]
    assert str(BadValuesError({1: "x", 3: "y"})) == "value 1: x; value 3: y"


def test_a_decoded_batch_may_be_written_to() -> None:
    values = [npy(np.arange(3, dtype=np.float32))] * 2
    raw = np.frombuffer(b"\x01\x02" * 2, dtype=np.uint8)
    for way in ways(values):
        tensor_of(decode(Field("npy"), way)).add_(1)
    for way in ways([raw.tobytes()] * 2):
        tensor_of(decode(Field("x", decoder="tensor", dtype="uint8", shape=(4,)), way)).add_(1)
    assert values[0] == npy(np.arange(3, dtype=np.float32)), "the bytes themselves were written to"


def test_fortran_order_is_refused_unless_it_is_c_order_too() -> None:
    stream = io.BytesIO()
    np.save(stream, np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    for faults in refused(Field("npy"), [stream.getvalue()] * 2):
        assert list(faults) == [0, 1]
        assert all("Fortran order" in what for what in faults.values())
    stream = io.BytesIO()
    np.save(stream, np.asfortranarray(np.arange(3.0)))
    for raw in ways([stream.getvalue()] * 2):
        assert tensor_of(decode(Field("npy"), raw)).tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("count", [1, 3])
def test_object_arrays_are_refused_and_not_unpickled(tmp_path: Path, count: int) -> None:
    planted = tmp_path / "planted"
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb(planted)], dtype=object), allow_pickle=True)
    for faults in refused(Field("npy"), [stream.getvalue()] * count):
        assert list(faults) == list(range(count))
        assert all("Python objects" in what for what in faults.values())
    assert not planted.exists(), "code from the data has run"


@pytest.mark.parametrize("kind", ["cls", "txt", "json", "npy", "png", "tensor"])
def test_a_pickle_in_place_of_a_value_does_not_run(tmp_path: Path, kind: str) -> None:
    planted = tmp_path / "planted"
    field = Field(kind, dtype="uint8", shape=(3,)) if kind == "tensor" else Field(kind)
    refused(field, [pickle.dumps(Bomb(planted), protocol=4)] * 2)
    assert not planted.exists(), "code from the data has run"
    pickle.loads(pickle.dumps(Bomb(planted), protocol=4)).close()
    assert planted.exists(), "the planted pickle is harmless: the test shows nothing"


def header(text: str) -> bytes:
    """An npy array with a header of that text."""
    encoded = text.encode()
    return b"\x93NUMPY\x01\x00" + len(encoded).to_bytes(2, "little") + encoded


GOOD_NPY = npy(np.arange(6, dtype=np.float32).reshape(2, 3))
SHAPED = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (Field("npy"), b""),
        (Field("npy"), b"\x93NUM"),
        (Field("npy"), b"garbage that is no array"),
        (Field("npy"), GOOD_NPY[:-1]),
        (Field("npy"), GOOD_NPY + b"\0\0\0\0"),
        (Field("npy"), GOOD_NPY[:40]),
        (Field("npy"), b"\x93NUMPY\x09\x00" + GOOD_NPY[8:]),
        (Field("npy"), header(SHAPED % "(2,)") + b"1234"),
        (Field("npy"), header("no dictionary") + b"1234"),
        (Field("cls"), b""),
        (Field("cls"), b"cat"),
        (Field("cls"), b"1.5"),
        (Field("cls"), b"\xff"),
        (Field("txt"), b"\xff\xfe"),
        (Field("json"), b""),
        (Field("json"), b"{"),
        (Field("json"), b"\xff\xff"),
        (Field("png"), b""),
        (Field("jpg"), b"\xff\xd8\xff\xe0 no image"),
        (Field("x", decoder="tensor", dtype="float32", shape=(2, 2)), b"123456789012345"),
        (Field("x", decoder="tensor", dtype="float32", shape=(2, 2)), b""),
    ],
)
def test_all_garbage_is_named_by_its_places(field: Field, value: bytes) -> None:
    good = {
        "npy": GOOD_NPY,
        "cls": b"3",
        "txt": b"text",
        "json": b"1",
        "image": picture((2, 2)),
        "tensor": b"1234567890123456",
    }[field.kind]
    for bad in ([0], [2], [0, 3], [1, 2, 3], [0, 1, 2, 3]):
        for faults in refused(field, [value if place in bad else good for place in range(4)]):
            assert list(faults) == bad
            assert all(faults.values()), "nothing is said of a bad value"


ESCAPES = [
    pytest.param(Field("npy"), npy(np.array(["text"])), id="text"),
    pytest.param(Field("npy"), npy(np.array(["2020-01-01"], dtype="M8[D]")), id="dates"),
    pytest.param(Field("npy"), npy(np.zeros(2, dtype=[("a", "<f4")])), id="records"),
    pytest.param(Field("npy"), header("{") + b"1234", id="cut-header"),
    pytest.param(Field("npy"), header("{[]: 1}") + b"1234", id="unhashable-header"),
    pytest.param(Field("npy"), header(SHAPED % "(-1,)") + b"1234", id="negative-shape"),
    pytest.param(Field("npy"), header(SHAPED % "(-1, -1)") + b"1234", id="negative-shapes"),
    pytest.param(Field("cls"), b"99999999999999999999", id="64-bit-overflow"),
    pytest.param(Field("json"), b"[" * 100_000, id="deep-json"),
    pytest.param(Field("ppm"), b"P6\n2 2\nx55\n" + bytes(12), id="damaged-ppm"),
    pytest.param(Field("ppm"), b"P6\n99999 99999\n255\n" + bytes(12), id="too-large-an-image"),
]


@pytest.mark.parametrize(("field", "value"), ESCAPES)
def test_values_that_libraries_choke_on_are_bad_values(field: Field, value: bytes) -> None:
    for faults in refused(field, [value] * 2):
        assert list(faults) == [0, 1]


def test_big_endian_arrays_are_read_or_refused() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    for raw in ways([npy(array)] * 2):
        try:
            found = tensor_of(decode(Field("npy"), raw))
        except BadValuesError:
            continue
        np.testing.assert_array_equal(found.numpy(), np.stack([array, array]))


def test_damaged_arrays_are_bad_values_or_arrays() -> None:
    for at in range(len(GOOD_NPY)):
        for byte in (GOOD_NPY[at] ^ 1, *b"\0\xff{([,'\"\n #0-"):
            value = bytearray(GOOD_NPY)
            value[at] = byte
            for raw in ways([bytes(value)] * 2):
                # NumPy warns of a header that Python 2 would have written.
                with contextlib.suppress(BadValuesError, UserWarning):
                    decode(Field("npy"), raw)


@quick
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9))
def test_class_numbers(numbers: list[int]) -> None:
    for raw in ways([str(number).encode() for number in numbers]):
        found = tensor_of(decode(Field("cls"), raw))
        assert (found.tolist(), found.dtype) == (numbers, torch.int64)


def test_class_numbers_with_white_space() -> None:
    assert tensor_of(decode(Field("index"), separate([b" 7\n", b"-1"]))).tolist() == [7, -1]


@quick
@given(st.lists(st.text(max_size=9), min_size=1, max_size=5))
def test_text(texts: list[str]) -> None:
    for raw in ways([text.encode() for text in texts]):
        assert decode(Field("txt"), raw) == texts


def test_json_and_bytes() -> None:
    values = [b'{"a": [1, null]}', b'"\xc3\xa9"']
    assert decode(Field("json"), separate(values)) == [{"a": [1, None]}, "é"]
    assert decode(Field("bin"), separate(values)) == values
    for raw in ways([b"\0\x01", b"\xff\x02"]):
        assert decode(Field("anything", decoder="bytes"), raw) == [b"\0\x01", b"\xff\x02"]


@pytest.mark.parametrize("kind", ["uint8", "int16", "float32", "int64"])
def test_raw_tensors_are_little_endian(kind: str) -> None:
    field = Field("x.bin", decoder="tensor", dtype=kind, shape=(3, 2))
    arrays = [np.arange(6).reshape(3, 2).astype(kind) + np.dtype(kind).type(i) for i in range(4)]
    values = [array.astype(np.dtype(kind).newbyteorder("<")).tobytes() for array in arrays]
    for raw in ways(values):
        found = tensor_of(decode(field, raw))
        np.testing.assert_array_equal(found.numpy(), np.stack(arrays))
        assert found.numpy().dtype == np.dtype(kind)


def picture(size: tuple[int, int], format: str = "PNG", mode: str = "RGB", seed: int = 0) -> bytes:
    """An image of (height, width)."""
    image: Any = pytest.importorskip("PIL.Image")
    shape = size if mode in ("L", "1") else (*size, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    stream = io.BytesIO()
    image.fromarray(pixels, mode if mode != "1" else None).convert(mode).save(stream, format)
    return stream.getvalue()


def pillow(value: bytes) -> NDArray[np.uint8]:
    image: Any = pytest.importorskip("PIL.Image")
    return np.array(image.open(io.BytesIO(value)).convert("RGB"))


@pytest.mark.parametrize("ext", ["png", "bmp", "ppm"])
def test_lossless_images_are_what_pillow_reads(ext: str) -> None:
    values = [picture((5, 7), ext.upper(), seed=seed) for seed in range(3)]
    for raw in ways(values):
        found = tensor_of(decode(Field(f"photo.{ext}"), raw))
        assert (tuple(found.shape), found.dtype) == ((3, 3, 5, 7), torch.uint8)
        np.testing.assert_array_equal(found.permute(0, 2, 3, 1).numpy(), np.stack([pillow(v) for v in values]))


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_images_become_three_channels(mode: str) -> None:
    value = picture((4, 6), mode=mode)
    np.testing.assert_array_equal(tensor_of(decode(Field("png"), separate([value])))[0].permute(1, 2, 0), pillow(value))


def test_jpeg_images_are_near_what_pillow_reads() -> None:
    values = [picture((16, 24), "JPEG", seed=seed) for seed in range(2)]
    found = tensor_of(decode(Field("jpg"), separate(values))).permute(0, 2, 3, 1).numpy().astype(int)
    difference = np.abs(found - np.stack([pillow(v) for v in values])).mean()
    assert difference <= 2, f"a mean difference of {difference} levels"


def test_images_of_several_sizes_become_a_list_or_are_resized() -> None:
    values = [picture((5, 7)), picture((8, 4)), picture((6, 6), "JPEG")]
    plain = decode(Field("png"), separate(values))
    assert isinstance(plain, list)
    assert [tuple(image.shape) for image in plain] == [(3, 5, 7), (3, 8, 4), (3, 6, 6)]
    resized = tensor_of(decode(Field("png", shape=(3, 6, 9)), separate(values)))
    assert (tuple(resized.shape), resized.dtype) == ((3, 3, 6, 9), torch.uint8)


def test_resizing_keeps_what_is_where() -> None:
    image: Any = pytest.importorskip("PIL.Image")
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:4, :8], pixels[4:, 8:] = (200, 0, 0), (0, 0, 100)
    stream = io.BytesIO()
    image.fromarray(pixels).save(stream, "PNG")
    found = tensor_of(decode(Field("png", shape=(3, 4, 4)), separate([stream.getvalue()])))[0]
    corners = {(y, x): found[:, y, x].tolist() for y in (0, 3) for x in (0, 3)}
    assert corners == {(0, 0): [200, 0, 0], (0, 3): [0, 0, 0], (3, 0): [0, 0, 0], (3, 3): [0, 0, 100]}


@pytest.mark.parametrize(
    ("ext", "kind"),
    [
        ("cls", "cls"),
        ("index", "cls"),
        ("image.npy", "npy"),
        ("seg.PNG", "image"),
        ("jpg;png", "image"),
        ("caption.txt", "txt"),
        ("text", "txt"),
        ("bin", "bytes"),
        ("meta.json", "json"),
        ("clip.GIF", "image"),
        ("meta.pkl", "pickle"),
        ("pyd", "pickle"),
        ("x.pth", "torch"),
        ("pt", "torch"),
    ],
)
def test_the_extension_names_the_decoder(ext: str, kind: str) -> None:
    assert Field(ext).kind == kind


def test_alternatives_are_in_lower_case() -> None:
    assert Field("JPG; png").alternatives == ("jpg", "png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ext": "mp4"}, ["'mp4'", "no decoder"]),
        ({"ext": "x", "decoder": "jsn"}, ["'x'", "no decoder named 'jsn'", "did you mean 'json'?"]),
        ({"ext": "x", "decoder": "tensor"}, ["without dtype or shape", "shape: [3, 32, 32]"]),
        ({"ext": "x", "decoder": "tensor", "dtype": "uint8"}, ["without dtype or shape"]),
        ({"ext": "x", "decoder": "tensor", "shape": (3,)}, ["without dtype or shape"]),
        ({"ext": "model.joblib"}, ["unpickled", "npy"]),
        ({"ext": "x", "decoder": "dill"}, ["unpickled"]),
        ({"ext": "cls", "pad": 0.0}, ["'cls'", "pad does not apply"]),
        ({"ext": "jpg", "pad": 0.0}, ["pad does not apply"]),
        ({"ext": "x", "decoder": "tensor", "dtype": "int8", "shape": (2,), "pad": 1.0}, ["pad and shape"]),
        ({"ext": "npy", "shape": (2,), "pad": 1.0}, ["pad and shape"]),
        ({"ext": "npy", "shape": (-1, 2)}, ["(-1, 2)", "pad"]),
        ({"ext": "txt", "shape": (2,)}, ["shape does not apply"]),
        ({"ext": "json", "dtype": "int8"}, ["dtype does not apply"]),
        ({"ext": "pkl", "shape": (2,)}, ["shape does not apply"]),
        ({"ext": "npy", "backend": "simplejpeg"}, ["backend does not apply"]),
        ({"ext": "npy", "augment": RandomResizedCrop()}, ["augment does not apply"]),
        ({"ext": "jpg", "augment": RandomResizedCrop()}, ["augment but no shape"]),
        ({"ext": "jpg", "backend": "simplejpg"}, ["'simplejpg'", "did you mean 'simplejpeg'?"]),
        ({"ext": "jpg", "shape": (3, 0, 4)}, ["(3, height, width)"]),
    ],
)
def test_fields_that_cannot_work_are_refused(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Field(**arguments)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{str(caught.value)!r} does not say {missing}"


@pytest.mark.parametrize(
    "arguments",
    [
        {"ext": "x", "decoder": "tensor", "dtype": "flaot32", "shape": (3,)},
        {"ext": "x", "decoder": "tensor", "dtype": "object", "shape": (3,)},
        {"ext": "png", "shape": (3,)},
    ],
)
def test_types_and_shapes_that_cannot_work_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Field(**arguments)


PICKLE = pickle.dumps([1, {"a": 2}])


def test_pickles_are_refused_unless_named(tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    values = [pickle.dumps(Bomb(planted))] * 2
    for field in (Field("pkl"), Field("meta.pyd"), Field("x", decoder="pickle"), Field("x", decoder="webdataset:pth")):
        for unsafe in (frozenset[str](), frozenset({"npy", "torch", "webdataset:pkl"})):
            for raw in ways(values):
                with pytest.raises(ConfigError, match=rf"unpickled.*\n.*add '{field.kind}' to data.unsafe_decoders"):
                    decode(field, raw, unsafe=unsafe)
    assert not planted.exists(), "code from the data has run"


def test_pickles_that_are_named_are_read() -> None:
    for raw in ways([PICKLE] * 2):
        assert decode(Field("pkl"), raw, unsafe=frozenset({"pickle"})) == [[1, {"a": 2}]] * 2
    with pytest.raises(BadValuesError) as caught:
        decode(Field("pkl"), separate([PICKLE, b"no pickle", PICKLE, b""]), unsafe=frozenset({"pickle"}))
    assert list(caught.value.faults) == [1, 3]


def test_unsafe_fields_are_refused_or_warned_of_once(recwarn: pytest.WarningsRecorder) -> None:
    safe = {"label": Field("cls"), "state": Field("pt")}
    unsafe = {"meta": Field("pkl"), "more": Field("x", decoder="webdataset:pyd")}
    check_safe(safe)
    check_safe(safe, ["pickle"])
    assert not recwarn.list
    for allowed in ([], ["pickle"], ["webdataset:pyd"]):
        with pytest.raises(ConfigError, match=r"data.fields.(meta|more) .*unpickled"):
            check_safe({**safe, **unsafe}, allowed)
    with pytest.warns(UserWarning, match=r"meta \(pickle\), more \(webdataset:pyd\)") as caught:
        check_safe({**safe, **unsafe}, ["pickle", "webdataset:pyd"])
    assert len(caught) == 1


def test_decoders_that_are_not_unsafe_cannot_be_named_as_such() -> None:
    with pytest.raises(ConfigError, match="did you mean 'pickle'"):
        check_safe({}, ["pickel"])


def torch_file(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_torch_files_are_read_without_running_code(tmp_path: Path) -> None:
    values = [torch_file(torch.full((2, 3), float(i))) for i in range(3)]
    for field in (Field("pt"), Field("x.pth", shape=(2, 3), dtype="float32"), Field("pt", pad=0.0)):
        found = tensor_of(decode(field, separate(values)))
        assert found[:, 0, 0].tolist() == [0, 1, 2]
    several = decode(Field("pt"), separate([torch_file(torch.zeros(2)), torch_file(torch.zeros(3))]))
    assert isinstance(several, list)
    assert [tuple(value.shape) for value in several] == [(2,), (3,)]
    assert decode(Field("pt"), separate([torch_file({"a": 1})])) == [{"a": 1}]
    planted = tmp_path / "planted"
    bad = [torch_file(Bomb(planted)), values[0], values[0][:-9], b"", torch_file({"a": 1})]
    (faults,) = refused(Field("pt", shape=(2, 3)), bad)
    assert list(faults) == [0, 2, 3, 4]
    assert "dict, but an array is declared" in faults[4]
    assert not planted.exists(), "code from the data has run"


def test_fields_are_built_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--fields", type=dict[str, Field | str])
    text = """{
        image: {ext: jpg, shape: [3, 8, 8], augment: {scale: [0.2, 1.0], flip: 0.0}, backend: simplejpeg},
        tokens: {ext: npy, dtype: int64, pad: 0}, meta: json}"""
    fields = parser.instantiate(parser.parse_args([f"--fields={text}"])).fields
    crop = RandomResizedCrop(scale=(0.2, 1.0), flip=0.0)
    assert fields == {
        "image": Field("jpg", shape=(3, 8, 8), augment=crop, backend="simplejpeg"),
        "tokens": Field("npy", dtype="int64", pad=0.0),
        "meta": "json",
    }
