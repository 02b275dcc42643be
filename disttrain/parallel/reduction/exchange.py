"""Sum the gradients of micro batches in a fixed tree, for any ranks and strategy: ``reduction: tree``.

A rank keeps the partial sums of its own micro batches (:class:`PartialSums`). Each element of a gradient has one owner
rank. In the last micro batch, during the backward pass, every rank sends its partial sums to their owners, which add
them in tree order (:class:`Exchange`). Under DDP, a communication hook does this for each bucket and then gathers the
parts (:class:`BucketHook`); under FSDP, a reduce-scatter does, and the owner keeps its part
(:class:`TreeReduceScatter`). All additions are elementwise, of two tensors in their own precision, so the bits do not
depend on where a bucket or shard begins.

Cost: as many bytes as a ring all-reduce or reduce-scatter if the accumulation is a power of two, otherwise a few times
as many; memory for ``log2(accumulation) + 1`` gradients while a step accumulates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from disttrain.parallel.reduction.tree import TreePlan, plan_tree

Tensors = list[Tensor]


class PartialSums:
    """One rank's gradients in the current step: a stack of the tree's partial sums, each with one tensor per parameter.

    Args:
        rank: this rank.
    """

    def __init__(self, rank: int) -> None:
        self.plan = plan_tree(rank + 1, 1)
        self.count = 0
        """Micro batches added in this step."""
        self._rank = rank
        self._stack: list[Tensors] = []

    def start(self, plan: TreePlan) -> None:
        """Begin a step, discarding what an interrupted one has left."""
        self.plan, self.count = plan, 0
        self._stack.clear()

    def add(self, gradients: Tensors) -> None:
        """Add the gradients of a micro batch that is not the last. Keeps and modifies the tensors."""
        self._stack.append(gradients)
        for _ in range(self.plan.own_merges[self._rank][self.count]):
            newest = self._stack.pop()
            torch._foreach_add_(self._stack[-1], newest)
        self.count += 1

    def kept(self, numbers: Sequence[int]) -> tuple[list[Tensors], list[Tensors]]:
        """Return the partial sums of some parameters, given by their positions in the lists passed to :meth:`add`.

        Returns:
            The partial sums to add to the last micro batch's gradients, in this order; and those that the tree adds
            later, which are sent separately.
        """
        apart = len(self._stack) - self.plan.own_merges[self._rank][-1]
        of_these = [[partial[number] for number in numbers] for partial in self._stack]
        return of_these[apart:][::-1], of_these[:apart]

    def finish(self, numbers: Sequence[int], gradients: Tensors) -> list[Tensors]:
        """Add partial sums to the last micro batch's gradients, in place; return those to be sent separately."""
        merged, apart = self.kept(numbers)
        for partial in merged:
            torch._foreach_add_(gradients, partial)
        return apart


class Exchange:
    """Adds all ranks' partial sums in tree order; each rank adds one part of every tensor.

    Calls must run one after the other, on one thread or stream: they share a buffer of the largest size needed.

    Args:
        group: a group of all ranks, which must call its collectives in the same order.
        rank: this rank.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self._group, self._rank = group, rank
        self._buffers: dict[torch.dtype, Tensor] = {}

    def add(self, parts: Tensor, sizes: Sequence[int], plan: TreePlan) -> Tensor:
        """Exchange partial sums and add this rank's part. Collective over the group.

        Args:
            parts: this rank's partial sums, ordered by owner and then by partial sum; one-dimensional.
            sizes: number of elements in each owner's part.
            plan: the order of additions.

        Returns:
            The sum of this rank's part over all ranks, shape (elements,), valid until the next call.
        """
        elements = sizes[self._rank]
        received = self._buffer(parts, sum(plan.sent) * elements)
        dist.all_to_all_single(
            received,
            parts,
            output_split_sizes=[count * elements for count in plan.sent],
            input_split_sizes=[plan.sent[self._rank] * size for size in sizes],
            group=self._group,
        )
        stack: Tensors = []
        for partial, count in zip(
            received.view(len(plan.joint_merges), elements).unbind(), plan.joint_merges, strict=True
        ):
            stack.append(partial)
            for _ in range(count):
                newest = stack.pop()
                stack[-1].add_(newest)
        return stack[0]

    def gather(self, parts: Sequence[Tensor], own: Tensor) -> None:
        """All-gather: fill ``parts`` with every rank's ``own``. Collective over the group."""
        if dist.get_backend(self._group) != "gloo":
            dist.all_gather(list(parts), own, group=self._group)
            return
        # gloo's all-gather took 2.5 times as long as sending to each rank (4 ranks, 33 MB, one machine).
        parts[self._rank].copy_(own)
        others = [(self._rank + distance) % len(parts) for distance in range(1, len(parts))]
        sent = [dist.isend(own, to, group=self._group) for to in others]
        sent += [dist.irecv(parts[source], source, group=self._group) for source in reversed(others)]
        for work in sent:
            if work is not None:
                work.wait()

    def _buffer(self, like: Tensor, elements: int) -> Tensor:
        kept = self._buffers.get(like.dtype)
        if kept is None or kept.numel() < elements:
            self._buffers.pop(like.dtype, None)
            del kept
            kept = self._buffers[like.dtype] = like.new_empty(elements)
        return kept[:elements]


