"""Layouts as they are written."""

from __future__ import annotations

import pytest

from disttrain.errors import ConfigError
from disttrain.parity.layouts import Layout, parse_layout, parse_layouts


@pytest.mark.parametrize(
    ("text", "ranks", "words"),
    [
        ("1", 1, "ddp"),
        ("1xfsdp", 1, "fsdp"),
        ("2xddp", 2, "ddp"),
        ("4xfsdp", 4, "fsdp"),
        ("1@64", 1, "ddp --data.micro_batch_size 64"),
        ("2xfsdp@8", 2, "fsdp --data.micro_batch_size 8"),
        ("2x2hsdp", 4, "fsdp --trainer.parallel.replicate 2 --trainer.parallel.shard 2"),
        ("2x3xhsdp", 6, "fsdp --trainer.parallel.replicate 2 --trainer.parallel.shard 3"),
    ],
)
def test_what_a_layout_means(text: str, ranks: int, words: str) -> None:
    expected = Layout(text, ranks, ("--trainer.parallel.strategy", *words.split()))
    assert parse_layout(text) == expected


def test_a_layout_with_tensor_parallelism() -> None:
    settings = ("--trainer.parallel.strategy", "fsdp", "--trainer.parallel.tensor", "2")
    assert parse_layout("3x2tp") == Layout("3x2tp", 6, settings, tensor=2)


@pytest.mark.parametrize(
    "text",
    ["", "2", "0", "0xddp", "2xdpp", "2x2ddp", "2x2", "4xhsdp", "2x0hsdp", "4xtp", "2x0tp", "x", "2xddp4", "1@", "@8"],
)
def test_what_is_no_layout(text: str) -> None:
    with pytest.raises(ConfigError, match="is no layout"):
        parse_layout(text)


def test_lists_of_layouts() -> None:
    assert [layout.name for layout in parse_layouts("1, 2xddp,,2xddp")] == ["1", "2xddp"]
    with pytest.raises(ConfigError, match="fewer than two layouts"):
        parse_layouts("2xddp")
