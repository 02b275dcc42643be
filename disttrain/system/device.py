"""Copy batches from pinned host memory to a CUDA device while the previous step still runs.

Copies run on a separate stream, so they do not wait for training kernels. The training stream waits for the copy that
it needs; the host waits for neither. The host batch is kept alive until its copy is done, so that no reader can reuse
its memory earlier, wherever that memory comes from: torch's pinned-memory allocator tracks copies only of tensors whose
storage it allocated itself, not of NumPy arrays over the same block (CachingHostAllocator.h: ``record_event``). On
other devices a batch is moved as Lightning moves it. Cost: one CUDA event per batch.
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
    """Copy batches to one device.

    Args:
        device: the target device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._under_way: deque[tuple[Any, Any]] = deque()  # the end event of each copy, and its source batch

    def __call__(self, batch: Any) -> Any:
        """Return the batch on the device, with tensors ready for use on the current stream."""
        if self._stream is None:
            return move_data_to_device(batch, self.device)
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()
        current = torch.cuda.current_stream(self.device)
        stream = current if _has_objects(batch) else self._stream
        with torch.cuda.stream(stream):
            moved = move_data_to_device(batch, self.device)  # asynchronous if the source is pinned
        copied = stream.record_event()
        self._under_way.append((copied, dict(batch) if isinstance(batch, dict) else batch))
        current.wait_event(copied)
        # torch's caching allocator must not reuse this memory on the copy stream before the training is done with it.
        apply_to_collection(moved, Tensor, lambda tensor: tensor.record_stream(current))
        return moved


def _has_objects(batch: Any) -> bool:
    """Return whether a batch has objects of custom classes, which are moved by their ``to`` method.

    ``record_stream`` cannot reach the tensors inside them, so such a batch is copied on the training stream.
    """
    if isinstance(batch, dict):
        return any(map(_has_objects, batch.values()))
    if isinstance(batch, (list, tuple)):
        return bool(batch) and not isinstance(batch[0], str) and any(map(_has_objects, batch))
    return not isinstance(batch, Tensor) and callable(getattr(batch, "to", None))


def uses_cuda() -> bool:
    """Return whether this process already uses CUDA; nothing here initializes it, in a worker or a CPU run."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def same_device() -> Callable[[], None]:
    """Return a thread initializer that selects the CUDA device of the calling thread.

    A new thread starts on device 0. On ranks that use another device, its CUDA calls would create a context on device
    0, which takes memory there, and wait for work that runs on it.
    """
    if not uses_cuda():
        return _nothing
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def _nothing() -> None:
    pass
