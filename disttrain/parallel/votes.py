"""A number that every rank brings, and its maximum that all of them get, without waiting for any device.

Whatever changes control flow is decided from a reduced value (law 5). A vote begins before the work of a step
and is read after it, so the ranks exchange it while they compute. It has a gloo group of its own on the host:
it neither waits for the device nor gets between the collectives of training. Cost: one all-reduce of eight
bytes, in the background.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.parallel.agree import is_distributed, new_group
from disttrain.whereabouts import waiting_for

_NAME: Final = "the vote on stopping"


class Votes:
    """Votes of all ranks. To be made on every rank at the same place: that is a collective."""

    def __init__(self) -> None:
        self._group = new_group(backend="gloo") if is_distributed() else None
        self._value: Tensor | None = None
        self._work: dist.Work | None = None

    def close(self) -> None:
        """End the group; no vote may be under way."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def begin(self, own: int) -> None:
        """Bring this rank's number, 0 or more; every rank does so. Does not wait.

        A vote that is under way already stays as it is.
        """
        if self._value is not None:
            return
        self._value = torch.tensor([own], dtype=torch.int64)
        if self._group is not None:
            with waiting_for(_NAME):  # gloo may hold it up until the others have joined
                self._work = dist.all_reduce(self._value, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def result(self) -> int:
        """The largest number that was brought, the same on all ranks; 0 where no vote is under way."""
        if self._value is None:
            return 0
        value, work = self._value, self._work
        self._value = self._work = None
        if work is not None:
            with waiting_for(_NAME):
                work.wait()
        return int(value)

    def now(self, own: int) -> int:
        """A vote begun and read at once."""
        self.begin(own)
        return self.result()
