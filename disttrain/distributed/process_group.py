"""How the ranks of a job find each other, and not the ranks of another job or an earlier attempt.

Rank 0 or torchrun's agent hosts a store at the rendezvous (:class:`~disttrain.distributed.rendezvous.Meeting`).
torchrun (as of PyTorch 2.13) uses one store, with the same keys, for all attempts of a job. A restarted rank may then
read the address at which a dead one listened, so the attempt fails to connect or hangs. Here the ranks first agree on a
name unique to the attempt, by a handshake that stale keys cannot disturb, and join under it. Missing ranks are named.
Cost: a few requests to the store per rank, once.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch.distributed.distributed_c10d import PrefixStore, Store

from disttrain.distributed.parent_process import ends_with_launcher
from disttrain.distributed.rendezvous import find_meeting
from disttrain.distributed.synchronize_errors import PYTORCHS_TIMEOUT
from disttrain.distributed.tcp_store import meet
from disttrain.distributed.world import World, detect_world
from disttrain.errors import JoinError
from disttrain.lightning.bases import StrategyBase
from disttrain.system.terminal import tell

_POLL_SECONDS: Final = 0.02
_NOTE_SECONDS: Final = 30.0


class LoneEnvironment(LightningEnvironment):
    """Lightning's view of a single rank, however it was started."""

    def teardown(self) -> None:
        """Keep torchrun's WORLD_SIZE, which Lightning's version deletes: code after the fit reads it."""


class WorldEnvironment(ClusterEnvironment):
    """Lightning's view of the launcher: the ranks of :func:`~disttrain.distributed.world.detect_world`.

    Lightning's own classes would interpret torchrun's and SLURM's variables by different rules.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    @property
    def creates_processes_externally(self) -> bool:
        """True: the launcher has started all ranks."""
        return True

    @property
    def main_address(self) -> str:
        """Host of the rendezvous."""
        return find_meeting(self._world).host

    @property
    def main_port(self) -> int:
        """Port of the rendezvous; under SLURM, the first of several candidates until the ranks have joined."""
        return find_meeting(self._world).ports[0]

    @staticmethod
    def detect() -> bool:
        """Return False: Lightning must not pick this class by itself; the Trainer passes it."""
        return False

    def world_size(self) -> int:
        """Return the number of ranks."""
        return self._world.size

    def set_world_size(self, size: int) -> None:
        """Do nothing: the launcher has set it."""

    def global_rank(self) -> int:
        """Return the global rank."""
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the launcher has set it."""

    def local_rank(self) -> int:
        """Return the rank within this node."""
        return self._world.local_rank

    def node_rank(self) -> int:
        """Return the index of this node."""
        return self._world.node


class JoiningMixin(StrategyBase):
    """Joins the ranks of this attempt; list it before the base in a Lightning strategy."""

    def setup_distributed(self) -> None:
        """Create the process group, unless it exists. Collective."""
        world = detect_world()
        self.set_world_ranks()
        if world.size == self.world_size and not dist.is_initialized():
            timeout = self.timeout or PYTORCHS_TIMEOUT
            options: dict[str, Any] = {} if self.root_device.type == "cpu" else {"device_id": self.root_device}
            with ends_with_launcher():
                dist.init_process_group(
                    self.backend_name(),
                    # A single rank needs no rendezvous: no port, which another program could take meanwhile.
                    store=join(world, min(timeout, PYTORCHS_TIMEOUT)) if world.size > 1 else dist.HashStore(),  # type: ignore[attr-defined]
                    rank=world.rank,
                    world_size=world.size,
                    timeout=timeout,
                    **options,
                )
        super().setup_distributed()


def join(world: World, timeout: timedelta) -> Store:
    """Join the other ranks of this attempt; return a store private to it. Collective.

    Raises:
        ConfigError: the environment does not define a rendezvous, or another program uses the port.
        JoinError: some ranks did not arrive in time, or rank 0 cannot be reached.
    """
    meeting = find_meeting(world)
    deadline = time.monotonic() + timeout.total_seconds()
    with meet(meeting, world, timeout) as store:
        left = max(0.1, deadline - time.monotonic())
        name = agree_on_a_name(store, world.rank, world.size, left, call=lambda rank: meeting.on_host(rank, world))
    return PrefixStore(f"disttrain/{name}", store)


def _number(rank: int) -> str:
    return f"rank {rank}"


def agree_on_a_name(store: Store, rank: int, size: int, timeout: float, *, call: Callable[[int], str] = _number) -> str:
    """Agree on a name for this attempt that no other attempt has. Every rank must call this.

    Each rank writes a fresh random word, so a stale answer cannot be mistaken for rank 0's. Rank 0 answers until every
    rank has confirmed the name, and logs every half minute which ranks are missing.

    Args:
        store: the store shared by all ranks.
        rank: this rank.
        size: number of ranks.
        timeout: seconds to wait for the others.
        call: formats a rank for messages.

    Raises:
        JoinError: some ranks did not arrive in time.
    """
    own, started = uuid.uuid4().hex, time.monotonic()
    deadline, noted = started + timeout, started + _NOTE_SECONDS
    if rank > 0:
        store.set(f"hello/{rank}", own)
        while (answer := _read(store, f"welcome/{rank}").split())[:1] != [own]:
            _pause(deadline, [call(0)])
        store.set(f"settled/{rank}", answer[1])
        return answer[1]
    answered: dict[int, str] = {}
    waiting = set(range(1, size))
    while waiting:
        for other in sorted(waiting):
            hello = _read(store, f"hello/{other}")
            if hello and answered.get(other) != hello:
                store.set(f"welcome/{other}", f"{hello} {own}")
                answered[other] = hello
            if _read(store, f"settled/{other}") == own:
                waiting.discard(other)
        if waiting:
            missing = [call(other) for other in sorted(waiting)]
            if time.monotonic() > noted:
                noted = time.monotonic() + _NOTE_SECONDS
                tell(f"still waiting for {_some(missing)}")
            _pause(deadline, missing)
    return own


def _read(store: Store, key: str) -> str:
    """Return a key's value; empty if it does not exist."""
    return store.get(key).decode() if store.check([key]) else ""


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def _pause(deadline: float, missing: list[str]) -> None:
    if time.monotonic() > deadline:
        raise JoinError(
            f"{_some(missing)} did not join the others in time",
            hint="check that these ranks have started, and what they printed; `disttrain doctor` shows more",
        )
    time.sleep(_POLL_SECONDS)
