"""The store at the place where ranks meet: torchrun's agent keeps it, or rank 0 does and tells the others its port.

It needs PyTorch and nothing of Lightning, so that ``disttrain doctor`` starts sooner. Cost: a connection for each rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from disttrain.errors import JoinError, first_line
from disttrain.meeting import Meeting, announce, hear
from disttrain.world import World

_AGENT_TIMEOUT: Final = timedelta(minutes=2)


@contextmanager
def meet(meeting: Meeting, world: World, timeout: timedelta) -> Iterator[Store]:
    """The store of the meeting; rank 0 answers who comes for as long as the context lasts.

    Raises:
        ConfigError: another program has the port.
        JoinError: rank 0 cannot be reached.
    """
    if has_agent_store():
        yield _agents_store(meeting, timeout)
    elif world.rank == 0:
        # It listens at all addresses; what the meeting's is called need not lead back here.
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        with announce(meeting, store.port):
            yield store
    else:
        port = hear(meeting, time.monotonic() + timeout.total_seconds())
        yield _client(meeting.host, port, timeout)


def _agents_store(meeting: Meeting, timeout: timedelta) -> TCPStore:
    """That of torchrun's agent, which is there before any rank is: where it cannot be reached, the agent has died."""
    host, port = meeting.host, meeting.ports[0]
    try:
        store = _client(host, port, min(timeout, _AGENT_TIMEOUT))
    except dist.DistNetworkError as error:
        raise JoinError(
            f"the store of torchrun's agent at {host}:{port} cannot be reached: {first_line(error):.300}",
            mend="see whether torchrun still runs on the first node, and whether this node reaches that address",
        ) from None
    store.set_timeout(timeout)
    return store


def _client(host: str, port: int, timeout: timedelta) -> TCPStore:
    return TCPStore(host, port, is_master=False, timeout=timeout)


def has_agent_store() -> bool:
    """Whether torchrun's agent keeps the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
