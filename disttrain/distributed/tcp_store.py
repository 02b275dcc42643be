"""The store at the rendezvous: hosted by torchrun's agent, or by rank 0, which sends the others its port.

Needs PyTorch but not Lightning, so that ``disttrain doctor`` starts faster. Cost: one connection per rank.
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

from disttrain.distributed.rendezvous import Meeting, announce, hear
from disttrain.distributed.world import World
from disttrain.errors import JoinError, first_line

_AGENT_TIMEOUT: Final = timedelta(minutes=2)


@contextmanager
def meet(meeting: Meeting, world: World, timeout: timedelta) -> Iterator[Store]:
    """Provide the store of the rendezvous; within the context, rank 0 answers the other ranks.

    Raises:
        ConfigError: another program uses the port.
        JoinError: rank 0 cannot be reached.
    """
    if has_agent_store():
        yield _agents_store(meeting, timeout)
    elif world.rank == 0:
        # The store listens on all addresses. Connect by localhost: the rendezvous host may not resolve to this node.
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        with announce(meeting, store.port):
            yield store
    else:
        port = hear(meeting, time.monotonic() + timeout.total_seconds())
        yield _client(meeting.host, port, timeout)


def _agents_store(meeting: Meeting, timeout: timedelta) -> TCPStore:
    """Connect to the store of torchrun's agent. It exists before any rank; if unreachable, the agent has died."""
    host, port = meeting.host, meeting.ports[0]
    try:
        store = _client(host, port, min(timeout, _AGENT_TIMEOUT))
    except dist.DistNetworkError as error:
        raise JoinError(
            f"the store of torchrun's agent at {host}:{port} cannot be reached: {first_line(error):.300}",
            hint="check that torchrun still runs on the first node and that this node can reach that address",
        ) from None
    store.set_timeout(timeout)
    return store


def _client(host: str, port: int, timeout: timedelta) -> TCPStore:
    return TCPStore(host, port, is_master=False, timeout=timeout)


def has_agent_store() -> bool:
    """Return whether torchrun's agent hosts the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
