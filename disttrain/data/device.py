"""Batches from pinned host memory to a CUDA device, while the step before still runs.

Copies go through a stream of their own, so they wait for no kernel of the training; the training's stream waits
for the copy that it needs, and the host for neither. The host's batch is held until its copy is done, so that no reader
is given its memory before, wherever that comes from: the allocator of pinned memory waits for copies only of tensors
whose storage it made itself, not of arrays of NumPy over the same block (CachingHostAllocator.h: ``record_event``).
On other devices a batch is moved as Lightning moves it. Cost: one event a batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


class DeviceCopier:
    """Copies batches to one device.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._under_way: deque[tuple[Any, Any]] = deque()  # the end of each copy, and the batch that it reads

    def __call__(self, batch: Any) -> Any:
        """The batch on the device; its tensors may be used on the current stream."""
        if self._stream is None:
            return move_data_to_device(batch, self.device)
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()
        current = torch.cuda.current_stream(self.device)
        stream = current if _has_objects(batch) else self._stream
        with torch.cuda.stream(stream):
            moved = move_data_to_device(batch, self.device)  # asynchronous from pinned memory
        copied = stream.record_event()
        self._under_way.append((copied, dict(batch) if isinstance(batch, dict) else batch))
        current.wait_event(copied)
        # Their memory may not be given to the copying stream again before the training is done with it.
        apply_to_collection(moved, Tensor, lambda tensor: tensor.record_stream(current))
        return moved


def _has_objects(batch: Any) -> bool:
    """Whether a batch has objects of a class of their own that are moved by their ``to``.

    Nobody can say of the tensors inside that the training uses them, so they are copied on its own stream.
    """
    if isinstance(batch, dict):
        return any(map(_has_objects, batch.values()))
    if isinstance(batch, (list, tuple)):
        return bool(batch) and not isinstance(batch[0], str) and any(map(_has_objects, batch))
    return not isinstance(batch, Tensor) and callable(getattr(batch, "to", None))


def uses_cuda() -> bool:
    """Whether this process uses CUDA already: nothing here starts it, in a worker process or beside a CPU training."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def same_device() -> Callable[[], None]:
    """A function for a new thread to call first: it selects the CUDA device of the thread that asked for it here.

    A thread begins on device 0. On the ranks of the other devices, work that CUDA does for it would go there: each
    rank would take memory of device 0, and wait for what runs on it.
    """
    if not uses_cuda():
        return _nothing
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def _nothing() -> None:
    pass
