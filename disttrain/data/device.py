"""Batches from pinned host memory to a CUDA device, while the step before still runs.

Copies go through a stream of their own, so they wait for no kernel of the training; the training's stream waits
for the copy that it needs, and the host for neither. On other devices a batch is moved as Lightning moves it.
Cost: one event a batch.
"""

from __future__ import annotations

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

    def __call__(self, batch: Any) -> Any:
        """The batch on the device; its tensors may be used on the current stream."""
        if self._stream is None:
            return move_data_to_device(batch, self.device)
        with torch.cuda.stream(self._stream):
            moved = move_data_to_device(batch, self.device)  # asynchronous from pinned memory
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._stream.record_event())
        # Their memory may not be given to the copying stream again before the training is done with it.
        apply_to_collection(moved, Tensor, lambda tensor: tensor.record_stream(current))
        return moved
