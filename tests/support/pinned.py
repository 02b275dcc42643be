"""A stand-in for CUDA's pinned memory on a machine without CUDA: which blocks there are, and who made their storage.

The allocator of pinned memory finds a copy's block by the storage that it made itself (``CachingHostAllocator.h``), so
a tensor over the same bytes with another storage is one whose copies it does not know of.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor


class Pinned:
    """The blocks that were handed out, for as long as the test runs.

    Args:
        monkeypatch: PyTorch's allocation of pinned memory, and the question whether CUDA runs, are replaced.
        device: the device of the thread that trains.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, device: int = 0) -> None:
        self.blocks: list[Tensor] = []
        self.devices: dict[str, int] = {}
        """The device that a thread has selected, by the thread's name."""
        empty = torch.empty

        def allocate(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
            found: Tensor = empty(*size, **options)
            if pin_memory:
                self.blocks.append(found)
            return found

        def pin(tensor: Tensor) -> Tensor:
            return (
                tensor
                if self.block_of(tensor) is not None
                else allocate(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
            )

        def select(number: int) -> None:
            self.devices[threading.current_thread().name] = number

        monkeypatch.setattr(torch, "empty", allocate)
        monkeypatch.setattr(Tensor, "pin_memory", pin)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
        monkeypatch.setattr(torch.cuda, "set_device", select)

    def block_of(self, tensor: Tensor) -> Tensor | None:
        """The block that holds a tensor's first byte; None where that is other memory."""
        address = tensor.data_ptr()
        return next((b for b in self.blocks if b.data_ptr() <= address < b.data_ptr() + max(1, b.nbytes)), None)

    def knows(self, tensor: Tensor) -> bool:
        """Whether a copy from this tensor is one that the allocator hears of: its storage is that of the block."""
        block = self.block_of(tensor)
        return block is not None and block.untyped_storage()._cdata == tensor.untyped_storage()._cdata
