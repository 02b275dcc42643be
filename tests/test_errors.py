"""Errors: what they say, and that they survive the way between processes."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from disttrain import errors
from disttrain.errors import ConfigError, DataError, DecodeError, DisttrainError, RankError, ShardError, nearest

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


CODES = {"OutOfMemoryError": 77}


def test_all_kinds_are_found() -> None:
    names = {"CheckpointError", "ConfigError", "DataError", "DecodeError", "DisttrainError", "JoinError", "RankError"}
    assert {kind.__name__ for kind in KINDS} == {*names, "OutOfMemoryError", "ShardError"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hint", ["", "do this"])
def test_an_error_says_what_is_wrong_and_how_to_fix_it(kind: type[DisttrainError], hint: str) -> None:
    error = kind("shard x is torn", hint=hint)
    assert str(error) == ("shard x is torn\n  hint: do this" if hint else "shard x is torn")
    assert (error.what, error.hint, error.exit_code) == ("shard x is torn", hint, CODES.get(kind.__name__, 2))
    assert isinstance(error, DisttrainError)
    assert inspect.getdoc(kind), f"{kind.__name__} has no docstring of its own"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_pickling_and_copying(kind: type[DisttrainError]) -> None:
    error = kind("shard x is torn", hint="do this")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is kind
        assert (other.what, other.hint, str(other)) == (error.what, error.hint, str(error))


def test_callers_may_catch_by_kind() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ShardError, DataError)
    assert issubclass(DecodeError, DataError)
    assert not issubclass(RankError, (ConfigError, DataError))


@pytest.mark.parametrize(
    ("name", "known", "words"),
    [
        ("imagee", ["label", "image"], "did you mean 'image'?"),
        ("x.np", ("cls", "x.npy"), "did you mean 'x.npy'?"),
        ("zzz", ["b", "a"], "known: a, b"),
        ("zzz", [], "none are known"),
        ("b", iter(["b", "a"]), "did you mean 'b'?"),
    ],
)
def test_the_nearest_known_name(name: str, known: list[str], words: str) -> None:
    assert nearest(name, known) == words


def test_the_former_name_of_the_hint_still_works_and_says_so() -> None:
    with pytest.warns(DeprecationWarning, match="now called hint"):
        assert ConfigError("x is 1", hint="use 2").mend == "use 2"
