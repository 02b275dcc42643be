"""Reduce DDP's gradient buckets in tree order (``reduction: tree``) during the backward pass.

Guarantee: all ranks process the buckets in the same order.

Cost: see :mod:`disttrain.parallel.reduction.exchange`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future as FutureOfThread, ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from disttrain.parallel.reduction.exchange import Exchange, PartialSums, Tensors

_Future = torch.futures.Future[Tensor]


class BucketHook:
    """DDP communication hook that sums one bucket's gradients over all ranks and gathers the result.

    The collectives overlap the backward pass, one bucket after the other: in a dedicated thread on the CPU, in a
    stream on CUDA.

    Args:
        sums: partial sums of the earlier micro batches.
        parameters: the parameters in the order of those sums.
        exchange: uses a dedicated process group, since its collectives run in another thread.
    """

    def __init__(self, sums: PartialSums, parameters: Sequence[nn.Parameter], exchange: Exchange) -> None:
        self.sums, self._exchange = sums, exchange
        self._number = {id(parameter): number for number, parameter in enumerate(parameters)}
        self._held: list[object] = []  # tensors that a side stream still reads
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tree-reduction")
        self._stream: torch.cuda.Stream | None = None
        self._last: FutureOfThread[None] | None = None  # the last task submitted to the thread
        self._error: Exception | None = None  # raised in the thread

    def install(self, model: DistributedDataParallel) -> None:
        """Register this hook with DDP."""

        def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
            return self(bucket)

        model.register_comm_hook(None, hook)

    def __call__(self, bucket: GradBucket) -> _Future:
        """Reduce a bucket; DDP calls this in the last micro batch's backward pass, in the same order on all ranks."""
        # Runs at the end of the backward pass, before DDP's own callback waits for the buckets' futures. After an error
        # in the thread, these never complete and DDP would wait forever.
        torch.autograd.Variable._execution_engine.queue_callback(self._wait)
        buffer, flat = bucket.buffer(), self._laid_out(bucket)
        if buffer.is_cuda:
            future: _Future = torch.futures.Future(devices=[buffer.device])
            with torch.cuda.stream(self._side_stream(buffer)):
                future.set_result(self._reduce([*flat, buffer]))
            return future
        future = torch.futures.Future()
        self._last = self._worker.submit(self._run_aside, flat, buffer, future)
        return future

    def release(self) -> None:
        """Free the tensors that the collectives read; call after the backward pass."""
        self._wait()
        self._held.clear()

    def close(self) -> None:
        """Stop the thread."""
        self._worker.shutdown()

    def _laid_out(self, bucket: GradBucket) -> Tensors:
        """Add what can be added locally to a bucket; return its other partial sums, which are sent separately."""
        buffer, gradients = bucket.buffer(), bucket.gradients()
        with torch.no_grad():
            older = self.sums.finish([self._number[id(p)] for p in bucket.parameters()], gradients)
        flat = [_like_bucket(buffer, gradients, partial) for partial in older]
        if buffer.is_cuda:
            self._held += [flat, older]
        return flat

    def _side_stream(self, buffer: Tensor) -> torch.cuda.Stream:
        self._stream = self._stream or torch.cuda.Stream(buffer.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        return self._stream

    def _run_aside(self, flat: Tensors, buffer: Tensor, future: _Future) -> None:
        try:
            if self._error is None:
                future.set_result(self._reduce([*flat, buffer]))
        except Exception as error:
            self._error = error

    def _wait(self) -> None:
        """Wait for the thread; raise its error, if any."""
        if self._last is not None:
            self._last.result()
            self._last = None
        if self._error is not None:
            raise self._error

    @torch.no_grad()
    def _reduce(self, flat: Tensors) -> Tensor:
        """Sum one bucket's partial sums over all ranks, into the newest one, which is the bucket itself."""
        plan, buffer = self.sums.plan, flat[-1]
        each, more = divmod(buffer.numel(), plan.num_ranks)
        sizes = [each + (owner < more) for owner in range(plan.num_ranks)]
        by_owner = [torch.split(partial, sizes) for partial in flat]
        parts = (
            buffer if len(flat) == 1 else torch.cat([part for owned in zip(*by_owner, strict=True) for part in owned])
        )
        self._exchange.gather(by_owner[-1], self._exchange.add(parts, sizes, plan))
        return buffer


def _like_bucket(buffer: Tensor, gradients: Tensors, partial: Tensors) -> Tensor:
    """Return a partial sum in the memory layout of a bucket's gradients."""
    flat = buffer.new_zeros(buffer.numel())
    offset = int(buffer.storage_offset())
    views = [flat.as_strided(g.size(), g.stride(), g.storage_offset() - offset) for g in gradients]
    torch._foreach_copy_(views, partial)
    return flat


def settle_buckets(model: DistributedDataParallel) -> None:
    """Make DDP rebuild its buckets now instead of after the first step.

    DDP rebuilds its buckets once, in the order in which the first backward pass produces gradients. With three or more
    ranks, the last bits of a sum depend on the bucket layout, so the first step of a resumed run would differ from the
    same step of an uninterrupted one. A backward pass through only the parameters, with zero gradients, fixes the
    layout before the first step.
    """
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]  # with manual accumulation, some exist when DDP is rebuilt
    for parameter in parameters:
        parameter.grad = None
    model.reducer.prepare_for_backward([])
    total = sum((p.sum() * 0.0 for p in parameters), start=torch.zeros((), device=parameters[0].device))
    total.backward()
    model.reducer._rebuild_buckets()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
