"""The tree of sums: every cut of the micro batches over ranks adds the same pairs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from disttrain.parallel.reduction.tree import merges, nodes_within, plan_tree, split

quick = settings(derandomize=True, deadline=None, max_examples=200)


def whole(first: int, end: int) -> Any:
    """The tree over some leaves, as nested pairs."""
    if end - first == 1:
        return first
    middle = split((first, end))
    return (whole(first, middle), whole(middle, end))


def added_by(counts: tuple[int, ...], values: list[Any]) -> list[Any]:
    """What a stack holds after the additions that a plan asks for."""
    stack: list[Any] = []
    for value, count in zip(values, counts, strict=True):
        stack.append(value)
        for _ in range(count):
            right = stack.pop()
            stack[-1] = (stack[-1], right)
    return stack


@quick
@given(st.integers(1, 40), st.integers(1, 40))
def test_every_cut_over_ranks_adds_the_same_pairs(ranks: int, accumulation: int) -> None:
    plan = plan_tree(ranks, accumulation)
    sent: list[Any] = []
    for rank in range(ranks):
        own = added_by(plan.own_merges[rank], list(range(rank * accumulation, (rank + 1) * accumulation)))
        assert len(own) == plan.sent[rank]
        sent += own
    assert added_by(plan.joint_merges, sent) == [whole(0, ranks * accumulation)]


@quick
@given(st.integers(0, 6), st.integers(0, 6))
def test_with_powers_of_two_each_rank_sends_one_sum(ranks: int, accumulation: int) -> None:
    assert plan_tree(2**ranks, 2**accumulation).sent == (1,) * 2**ranks


@quick
@given(st.integers(1, 200), st.data())
def test_a_run_is_filled_by_few_nodes(num_leaves: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, num_leaves - 1))
    end = data.draw(st.integers(first + 1, num_leaves))
    nodes = nodes_within(first, end, num_leaves)
    assert [leaf for a, b in nodes for leaf in range(a, b)] == list(range(first, end))
    assert len(nodes) <= 2 * (end - first).bit_length()
    assert merges(nodes, num_leaves) == (0,) * len(nodes), "larger nodes would do"


def test_the_tree_is_frozen() -> None:
    """Another tree gives other bits to runs that are resumed."""
    assert whole(0, 6) == (((0, 1), (2, 3)), (4, 5))
    assert whole(0, 7) == (((0, 1), (2, 3)), ((4, 5), 6))
    assert nodes_within(3, 6, 12) == ((3, 4), (4, 6))
    assert plan_tree(4, 3).sent == (2, 2, 2, 2)


@pytest.mark.parametrize(("leaves", "exponent"), [(1, 0), (2, 1), (3, 2), (8, 3), (9, 4), (12, 4)])
def test_the_scale_is_near_that_of_a_mean(leaves: int, exponent: int) -> None:
    assert plan_tree(1, leaves).scale_exponent == exponent
