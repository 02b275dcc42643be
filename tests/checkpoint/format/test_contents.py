"""What is written beside tensors: plain forms, and what has none by its name and type."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import io
import threading
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from disttrain.checkpoint.format import contents
from disttrain.checkpoint.format.contents import plain_contents
from disttrain.checkpoint.format.optimizer_state import divide
from disttrain.errors import CheckpointError


class Color(enum.Enum):
    RED = "red"
    MIXED = (1, 2)


class Word(str, enum.Enum):  # noqa: UP042 - as configurations of older Python have them
    RED = "red"


class Pair(NamedTuple):
    a: int
    b: Path


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    folder: Path = Path("/x")


class Thing:
    """Has no plain form."""


EITHER: list[tuple[Any, Any]] = [
    (None, None),
    (np.float32(1.5), 1.5),
    (np.float64(0.1), 0.1),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (np.str_("a"), "a"),
    (Word.RED, "red"),
    (1j, 1j),
    (collections.defaultdict(list, a=[1]), {"a": [1]}),
    ({(1, 2): {"a": (1, [2.0, {3}])}}, {(1, 2): {"a": (1, [2.0, {3}])}}),
    (frozenset({1}), {1}),
    (torch.bfloat16, torch.bfloat16),
    (torch.Size([1, 2]), torch.Size([1, 2])),
]
RECORDED: list[tuple[Any, Any]] = [
    (Path("/a/b"), "/a/b"),
    ({Path("k"): Path("v")}, {"k": "v"}),
    (Color.RED, "red"),
    (Color.MIXED, "MIXED"),
    (Settings(), {"rate": 0.1, "folder": "/x"}),
    (argparse.Namespace(a=Path("b")), {"a": "b"}),
    (types.SimpleNamespace(a=1), {"a": 1}),
    (types.MappingProxyType({"a": 1}), {"a": 1}),
    (Pair(1, Path("c")), {"a": 1, "b": "c"}),
    (collections.deque([1, 2]), [1, 2]),
    (np.arange(3), [0, 1, 2]),
    (np.dtype("float32"), "float32"),
    (np.datetime64("2020-01-01"), "2020-01-01"),
    (datetime.timedelta(1), "1 day, 0:00:00"),
    (range(3), "range(0, 3)"),
    (nn.ReLU, "torch.nn.modules.activation.ReLU"),
    (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    (
        functools.partial(torch.optim.AdamW, lr=np.float64(0.1)),
        {"function": "torch.optim.adamw.AdamW", "arguments": (), "keywords": {"lr": 0.1}},
    ),
]
REFUSED: list[tuple[Any, str]] = [
    (Thing(), "test_contents.Thing"),
    (threading.Lock(), "lock"),
    (lambda: None, "function"),
    (torch.Generator(), "Generator"),
    (np.array([Thing()]), "numpy.ndarray"),
    (torch.zeros(2, 2).to_sparse(), "Tensor, torch.sparse_coo"),
]


def loaded(gathered: dict[str, Any]) -> Any:
    stream = io.BytesIO()
    torch.save(plain_contents(gathered), stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@pytest.mark.parametrize(("value", "plain"), EITHER)
def test_state_is_changed_only_into_what_equals_it(value: Any, plain: Any) -> None:
    for place in ("callbacks", "hyper_parameters"):
        found = loaded({place: {"x": value}})[place]["x"]
        assert found == plain == (value if value is not np.str_ else plain)
        assert type(found) is type(plain)


@pytest.mark.parametrize(("value", "plain"), RECORDED)
def test_hyper_parameters_are_recorded_in_a_plain_form_and_state_is_refused(value: Any, plain: Any) -> None:
    for place in ("hyper_parameters", "datamodule_hyper_parameters"):
        assert loaded({place: {"x": value}}) == {place: {"x": plain}}
    if not isinstance(value, Pair):  # equal to the tuple that comes back, but for what is in it
        with pytest.raises(CheckpointError, match=r"callbacks\.Mine\.x"):
            plain_contents({"callbacks": {"Mine": {"x": value}}})


@pytest.mark.parametrize(("value", "kind"), REFUSED)
def test_what_has_no_plain_form_is_named(value: Any, kind: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        plain_contents({"hyper_parameters": {"a": [1, {"b": value}]}, "mine": value, "fine": 1})
    for word in ("hyper_parameters.a.1.b (of type", "mine (of type", kind, "would need unpickling"):
        assert word in caught.value.what, caught.value.what
    assert "save_hyperparameters(ignore=[...])" in caught.value.hint
    assert "state_dict()" in caught.value.hint


def test_tensors_are_shared_and_parameters_become_tensors() -> None:
    weight = nn.Parameter(torch.ones(2))
    found = plain_contents({"mine": {"weight": weight, "rng": torch.get_rng_state()}})["mine"]["weight"]
    assert type(found) is torch.Tensor
    assert not found.requires_grad
    assert found.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("value", [{Pair(1, Path("c")): 3}, {frozenset({1}): 3}, {frozenset({1})}, {Settings(): 1}])
def test_keys_without_a_hash_in_their_plain_form_are_named(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"hyper_parameters\.x\.\S+ .*, used as a key or in a set"):
        plain_contents({"hyper_parameters": {"x": value}})


def test_omegaconf_types_are_no_part_of_a_record() -> None:
    assert plain_contents({"hparams_type": Thing, "datamodule_hparams_type": Thing, "fine": 1}) == {"fine": 1}


def test_many_numbers_in_hyper_parameters_are_a_tensor_and_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = 0, contents._plain

    def counted(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*arguments, **more)

    monkeypatch.setattr(contents, "_plain", counted)
    every = [np.zeros(10**7, np.uint8), np.arange(4000, dtype=">f8")[::-2], np.arange(2000).reshape(2, -1) > 9]
    every += [np.arange(1001).astype(kind) for kind in ("uint16", "uint32", ">u8", "float16", "complex64")]
    for value in every[1:3]:
        value.flags.writeable = False
    found = loaded({"hyper_parameters": {"x": every}})["hyper_parameters"]["x"]
    assert calls < 50
    for value, there in zip(every, found, strict=True):
        assert type(there) is torch.Tensor
        assert np.array_equal(there.numpy(), value)
        assert there.numpy().dtype == value.dtype.newbyteorder("=")


def test_what_holds_itself_and_many_faults_are_one_short_message() -> None:
    endless: list[Any] = []
    endless.append([endless, endless])
    with pytest.raises(CheckpointError, match="nested in itself or too deep"):
        plain_contents({"mine": endless})
    with pytest.raises(CheckpointError, match="nested in itself or too deep"):
        divide(endless, "weight.mine", {}, "state 'mine' of weight")
    with pytest.raises(CheckpointError, match="and 95 more") as caught:
        plain_contents({"mine": [Thing() for _ in range(100)]})
    assert len(str(caught.value)) < 1000
