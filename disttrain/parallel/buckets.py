"""DDP's buckets of gradients, summed in the tree of ``reduction: tree`` while the backward pass runs.

Guarantee: all ranks go through the buckets in one order, whatever happens to one of them. Where memory does not suffice
for a bucket, and the run is to survive that (:mod:`disttrain.parallel.out_of_memory`), this bucket and those after it
wait until the backward pass is over; then, with its activations gone, the rank takes part in their exchange with zeros,
and the step is thrown away by all.

Cost: see :mod:`disttrain.parallel.reduction`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future as FutureOfThread
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from disttrain.parallel.out_of_memory import no_way_back
from disttrain.parallel.reduction import EXCHANGING, Exchange, PartialSums, Tensors

_Future = torch.futures.Future[Tensor]


class BucketHook:
    """DDP's communication hook: one bucket's gradients, summed over all ranks and gathered.

    On the CPU a thread of its own runs the collectives, one bucket after the other, beside the backward pass; on
    CUDA a stream does.

    Args:
        sums: the partial sums of the earlier micro batches.
        parameters: the parameters in the order of those sums.
        exchange: over a group that nothing else uses, since its collectives come from another thread.
        lacks_memory: told of an error; whether the step will be thrown away for it, so that any sums will do.
    """

    def __init__(
        self,
        sums: PartialSums,
        parameters: Sequence[nn.Parameter],
        exchange: Exchange,
        lacks_memory: Callable[[Exception], bool],
    ) -> None:
        self.sums, self._exchange, self._lacks_memory = sums, exchange, lacks_memory
        self._number = {id(parameter): number for number, parameter in enumerate(parameters)}
        self._held: list[object] = []  # what a side stream still reads
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tree-reduction")
        self._stream: torch.cuda.Stream | None = None
        self._late: list[tuple[Tensor, _Future]] = []  # buckets that memory did not suffice for, and those after them
        self._last: FutureOfThread[None] | None = None  # of what the thread was given
        self._error: Exception | None = None  # of the thread

    def install(self, model: DistributedDataParallel) -> None:
        """Let DDP call this hook."""

        def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
            return self(bucket)

        model.register_comm_hook(None, hook)

    def __call__(self, bucket: GradBucket) -> _Future:
        """Called by DDP in the backward pass of the last micro batch; all ranks go through buckets in one order."""
        # Runs when the backward pass is over, before DDP's own callback waits for the buckets.
        torch.autograd.Variable._execution_engine.queue_callback(self._catch_up)
        buffer, flat = bucket.buffer(), self._laid_out(bucket)
        if buffer.is_cuda:
            future: _Future = torch.futures.Future(devices=[buffer.device])
            with torch.cuda.stream(self._side_stream(buffer)):
                self._run(flat, buffer, future)
            return future
        future = torch.futures.Future()
        self._last = self._worker.submit(self._run_aside, flat, buffer, future)
        return future

    def release(self) -> None:
        """After the backward pass: let go of what the collectives read."""
        self._catch_up()
        self._held.clear()

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown()

    def _laid_out(self, bucket: GradBucket) -> Tensors | None:
        """The partial sums of a bucket that are sent by themselves; None where there is no memory for them."""
        buffer, gradients = bucket.buffer(), bucket.gradients()
        try:
            with torch.no_grad():
                older = self.sums.finish([self._number[id(p)] for p in bucket.parameters()], gradients)
            flat = [_like_bucket(self._exchange, buffer, gradients, partial) for partial in older]
        except Exception as error:
            if not self._lacks_memory(error):
                raise
            return None
        if buffer.is_cuda:
            self._held += [flat, older]
        return flat

    def _side_stream(self, buffer: Tensor) -> torch.cuda.Stream:
        self._stream = self._stream or torch.cuda.Stream(buffer.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        return self._stream

    def _run(self, flat: Tensors | None, buffer: Tensor, future: _Future) -> None:
        """Sum a bucket now, or leave it for later where there is no memory, or where an earlier one was left."""
        if flat is not None and not self._late:
            try:
                future.set_result(self._reduce([*flat, buffer]))
                return
            except Exception as error:
                if not self._lacks_memory(error):
                    raise
        self._late.append((buffer, future))

    def _run_aside(self, flat: Tensors | None, buffer: Tensor, future: _Future) -> None:
        try:
            if self._error is None:
                self._run(flat, buffer, future)
        except Exception as error:
            self._error = error

    def _catch_up(self) -> None:
        """Take part, with zeros, in the exchange of the buckets that were left; raise what the thread met."""
        if self._last is not None:
            self._last.result()
            self._last = None
        if self._error is not None:
            raise self._error
        if not self._late:
            return
        if self._stream is not None:
            self._stream.synchronize()
        self._held.clear()
        self.sums.forget()
        late, self._late = self._late, []
        if late[0][0].is_cuda:
            torch.cuda.empty_cache()
        for buffer, future in late:
            with no_way_back(EXCHANGING):
                flat = self._exchange.empty(buffer, (self.sums.num_sent - 1) * buffer.numel()).zero_()
                pieces = list(flat.view(self.sums.num_sent - 1, buffer.numel()))
                future.set_result(self._reduce([*pieces, buffer]))

    @torch.no_grad()
    def _reduce(self, flat: Tensors) -> Tensor:
        """Sum partial sums of one bucket over all ranks into the newest of them, which is the bucket itself."""
        plan, buffer = self.sums.plan, flat[-1]
        each, more = divmod(buffer.numel(), plan.num_ranks)
        sizes = [each + (owner < more) for owner in range(plan.num_ranks)]
        by_owner = [torch.split(partial, sizes) for partial in flat]
        parts = (
            buffer
            if len(flat) == 1
            else torch.cat(
                [part for owned in zip(*by_owner, strict=True) for part in owned],
                out=self._exchange.empty(buffer, len(flat) * buffer.numel()),
            )
        )
        self._exchange.gather(by_owner[-1], self._exchange.add(parts, sizes, plan))
        return buffer


def _like_bucket(exchange: Exchange, buffer: Tensor, gradients: Tensors, partial: Tensors) -> Tensor:
    """A partial sum laid out as the gradients of a bucket are."""
    flat = exchange.empty(buffer, buffer.numel()).zero_()
    offset = int(buffer.storage_offset())
    views = [flat.as_strided(g.size(), g.stride(), g.storage_offset() - offset) for g in gradients]
    torch._foreach_copy_(views, partial)
    return flat


def settle_buckets(model: DistributedDataParallel) -> None:
    """Let DDP rebuild its buckets now instead of after the first step.

    DDP lays its buckets out anew, once, by the order in which the first backward pass brings the gradients.
    A sum over three ranks or more depends in its last bits on that layout, so the first step of a resumed
    run would differ from the same step of an uninterrupted one. A backward pass through the parameters
    alone, with zero gradients, makes the layout the same from the first step on.
    """
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]  # a module that accumulates by hand has some where DDP is built again
    for parameter in parameters:
        parameter.grad = None
    model.reducer.prepare_for_backward([])
    total = sum((p.sum() * 0.0 for p in parameters), start=torch.zeros((), device=parameters[0].device))
    total.backward()
    model.reducer._rebuild_buckets()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
