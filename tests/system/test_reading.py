"""The reader of small files: what it refuses, without waiting and without much memory."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import yaml
from hypothesis import given, strategies as st

from disttrain.checkpoint.format.marker import parse
from disttrain.errors import CheckpointError
from disttrain.system.reading import (
    MAX_DEPTH,
    ReadError,
    conform_run,
    open_regular,
    parse_json,
    parse_yaml,
    read_json_lines,
    read_lines,
    read_record,
    read_text,
)

ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
YAML = {
    "a list in itself": ("a: &a [*a]", "within its own anchor"),
    "a name in itself": ("a: &a {b: {c: *a}}", "within its own anchor"),
    "nested aliases": (ALIASES, "more than 200,000 values"),
    "deep aliases": ("\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 120))]), "deep"),
    "deep lists": ("[" * 5000 + "]" * 5000, "deep"),
    "unclosed lists": ("[" * 1_000_000, "deep"),
    "deep lines": ("".join(f"{' ' * i}a:\n" for i in range(500)), "deep, line 100"),
    "dashes": ("- " * 5000 + "x", "deep"),
    "a name twice": ("a: 1\nb: 2\na: 3", "'a' twice, line 3"),
    "a long number": ("a: " + "9" * 5000, "number of 5,000 digits"),
    "base 60": ("a: " + "59:" * 5000 + "1", "digits"),
    "base 16": ("a: 0x" + "f" * 5000, "digits"),
    "base 2": ("a: 0b" + "1" * 5000, "digits"),
    "no date": ("a: 2026-99-99", "not valid YAML"),
    "an object": ("a: !!python/object/apply:os.system [id]", "not valid YAML, line 1"),
    "a list as a name": ("[1, 2]: 3", "not valid YAML"),
    "two documents": ("--- a\n--- b", "not valid YAML, line 2"),
    "an escape": ("a: \x1b[31m", "not valid YAML"),
    "half a character": ("a: \ud800", "not valid YAML"),
    "an unclosed list": ("a: [1", "not valid YAML, line 2"),
}
JSON = {
    "deep lists": ("[" * 500_000, "deep"),
    "deep names": ('{"a":' * 150 + "1" + "}" * 150, "deep"),
    "a name twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' twice"),
    "a name twice among many": ("{" + "".join(f'"{i}": 1, ' for i in range(20_000)) + '"19999": 2}', "'19999' twice"),
    "a long number": ('{"a": ' + "9" * 5000 + "}", "5,000 digits"),
    "no JSON": ("{'a': 1}", "not JSON: .*column 2"),
    "nothing": ("", "not JSON"),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml_is_refused(case: str) -> None:
    text, why = YAML[case]
    with pytest.raises(ReadError, match=why):
        parse_yaml(text)


@pytest.mark.parametrize("case", JSON)
def test_json_is_refused(case: str) -> None:
    text, why = JSON[case]
    with pytest.raises(ReadError, match=why):
        parse_json(text)


def test_sound_text_is_read() -> None:
    text = "a: &x {b: [1, 2.5, yes]}\nc: *x\n<<: {d: e}\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    for text in ("0a4d55a8d778e5022fab701977c5d840bbc486d0", "9" + "0123456789abcdef" * 2, "2001:db8:0:1:1:1:1:1:cafe"):
        assert parse_yaml(f"a: {text}") == parse_yaml(f"{{'a': {text}}}") == {"a": text}
    assert parse_yaml("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)) is not None
    assert parse_json(b'\xef\xbb\xbf{"a": [18446744073709551615, -1e300, "\\udcff", NaN]}')["a"][0] == 2**64 - 1
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.text(), st.lists, max_leaves=20))
def test_what_json_writes_is_read_back(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize("make", ["fifo", "zero", "null", "loop", "folder", "large", "bytes"])
def test_only_regular_files_of_text_are_read(tmp_path: Path, make: str) -> None:
    path = tmp_path / "x"
    if make == "fifo":
        os.mkfifo(path)
    elif make == "folder":
        path.mkdir()
    elif make == "large":
        with open(path, "wb") as file:
            file.truncate(2**40)
    elif make == "bytes":
        path.write_bytes(b"caf\xe9")
    else:
        path.symlink_to({"zero": "/dev/zero", "null": "/dev/null", "loop": path}[make])
    with pytest.raises((ReadError, OSError)):
        read_text(path)
    assert read_record(path) == {}
    if make == "large":
        with pytest.raises(ReadError, match="in line 1"):
            list(read_lines(path))


def test_lines_that_are_not_objects_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n[1]\n\xff\n{"a": 2}\n{"a": ')
    assert list(read_json_lines(path)) == [{"a": 1}, {"a": 2}]
    with open_regular(path) as file:
        assert file.fileno() > 2


def test_a_record_of_wrong_types_has_right_ones() -> None:
    """Whatever stands in run.json, what is made of it can be counted, added and sorted."""
    kinds: list[object] = [None, True, -1, 2**70, 1e400, float("nan"), "x", [], [1], {}, {"a": 1}, [[]], [{}]]
    names = ["id", "status", "attempts", "events", "best", "result", "created", "environment", "bad_samples"]
    draw = random.Random(0)
    for _ in range(500):
        attempt = {name: draw.choice(kinds) for name in ("to_step", "from_step", "started", "launch")}
        record = {name: draw.choice([*kinds, [attempt]]) for name in names}
        found = conform_run(record)
        assert isinstance(found["status"], str)
        assert isinstance(found["best"], dict)
        for one in found["attempts"]:
            assert one.get("to_step") is None or -(2**63) < one["to_step"] < 2**63
    for other in kinds:
        assert isinstance(conform_run(other), dict)
    record = {"result": {"a": "x", "b": "NaN", "c": 1}, "sources": {"a": 5}, "attempts_left_out": "x"}
    assert (
        str(conform_run(record)) == "{'result': {'b': nan, 'c': 1.0}, 'sources': {'a': {}}, 'attempts_left_out': None}"
    )


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\0b"])
def test_a_marker_lists_files_of_its_own_folder(tmp_path: Path, name: str) -> None:
    text = json.dumps({"format": 1, "global_step": 3, "files": {name: 1}})
    with pytest.raises(CheckpointError, match="damaged COMMITTED"):
        parse(text, tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"global_step": -1}, {"global_step": "3"}, {"global_step": 2**70}, {"files": {"a": -1}}, {"format": True}],
)
def test_a_marker_of_wrong_types_is_damaged(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="damaged COMMITTED"):
        parse(json.dumps({"format": 1, "global_step": 3, "files": {"a": 1}, **change}), tmp_path)
