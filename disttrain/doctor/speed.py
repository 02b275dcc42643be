"""Measure how fast a rank computes and how fast all ranks exchange tensors: NCCL on GPUs, gloo on CPUs.

All ranks do the same work at the same time, so a rank that is slower than the others shows up whatever the cause: a hot
or throttled device, another process, wrong core binding. Bounded to about two seconds in total.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from disttrain.distributed.collectives import all_gather_single
from disttrain.distributed.world import World

_COMPUTE_SECONDS: Final = 0.6
_PRODUCTS: Final = 30
"""Products per timing; enough that a rank that is paused now and then cannot run a whole timing between two pauses."""
_EXCHANGE_SECONDS: Final = 0.5
_LATENCY_ROUNDS: Final = 50


def device_of(world: World) -> torch.device:
    """Return the device that a rank computes on."""
    if torch.cuda.is_available() and world.local_rank < torch.cuda.device_count():
        return torch.device("cuda", world.local_rank)
    return torch.device("cpu")


def compute_seconds(device: torch.device) -> float:
    """Return the seconds of one matrix product: the median over several timings of the same work."""
    length = 4096 if device.type == "cuda" else 384
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.full((length, length), 1e-3, dtype=dtype, device=device) for _ in range(2))
    left @ right  # warm-up: loads libraries and kernels
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < _COMPUTE_SECONDS or len(times) < 3:
        _wait(device)
        began = time.perf_counter()
        for _ in range(_PRODUCTS):
            left @ right
        _wait(device)
        times.append((time.perf_counter() - began) / _PRODUCTS)
    return statistics.median(times)


def join_group(store: Store, world: World, device: torch.device, timeout: timedelta) -> None:
    """Create the process group. A collective of all ranks."""
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout, **options)


def exchange_speeds(device: torch.device) -> dict[str, float]:
    """Measure the slowest link's bytes per second, and the latency. A collective of the default group.

    Returns:
        ``all_reduce`` and ``all_gather``: bus bandwidth in bytes per second, i.e. what each link carries in a ring;
        ``latency``: seconds of an all-reduce of one number.
    """
    size = dist.get_world_size()
    elements = 2**26 if device.type == "cuda" else 2**20  # 256 MiB, 4 MiB
    tensor = torch.zeros(elements - elements % size, device=device)
    part, number = torch.zeros(len(tensor) // size, device=device), torch.zeros(1, device=device)
    small = _median_seconds(lambda: dist.all_reduce(number), device, rounds=_LATENCY_ROUNDS)
    reduce = _median_seconds(lambda: dist.all_reduce(tensor), device)
    gather = _median_seconds(lambda: all_gather_single(tensor, part), device)
    num_bytes = tensor.numel() * tensor.element_size()
    return {
        "all_reduce": 2 * (size - 1) / size * num_bytes / reduce,
        "all_gather": (size - 1) / size * num_bytes / gather,
        "latency": small,
    }


def _median_seconds(act: Callable[[], Any], device: torch.device, *, rounds: int = 0) -> float:
    """Return the median seconds of a collective; rank 0 decides how often it is repeated."""

    def once() -> float:
        start = time.perf_counter()
        act()
        _wait(device)
        return time.perf_counter() - start

    once()
    again = torch.tensor([rounds or max(2, min(20, int(_EXCHANGE_SECONDS / max(once(), 1e-6))))], device=device)
    dist.broadcast(again, 0)
    return statistics.median(once() for _ in range(int(again)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def quiet() -> Iterator[None]:
    """Redirect gloo's connection messages from stdout, which is for results, to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
