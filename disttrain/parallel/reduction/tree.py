"""The fixed binary tree in which a step's micro-batch gradients are added.

The leaves are the micro batches of a global batch, numbered ``rank * accumulation + position on the rank``. The tree
depends only on their number (a node of n leaves has the largest power of two below n on its left). A rank holds a
contiguous range of leaves, and so some whole nodes: it sums those locally, and the rest is summed across ranks.
Whichever rank adds them, the same pairs are added, so the sum is bit-identical for every number of ranks.

Cost: none per step; the plan is made once. A rank holds at most ``log2(accumulation) + 1`` partial sums at a time. With
powers of two it ends with one; otherwise with a few, and sends each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

Node = tuple[int, int]
"""A range of micro batches ``[first, end)`` that forms a subtree."""


def split(node: Node) -> int:
    """Return where a node of two or more leaves splits into left and right."""
    first, end = node
    return first + (1 << ((end - first - 1).bit_length() - 1))


def nodes_within(first: int, end: int, num_leaves: int) -> tuple[Node, ...]:
    """Return the largest nodes of the tree inside ``[first, end)``, left to right; together they cover it."""

    def inside(node: Node) -> list[Node]:
        if first <= node[0] and node[1] <= end:
            return [node]
        if node[1] <= first or end <= node[0]:
            return []
        middle = split(node)
        return inside((node[0], middle)) + inside((middle, node[1]))

    return tuple(inside((0, num_leaves)))


def merges(nodes: Sequence[Node], num_leaves: int) -> tuple[int, ...]:
    """Return how often, after each node arriving left to right, the newest two partial sums are merged."""
    open_nodes: list[Node] = []
    counts = []
    for node in nodes:
        open_nodes.append(node)
        count = 0
        while len(open_nodes) > 1 and _is_node((open_nodes[-2][0], open_nodes[-1][1]), num_leaves):
            right = open_nodes.pop()
            open_nodes[-1] = (open_nodes[-1][0], right[1])
            count += 1
        counts.append(count)
    return tuple(counts)


@dataclass(frozen=True)
class TreePlan:
    """Which rank adds what in a step.

    Attributes:
        num_ranks: number of ranks that share the micro batches.
        accumulation: micro batches per rank.
        sent: for each rank, how many partial sums it ends with.
        own_merges: for each rank and each of its micro batches, how many additions follow it locally.
        joint_merges: for each partial sum of all ranks, in rank order, how many additions follow it.
    """

    num_ranks: int
    accumulation: int
    sent: tuple[int, ...]
    own_merges: tuple[tuple[int, ...], ...]
    joint_merges: tuple[int, ...]

    @property
    def num_leaves(self) -> int:
        """Micro batches per step, over all ranks."""
        return self.num_ranks * self.accumulation

    @property
    def scale_exponent(self) -> int:
        """Gradients are scaled by ``2 ** -scale_exponent``: exact, and close to the mean over micro batches."""
        return (self.num_leaves - 1).bit_length()


@cache
def plan_tree(num_ranks: int, accumulation: int) -> TreePlan:
    """Return the plan for a number of ranks and of micro batches per rank."""
    total = num_ranks * accumulation
    runs = [(rank * accumulation, (rank + 1) * accumulation) for rank in range(num_ranks)]
    held = [nodes_within(first, end, total) for first, end in runs]
    return TreePlan(
        num_ranks=num_ranks,
        accumulation=accumulation,
        sent=tuple(len(nodes) for nodes in held),
        own_merges=tuple(merges([(i, i + 1) for i in range(first, end)], total) for first, end in runs),
        joint_merges=merges([node for nodes in held for node in nodes], total),
    )


def _is_node(node: Node, num_leaves: int) -> bool:
    at = (0, num_leaves)
    while at != node:
        if at[1] - at[0] <= 1:
            return False
        middle = split(at)
        if node[1] <= middle:
            at = (at[0], middle)
        elif node[0] >= middle:
            at = (middle, at[1])
        else:
            return False
    return True
