"""Batch arithmetic: exact, or an error that lists the sizes that work."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from disttrain.errors import ConfigError
from disttrain.parallel.config import BatchPlan, ParallelConfig, divisors

quick = settings(derandomize=True, deadline=None, max_examples=200)


@quick
@given(st.integers(1, 3000))
def test_divisors_are_all_of_them(n: int) -> None:
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@quick
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_a_plan_cuts_the_global_batch_exactly(ranks: int, accumulation: int, micro: int) -> None:
    plan = BatchPlan(ranks * accumulation * micro, micro, ranks)
    assert (plan.accumulation, plan.rank_batch_size) == (accumulation, accumulation * micro)


@quick
@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40))
def test_a_plan_is_exact_or_refused_with_sizes_that_work(batch: int, micro: int, ranks: int) -> None:
    if batch % (ranks * micro) == 0:
        plan = BatchPlan(batch, micro, ranks)
        assert plan.num_ranks * plan.accumulation * plan.micro_batch_size == batch
        return
    with pytest.raises(ConfigError) as caught:
        BatchPlan(batch, micro, ranks)
    first, _, batches = caught.value.hint.partition("global_batch_size")
    offered = [int(number) for number in re.findall(r"\d+", first)]
    assert offered, f"no size is offered: {caught.value}"
    for size in offered:  # each of them must work
        if batch % ranks:
            BatchPlan(batch, 1, size)
        else:
            BatchPlan(batch, size, ranks)
    for size in map(int, re.findall(r"\d+", batches)):
        assert size % ranks == 0, f"global_batch_size {size} does not go over {ranks} ranks: {caught.value}"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (64, 16, 3),
            "global_batch_size 64 cannot be divided evenly over 3 ranks\n"
            "  hint: use 1, 2, 4, 8, 16, 32 or 64 ranks, or global_batch_size 63 or 66",
        ),
        (
            (2, 1, 3),
            "global_batch_size 2 cannot be divided evenly over 3 ranks\n"
            "  hint: use 1 or 2 ranks, or global_batch_size 3",
        ),
        (
            (64, 5, 4),
            "micro_batch_size 5 does not divide the 16 samples that each of 4 ranks takes from global_batch_size 64\n"
            "  hint: use micro_batch_size 1, 2, 4, 8 or 16",
        ),
        (
            (5040, 11, 1),
            "micro_batch_size 11 does not divide the 5040 samples that each of 1 ranks takes from global_batch_size"
            " 5040\n  hint: use micro_batch_size 1, 2, 3, 4, 5, 6, ..., 1008, 1260, 1680, 2520 or 5040",
        ),
        ((1, 2, 1), "use micro_batch_size 1"),
        ((0, 1, 1), "global_batch_size is 0"),
        ((8, 0, 1), "micro_batch_size is 0"),
        ((8, 1, -2), "num_ranks is -2"),
    ],
)
def test_the_messages_say_what_works(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BatchPlan(*sizes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strategy": "dp"}, "parallel.strategy is 'dp'"),
        ({"bucket_mib": 0}, "parallel.bucket_mib is 0"),
        ({"activation_checkpointing": "all"}, "parallel.activation_checkpointing is 'all'"),
        ({"reduce_dtype": "fp16"}, "parallel.reduce_dtype is 'fp16'"),
        ({"reduce_dtype": "bf16", "reduction": "tree"}, "which rounds each rank's sum"),
        ({"reduction": "trie"}, "parallel.reduction is 'trie'"),
        ({"reduction": "tree", "find_unused_parameters": True}, "needs a gradient of every parameter"),
        ({"strategy": "fsdp", "replicate": 0}, "parallel.replicate is 0"),
        ({"strategy": "fsdp", "shard": -2}, "parallel.shard is -2"),
        ({"strategy": "fsdp", "replicate": -1}, "parallel.replicate and parallel.shard are both -1"),
        ({"strategy": "fsdp", "tensor": -1}, "parallel.shard and parallel.tensor are both -1"),
        ({"strategy": "fsdp", "replicate": -1, "tensor": -1}, "parallel.shard and parallel.tensor are all -1"),
        ({"strategy": "fsdp", "tensor": 0}, "parallel.tensor is 0"),
        ({"replicate": 2}, "are for fsdp, but parallel.strategy is ddp"),
        ({"tensor": 2}, "are for fsdp, but parallel.strategy is ddp"),
        ({"strategy": "fsdp", "tensor": 2, "sync_batchnorm": True}, "several ranks count the same samples"),
        ({"compile": "all"}, "parallel.compile is 'all'"),
        ({"offload": True}, "parallel.offload is for fsdp, but parallel.strategy is ddp"),
        ({"reshard_after_forward": False}, "parallel.reshard_after_forward is for fsdp"),
        ({"strategy": "fsdp", "bucket_mib": 3}, "parallel.bucket_mib is for ddp, but parallel.strategy is fsdp"),
        ({"strategy": "fsdp", "find_unused_parameters": True}, "parallel.find_unused_parameters is for ddp"),
        ({"strategy": "fsdp", "static_graph": True}, "parallel.static_graph is for ddp"),
        ({"strategy": "fsdp", "gradient_as_bucket_view": False}, "parallel.gradient_as_bucket_view is for ddp"),
        ({"static_graph": True, "find_unused_parameters": True}, "find_unused_parameters searches again"),
        ({"static_graph": True, "reduction": "tree"}, "tree needs a gradient of every parameter"),
        ({"strategy": "fsdp", "offload": True, "reduction": "tree"}, "parallel.offload is true"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ParallelConfig(**arguments)


@pytest.mark.parametrize(
    ("degrees", "ranks", "expected"),
    [
        ((1, -1, 1), 1, (1, 1, 1)),
        ((1, -1, 1), 6, (1, 6, 1)),
        ((2, -1, 1), 6, (2, 3, 1)),
        ((-1, 2, 1), 6, (3, 2, 1)),
        ((2, 3, 1), 6, (2, 3, 1)),
        ((-1, 1, 1), 1, (1, 1, 1)),
        ((1, -1, 2), 6, (1, 3, 2)),
        ((1, -1, 2), 2, (1, 1, 2)),
        ((-1, 2, 2), 8, (2, 2, 2)),
        ((2, 2, -1), 8, (2, 2, 2)),
    ],
)
def test_degrees_are_derived_from_the_ranks(
    degrees: tuple[int, int, int], ranks: int, expected: tuple[int, int, int]
) -> None:
    replicate, shard, tensor = degrees
    config = ParallelConfig(strategy="fsdp", replicate=replicate, shard=shard, tensor=tensor)
    assert config.degrees(ranks) == expected
    assert config.degrees(ranks).data == expected[0] * expected[1]


def test_ddp_copies_the_model_to_every_rank() -> None:
    assert ParallelConfig().degrees(6) == (6, 1, 1)


@quick
@given(st.integers(-1, 7), st.integers(-1, 7), st.integers(-1, 4), st.integers(1, 12))
def test_degrees_fit_or_those_that_do_are_listed(replicate: int, shard: int, tensor: int, ranks: int) -> None:
    asked = (replicate, shard, tensor)
    if 0 in asked or asked.count(-1) > 1:
        return
    config = ParallelConfig(strategy="fsdp", replicate=replicate, shard=shard, tensor=tensor)
    fits = [
        (ranks // t // s, s, t)
        for t in divisors(ranks)
        for s in divisors(ranks // t)
        if s > 1 or ranks == t  # copies that share nothing are DDP's
    ]
    wanted = [fit for fit in fits if all(degree in (-1, given) for degree, given in zip(asked, fit, strict=True))]
    if wanted:
        assert [config.degrees(ranks)] == wanted
        return
    with pytest.raises(ConfigError) as caught:
        config.degrees(ranks)
    offered = re.findall(r"(\d+) x (\d+)(?: x (\d+))?", caught.value.hint)
    assert offered, str(caught.value)
    for copies, parts, layers in offered:
        assert (int(copies), int(parts), int(layers or 1)) in fits, str(caught.value)


def test_nothing_to_shard_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves nothing to shard on 4 ranks") as caught:
        ParallelConfig(strategy="fsdp", replicate=4).degrees(4)
    assert caught.value.hint == "use replicate x shard of 2 x 2 or 1 x 4, or parallel.strategy: ddp"


def test_configurations_are_frozen_values() -> None:
    assert ParallelConfig() == ParallelConfig(strategy="ddp", bucket_mib=25)
    assert hash(BatchPlan(8, 4)) == hash(BatchPlan(8, 4, 1))
    with pytest.raises(AttributeError):
        BatchPlan(8, 4).num_ranks = 2  # type: ignore[misc]
