"""Make all ranks succeed or fail together.

A rank that fails alone leaves its peers waiting in their next collective. With :func:`raise_together`, every rank
reports the outcome of a fallible block, and either all ranks raise or none does. Like :func:`gather`, it is a
collective over the default group, or another group of all ranks. Cost: one small all-gather; use it where something
may fail, never per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch.distributed as dist

from disttrain.errors import DisttrainError, RankError
from disttrain.system.stack_summary import waiting_for

T = TypeVar("T")
PYTORCHS_TIMEOUT: Final = timedelta(minutes=30)
"""Timeout of collectives in the default group, unless configured otherwise."""


def is_distributed() -> bool:
    """Return whether a process group with more than one rank is initialized."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def new_group(ranks: Sequence[int] | None = None, *, backend: str | None = None) -> dist.ProcessGroup:
    """Create a process group with the timeout of the default group. Collective.

    PyTorch's default would be 10 minutes for NCCL, too short to tell that a run hangs, and 30 for gloo.
    """
    ours = None if ranks is None else list(ranks)
    group: dist.ProcessGroup = dist.new_group(ours, backend=backend, timeout=timeout_of())
    return group


def timeout_of(group: dist.ProcessGroup | None = None) -> timedelta:
    """Return the timeout for collectives of a group (default: the group of all ranks)."""
    group = group or dist.group.WORLD
    assert group is not None
    backends: list[Any] = [group._get_backend(device) for device in group._device_types]
    # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps each backend in another; backends made for tests have no options.
    options = [getattr(getattr(backend, "wrapped_pg", backend), "options", None) for backend in backends]
    return min((found._timeout for found in options if found is not None), default=PYTORCHS_TIMEOUT)


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Change the timeout of a group created elsewhere."""
    for device in group._device_types:
        backend: Any = group._get_backend(device)
        getattr(backend, "wrapped_pg", backend)._set_default_timeout(timeout)


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Gather one picklable value per rank, in rank order. Collective."""
    if not is_distributed():
        return [value]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, value, group=group)
    return told


@contextmanager
def raise_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block that may fail on some ranks; if it fails on any, every rank raises.

    A failed rank raises its own error, unless a lower rank raises the same one; all others raise a :class:`RankError`
    that quotes the first. So a mistake that all ranks make is reported once. Unexpected errors (bugs) are sent as type
    and message. A background thread needs its own group.
    """
    own: BaseException | None = None
    try:
        yield
    except Exception as error:
        own = error
    if is_distributed():
        what = None if own is None else str(own) if isinstance(own, DisttrainError) else f"{type(own).__name__}: {own}"
        with waiting_for("an agreement on whether a part failed"):
            told = gather(what, group)
        failed = [rank for rank, text in enumerate(told) if text is not None]
        if failed and (own is None or what in told[: dist.get_rank()]):
            raise RankError(f"rank {', '.join(map(str, failed))} failed: {told[failed[0]]}")
    if own is not None:
        raise own
