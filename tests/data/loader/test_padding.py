"""Padding is cut off what any module predicts, or the module is told that it cannot be."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from disttrain.data.loader.padding import Rows, real_outputs
from disttrain.errors import ConfigError

ROWS, MODULE = Rows(4, 3), torch.nn.Linear(1, 1)


class Pair(NamedTuple):
    one: Any
    two: Any


@dataclass
class Out:
    logits: Any
    names: list[str]


@dataclass
class Both(OrderedDict[str, Any]):
    """A dataclass and a mapping, as transformers' outputs are."""

    logits: Any
    loss: Any = None


def rows(size: int) -> torch.Tensor:
    return torch.arange(2.0 * size).reshape(size, 2)


@pytest.mark.parametrize(
    ("given", "cut"),
    [
        (rows(4), rows(3)),
        (rows(3), rows(3)),  # cut by its author
        (rows(4).numpy(), rows(3).numpy()),
        ({"logits": rows(4), "names": ["a", "b", "c", "d"]}, {"logits": rows(3), "names": ["a", "b", "c"]}),
        ((rows(4), torch.arange(4)), (rows(3), torch.arange(3))),
        ([rows(4), {"deep": torch.arange(4)}], [rows(3), {"deep": torch.arange(3)}]),
        (Pair(rows(4), None), Pair(rows(3), None)),
        (Out(rows(4), ["a", "b", "c", "d"]), Out(rows(3), ["a", "b", "c"])),
        (Both(rows(4)), Both(rows(3))),
        ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3]),
        (None, None),
    ],
)
def test_rows_of_padding_are_cut(given: Any, cut: Any) -> None:
    found = real_outputs(given, ROWS, MODULE)
    assert type(found) is type(cut)
    assert repr(found) == repr(cut)
    assert real_outputs(given, Rows(4, 4), MODULE) is given
    assert real_outputs(given, None, MODULE) is given


def test_a_dictionary_keeps_its_kind() -> None:
    found = real_outputs(defaultdict(list, logits=rows(4)), ROWS, MODULE)
    assert (type(found), found["logits"].shape, found["other"]) == (defaultdict, (3, 2), [])


def test_padding_alone_leaves_nothing() -> None:
    assert real_outputs({"logits": rows(4)}, Rows(4, 0), MODULE)["logits"].shape == (0, 2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.tensor(0.5), r"a tensor of shape \(\)"),
        (torch.ones(2, 4), r"a tensor of shape \(2, 4\)"),
        ({"logits": rows(4), "loss": 0.5}, "a float"),
        (np.float64(0.5), "a float64"),
        ("text", "a str"),
        ([1, 2], "a list of 2"),
        ([rows(4)] * 4, "a list of 4 whose items may be samples or hold a row of each"),
        ((rows(4),) * 3, "a tuple of 3 whose items may be samples"),
    ],
)
def test_what_cannot_be_cut_is_refused(given: Any, words: str) -> None:
    three = "tuple of 3" in words  # may only be a row of each of the three samples
    for rows, check in ((ROWS, False),) if three else ((ROWS, False), (Rows(4, 4), True)):
        with pytest.raises(ConfigError, match=f"of Linear returned {words}.* for a micro batch of 4, so the padding"):
            real_outputs(given, rows, MODULE, check=check)
    assert real_outputs(given, Rows(4, 4), MODULE) is given
