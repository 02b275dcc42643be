"""Which errors say that memory did not suffice, on a device or on the host.

Libraries have no common class for it: PyTorch's allocators have one, CUDA, cuDNN, cuBLAS and NCCL say it in words, a
thread's error arrives as the cause of another, and so does what ``torch.compile`` meets. Generous rather than exact:
what is taken for lack of memory by mistake costs an attempt with a smaller micro batch, which ends with the same error.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final

import torch

_WORDS: Final = (
    "out of memory",  # CUDA's, HIP's and NCCL's, of the runtime and of the driver
    "can't allocate memory",  # PyTorch's allocator for the CPU
    "cannot allocate memory",
    "defaultcpuallocator",
    "alloc_failed",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE, cuFFT
    "failed to cuda calloc",  # NCCL
    "cudaerrormemoryallocation",
    "bad_alloc",  # the C++ library
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that an allocation failed."""
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
