"""One outcome for all ranks.

A rank that fails alone leaves its peers waiting in their next collective. :func:`raise_together` lets every
rank say how a fallible part went and raises on all of them, or on none. It is a collective of the default
group, or of another one of all ranks, as is :func:`gather`: every rank must call it. Cost: one small all-gather;
call it where something may fail, never per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch.distributed as dist

from disttrain.errors import DisttrainError, RankError
from disttrain.whereabouts import waiting_for

T = TypeVar("T")
PYTORCHS_TIMEOUT: Final = timedelta(minutes=30)
"""After which a collective of the default group is given up, where nothing else is said."""


def is_distributed() -> bool:
    """Whether a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def new_group(ranks: Sequence[int] | None = None, *, backend: str | None = None) -> dist.ProcessGroup:
    """A further group, whose collectives give up as late as those of the default group. A collective.

    PyTorch would give it 10 minutes with NCCL, less than it takes to see that a run hangs, and 30 with gloo.
    """
    ours = None if ranks is None else list(ranks)
    group: dist.ProcessGroup = dist.new_group(ours, backend=backend, timeout=timeout_of())
    return group


def timeout_of(group: dist.ProcessGroup | None = None) -> timedelta:
    """How long a collective of a group, by default the one of all ranks, may take until PyTorch gives it up."""
    group = group or dist.group.WORLD
    assert group is not None
    backends: list[Any] = [group._get_backend(device) for device in group._device_types]
    # With TORCH_DISTRIBUTED_DEBUG=DETAIL each is inside another, and backends made for tests have no options.
    options = [getattr(getattr(backend, "wrapped_pg", backend), "options", None) for backend in backends]
    return min((found._timeout for found in options if found is not None), default=PYTORCHS_TIMEOUT)


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Change that of a group that somebody else has made."""
    for device in group._device_types:
        backend: Any = group._get_backend(device)
        getattr(backend, "wrapped_pg", backend)._set_default_timeout(timeout)


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """A value of every rank, which must pickle, in rank order. A collective."""
    if not is_distributed():
        return [value]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, value, group=group)
    return told


@contextmanager
def raise_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block that may fail on some ranks; if it fails on any, every rank raises.

    A rank whose own block failed raises its own error, unless a lower rank raises the same one; the others
    raise a :class:`RankError` that quotes the first. So a mistake that all ranks make is reported once.
    Errors that are not a user's (bugs) travel as their type and text. A background thread needs a group of its own.
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
