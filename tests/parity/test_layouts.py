"""Layouts as they are written."""

from __future__ import annotations

import pytest

from disttrain.errors import ConfigError
from disttrain.parallel.config import ParallelConfig
from disttrain.parity.layouts import (
    Layout,
    another_size,
    check_sizes,
    common_size,
    fitting_size,
    parse_layout,
    parse_layouts,
    replaced_settings,
)


@pytest.mark.parametrize(
    "expected",
    [
        Layout("1", 1),
        Layout("1xfsdp", 1, "fsdp"),
        Layout("2xddp", 2),
        Layout("4xfsdp", 4, "fsdp"),
        Layout("1@64", 1, micro_batch_size=64),
        Layout("2xfsdp@8", 2, "fsdp", micro_batch_size=8),
        Layout("2x2hsdp", 4, "fsdp", replicate=2, shard=2),
        Layout("2x3xhsdp", 6, "fsdp", replicate=2, shard=3),
        Layout("3x2tp", 6, "fsdp", tensor=2),
    ],
    ids=lambda layout: layout.name,
)
def test_what_a_layout_means(expected: Layout) -> None:
    assert parse_layout(expected.name) == expected


def test_a_layout_replaces_the_degrees_and_options_of_the_recipe() -> None:
    one, sharded, copies = parse_layouts("1,2xfsdp,2x2hsdp")
    recipe = ParallelConfig(strategy="fsdp", replicate=2, tensor=2, offload=True, activation_checkpointing="blocks")
    assert one.parallel(recipe) == ParallelConfig(activation_checkpointing="blocks")
    assert sharded.parallel(recipe) == ParallelConfig("fsdp", offload=True, activation_checkpointing="blocks")
    assert (copies.parallel(recipe).replicate, copies.parallel(recipe).shard) == (2, 2)
    assert replaced_settings([one, sharded], recipe) == [
        "the recipe's trainer.parallel.replicate 2 is replaced by that of each layout",
        "the recipe's trainer.parallel.tensor 2 is replaced by that of each layout",
        "the recipe's trainer.parallel.offload true is dropped in 1, because ddp has no such option",
    ]
    recipe = ParallelConfig(static_graph=True, gradient_as_bucket_view=False)
    assert one.parallel(recipe) == recipe
    assert sharded.parallel(recipe) == ParallelConfig("fsdp")
    assert [told.split(" is ")[0] for told in replaced_settings([one, sharded], recipe)] == [
        "the recipe's trainer.parallel.static_graph true",
        "the recipe's trainer.parallel.gradient_as_bucket_view false",
    ]
    assert replaced_settings([one, sharded, copies], ParallelConfig()) == []
    with pytest.raises(ConfigError, match=r"layout 2x2tp: parallel.sync_batchnorm"):
        parse_layout("2x2tp").parallel(ParallelConfig(sync_batchnorm=True))


def test_micro_batch_sizes() -> None:
    layouts = parse_layouts("1,2xddp,3xddp,2x2tp")
    assert common_size(layouts, 48) == 8, "of 48, 24, 16 and 24"
    assert (another_size(48, 8), another_size(48, 1), another_size(1, 1)) == (6, 2, None)
    assert [fitting_size(layouts, 48, size) for size in (48, 12, 8, 7, 4, 1)] == [8, 8, 8, 4, 4, 1]
    check_sizes(layouts, 48, 8)
    with pytest.raises(ConfigError, match=r"layout 3xddp: .*16 samples"):
        check_sizes(layouts, 48, 12)
    with pytest.raises(ConfigError, match=r"layout 3xddp: global_batch_size 32"):
        common_size(layouts, 32)


@pytest.mark.parametrize(
    "text",
    ["", "2", "0", "0xddp", "2xdpp", "2x2ddp", "2x2", "4xhsdp", "2x0hsdp", "4xtp", "2x0tp", "x", "2xddp4", "1@", "@8"],
)
def test_what_is_no_layout(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a layout"):
        parse_layout(text)


def test_lists_of_layouts() -> None:
    assert [layout.name for layout in parse_layouts("1, 2xddp,,2xddp")] == ["1", "2xddp"]
    with pytest.raises(ConfigError, match="fewer than two layouts"):
        parse_layouts("2xddp")
