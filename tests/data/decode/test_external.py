"""webdataset's decoders by name give what webdataset gives, and each that unpickles is known as one."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from disttrain.data.decode.external import PICKLES, unpickles
from disttrain.data.decode.fields import BadValuesError, Decoded, Field, RawValues, decode
from disttrain.errors import ConfigError
from tests.support.shards import npy

autodecode: Any = importlib.import_module("webdataset.autodecode")
tenbin: Any = importlib.import_module("webdataset.tenbin")


def png(seed: int = 0, size: tuple[int, int] = (5, 7)) -> bytes:
    image: Any = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def decoded(name: str, values: Sequence[bytes], **settings: Any) -> Decoded:
    raw = RawValues([memoryview(value) for value in values])
    return decode(Field("x", decoder=f"webdataset:{name}", **settings), raw, unsafe=PICKLES)


def same(found: object, truth: object) -> bool:
    if isinstance(truth, dict) and isinstance(found, dict):
        return found.keys() == truth.keys() and all(same(found[name], truth[name]) for name in truth)
    if isinstance(truth, list) and isinstance(found, list):
        return len(found) == len(truth) and all(map(same, found, truth))
    if isinstance(truth, np.ndarray | Tensor) and isinstance(found, np.ndarray | Tensor):
        return found.shape == truth.shape and bool((np.asarray(found) == np.asarray(truth)).all())
    if isinstance(found, Tensor):
        found = found.item()
    return bool(found == truth)


ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
GOOD: dict[str, bytes] = {
    "txt": "é".encode(),
    "cls": b"-7",
    "json": json.dumps({"a": [1, None]}).encode(),
    "npy": npy(ARRAY),
    "npz": npz(a=ARRAY, b=np.zeros(2)),
    "ten": tenbin.encode_buffer([ARRAY, ARRAY.astype(np.int32)]),
    "pkl": pickle.dumps([1, "two"]),
}
GOOD |= dict.fromkeys(("text", "transcript"), GOOD["txt"]) | dict.fromkeys(("cls2", "index", "inx", "id"), GOOD["cls"])
GOOD |= {"jsn": GOOD["json"], "tb": GOOD["ten"]} | dict.fromkeys(("pickle", "pyd"), GOOD["pkl"])


@pytest.mark.parametrize("name", sorted(GOOD))
def test_values_are_what_webdataset_decodes(name: str) -> None:
    truth = autodecode.basichandlers(f"x.{name}", GOOD[name])
    found = decoded(name, [GOOD[name]] * 2)
    assert len(found) == 2
    assert all(same(value, truth) for value in found)


@pytest.mark.parametrize("name", sorted(autodecode.imagespecs))
def test_images_are_what_webdataset_decodes(name: str) -> None:
    values = [png(seed) for seed in range(2)]
    truth = [autodecode.imagehandler(name)("png", value) for value in values]
    found = decoded(name, values)
    assert all(map(same, found, truth))
    assert isinstance(found, list if name.startswith("pil") else Tensor)


def test_torch_files_are_loaded_if_named() -> None:
    stream = io.BytesIO()
    torch.save(torch.arange(3), stream)
    assert torch.equal(torch.as_tensor(decoded("pth", [stream.getvalue()])[0]), torch.arange(3))


def test_class_numbers_become_one_tensor() -> None:
    found = decoded("cls", [b"3", b"-1"])
    assert isinstance(found, Tensor)
    assert (found.tolist(), found.dtype) == ([3, -1], torch.int64)


def test_images_of_several_sizes_become_a_list_and_declared_shapes_hold() -> None:
    values = [png(), png(size=(4, 4)), png()]
    assert isinstance(decoded("torchrgb8", values), list)
    with pytest.raises(BadValuesError) as caught:
        decoded("torchrgb8", values, shape=(3, 5, 7), dtype="uint8")
    assert list(caught.value.faults) == [1]
    with pytest.raises(BadValuesError, match="dict, but an array is declared"):
        decoded("json", [b"{}"], shape=(3,))


def test_all_bad_values_are_listed() -> None:
    for name, bad in (("json", b"{"), ("npz", b"no archive"), ("ten", b"short"), ("cls", b"9" * 30), ("txt", b"\xff")):
        with pytest.raises(BadValuesError) as caught:
            decoded(name, [bad, GOOD[name], bad])
        assert list(caught.value.faults) == [0, 2], name
    with pytest.raises(BadValuesError) as caught:
        decoded("rgb8", [png(), png()[:50], b""])
    assert list(caught.value.faults) == [1, 2]


def test_object_arrays_are_refused_by_the_safe_ones() -> None:
    objects = np.array([{"a": 1}], dtype=object)
    stream = io.BytesIO()
    np.save(stream, objects, allow_pickle=True)
    for name, value in (("npy", stream.getvalue()), ("npz", npz(a=objects))):
        with pytest.raises(BadValuesError, match="allow_pickle=False"):
            decoded(name, [value])


def test_postscript_is_not_run() -> None:
    for program in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xc5\xd0\xd3\xc6" + bytes(40)):
        with pytest.raises(BadValuesError, match="PostScript"):
            decoded("rgb8", [program])


def test_every_decoder_is_known_to_be_safe_or_not() -> None:
    names = {*autodecode.decoders, *autodecode.imagespecs}
    unsafe = {name for name in names if unpickles(f"webdataset:{name}")}
    assert unsafe == {"pkl", "pickle", "pyd", "pth"}, "a decoder that is new has to be judged"
    assert {f"webdataset:{name}" for name in unsafe} | {"pickle"} == PICKLES
    assert unpickles("webdataset:one-that-comes-later")
    assert not unpickles("npy")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no decoder 'rgba9'\n.*did you mean 'rgba'"):
        Field("x", decoder="webdataset:rgba9")


@pytest.mark.parametrize(("name", "module"), [("mp", "msgpack"), ("msg", "msgpack"), ("cbor", "cbor"), ("rgb8", "PIL")])
def test_a_missing_library_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disttrain.data.decode.external.find_spec", lambda asked: None if asked == module else object())
    with pytest.raises(ConfigError, match="pip install"):
        Field("x", decoder=f"webdataset:{name}")


@pytest.mark.parametrize(("name", "module", "function"), [("mp", "msgpack", "unpackb"), ("cbor", "cbor", "loads")])
def test_packed_values_go_to_their_library(
    name: str, module: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = ModuleType(module)
    setattr(library, function, lambda data: {"data": data})
    monkeypatch.setitem(sys.modules, module, library)
    monkeypatch.setattr("disttrain.data.decode.external.find_spec", lambda asked: object())
    assert decoded(name, [b"a", b"b"]) == [{"data": b"a"}, {"data": b"b"}]