class TreeReduceScatter(ReduceScatter):
    """Custom FSDP2 reduce-scatter of one parameter group, in tree order, including the reduction over replicas.

    With replicas, the ranks that hold the same shard each own a part of its sum. Each returns its part and zeros
    elsewhere. FSDP2's subsequent all-reduce over the replicas then only adds zeros to each number, which is exact.

    Args:
        sums: partial sums of the earlier micro batches.
        exchange: covers all ranks.
        replicas: number of copies of each shard.
        shards: number of parts of each tensor.
        rank: this rank, ``replica * shards + shard``.
    """

    def __init__(self, sums: PartialSums, exchange: Exchange, *, replicas: int, shards: int, rank: int) -> None:
        self.numbers = range(0)
        """Positions of the group's parameters in the current step's sums."""
        self._sums, self._exchange = sums, exchange
        self._replicas, self._shards = replicas, shards
        self._replica = rank // shards
        self._held: list[object] = []
        self._called = False

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a buffer for FSDP2's copies."""
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """Reduce; FSDP2 calls this in the last micro batch's backward pass, in the same order on all ranks."""
        if self._called:
            raise RuntimeError(
                "reduction: tree, and the gradients of a sharded block came in two parts whose order is not fixed;"
                " use reduction: fast, or leave the block out of shard_units()"
            )
        plan, replicas = self._sums.plan, self._replicas
        elements = output_tensor.numel()
        piece = -(-elements // replicas)
        own = self._exchange.add(self._parts(input_tensor, elements, piece), [piece] * plan.num_ranks, plan)
        if replicas > 1:
            output_tensor.zero_()
        first = self._replica * piece
        output_tensor[first : first + piece] = own[: max(0, min(piece, elements - first))]
        self._called = True

    def release(self) -> None:
        """Free the tensors that the collectives read; call after the backward pass."""
        self._held.clear()
        self._called = False

    def _parts(self, newest: Tensor, elements: int, piece: int) -> Tensor:
        """Return this rank's partial sums ordered by owner, with ``piece`` elements per owner and partial sum."""
        shards, replicas = self._shards, self._replicas
        flat = [*self._older(newest), newest]
        parts = (newest if len(flat) == 1 else torch.stack(flat)).view(len(flat), shards, elements)
        if piece * replicas != elements:
            parts = nn.functional.pad(parts, (0, piece * replicas - elements))
        # From (partial sum, shard, replica, element) to (replica, shard, partial sum, element): ordered by owner.
        return parts.view(len(flat), shards, replicas, piece).permute(2, 1, 0, 3).contiguous().view(-1)

    def _older(self, newest: Tensor) -> Tensors:
        """Add kept partial sums to the newest one, in FSDP2's memory layout; return those to be sent separately."""
        rows = newest.view(self._shards, -1)

        def laid_out(partial: Tensors) -> Tensor:
            out = torch.empty_like(rows)
            torch._chunk_cat(partial, dim=0, num_chunks=self._shards, out=out)
            return out.view(-1)

        merged, apart = self._sums.kept(self.numbers)
        self._held += [merged, apart]  # created on another stream: keep them alive until this one has read them
        for partial in merged:
            newest.add_(laid_out(partial))
        return [laid_out(partial) for partial in apart]
