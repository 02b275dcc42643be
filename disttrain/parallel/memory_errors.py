"""Recognize out-of-memory errors, of the device or the host.

There is no common exception class. PyTorch's allocators have one; CUDA, cuDNN, cuBLAS and NCCL only report it in the
message; errors in threads and in ``torch.compile`` arrive as the cause of another error. False positives are
acceptable: they cost one attempt with a smaller micro batch, which ends with the same error.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final

import torch

_WORDS: Final = (
    "out of memory",  # CUDA, HIP (runtime and driver) and NCCL
    "can't allocate memory",  # PyTorch's CPU allocator
    "cannot allocate memory",
    "defaultcpuallocator",
    "alloc_failed",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE, cuFFT
    "failed to cuda calloc",  # NCCL
    "cudaerrormemoryallocation",
    "bad_alloc",  # C++ standard library
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one in its chain of causes, reports a failed allocation."""
    return any(_says_so(one) for one in _chain(error))


def _says_so(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
