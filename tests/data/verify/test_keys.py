"""Keys in several shards: each is found, named with the first two shards that hold it, and nothing else is."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import pytest

from disttrain.data.index.shard_index import Shard
from disttrain.data.verify import keys as keys_module
from disttrain.data.verify.keys import Keys
from disttrain.data.verify.shards import shard_faults
from tests.support.tars import write_tar

Found = tuple[list[tuple[str, int, int]], int]


def repeats(folder: Path, shards: list[list[str]], most: int) -> Found:
    """Keys that several of some shards hold, with the numbers of the shards."""
    paths = [
        write_tar(folder / f"{number}.tar", [(f"{key}.cls", b"1") for key in keys])
        for number, keys in enumerate(shards)
    ]
    found = [Shard(path, -1, -1) for path in paths]
    keys = Keys(found)
    for number, shard in reversed(list(enumerate(found))):  # threads end in any order
        shard_faults(shard, fields=(), tell_keys=lambda told, number=number: keys.add(number, told))
    named, total = keys.repeats(most)
    return [(key, found.index(first), found.index(second)) for key, first, second in named], total


def test_keys_of_several_shards(tmp_path: Path) -> None:
    shards = [["a", "b"], ["c"], ["b", "d", "a"], ["a", "e", "c"]]
    expected = [("b", 0, 2), ("a", 0, 2), ("c", 1, 3)]
    assert repeats(tmp_path, shards, 9) == (expected, 3)
    assert repeats(tmp_path, shards, 2) == (expected[:2], 3)
    assert repeats(tmp_path, [["a"], ["b"]], 9) == ([], 0)
    assert repeats(tmp_path, [], 9) == ([], 0)


def test_many_keys(tmp_path: Path) -> None:
    chance = random.Random(0)
    shards = [chance.sample([f"{n}" for n in range(2000)], 300) for _ in range(6)]
    holders = defaultdict(list)
    for number, keys in enumerate(shards):
        for key in keys:
            holders[key].append(number)
    expected = {(key, *numbers[:2]) for key, numbers in holders.items() if len(numbers) > 1}
    named, total = repeats(tmp_path, shards, 10_000)
    assert len(expected) > 100
    assert (set(named), len(named), total) == (expected, len(expected), len(expected))


def test_a_key_that_only_shares_a_hash_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "hash", len, raising=False)
    assert repeats(tmp_path, [["a"], ["b"], ["cc"], ["cc"]], 9) == ([("cc", 2, 3)], 1)


def test_damaged_shards_count_up_to_the_damage(tmp_path: Path) -> None:
    write_tar(tmp_path / "whole.tar", [("a.cls", b"1"), ("b.cls", b"1")])
    content = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:1500])
    shards = [Shard(str(tmp_path / name), -1, -1) for name in ("cut.tar", "whole.tar", "none.tar")]
    keys = Keys(shards)
    for number, shard in enumerate(shards):
        shard_faults(shard, fields=(), tell_keys=lambda told, number=number: keys.add(number, told))
    assert keys.repeats(9) == ([("a", shards[0], shards[1])], 1)
