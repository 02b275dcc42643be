"""Asynchronous max-all-reduce of one integer per rank, on the CPU.

Anything that changes control flow is decided from a reduced value (law 5). A vote starts before the work of a step and
is read after it, so the exchange overlaps with the computation. It uses its own gloo group on the host, so it neither
synchronizes with the device nor interleaves with training's collectives. Cost: one all-reduce of eight bytes, in the
background.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.distributed.synchronize_errors import is_distributed, new_group
from disttrain.system.stack_summary import waiting_for

_NAME: Final = "the vote on stopping"


class Votes:
    """Votes of all ranks. The constructor is collective: create it on every rank at the same point."""

    def __init__(self) -> None:
        self._group = new_group(backend="gloo") if is_distributed() else None
        self._value: Tensor | None = None
        self._work: dist.Work | None = None

    def close(self) -> None:
        """Destroy the group; no vote may be in progress."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def begin(self, own: int) -> None:
        """Start a vote with this rank's number, 0 or more, without waiting for its result. Collective.

        Does nothing if a vote is already in progress.
        """
        if self._value is not None:
            return
        self._value = torch.tensor([own], dtype=torch.int64)
        if self._group is not None:
            with waiting_for(_NAME):  # gloo may block here until the other ranks have joined
                self._work = dist.all_reduce(self._value, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def result(self) -> int:
        """Wait for the vote, and return the largest number, the same on all ranks; 0 if no vote is in progress."""
        if self._value is None:
            return 0
        value, work = self._value, self._work
        self._value = self._work = None
        if work is not None:
            with waiting_for(_NAME):
                work.wait()
        return int(value)

    def now(self, own: int) -> int:
        """Vote and wait for the result."""
        self.begin(own)
        return self.result()
