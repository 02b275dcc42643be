"""How the ranks of a job find each other, and not those of another job or of the attempt before.

One of them, rank 0 or torchrun's agent, keeps a store at the place of the :class:`~disttrain.meeting.Meeting`. torchrun
(seen in PyTorch 2.13) lets all attempts of a job meet in one store, under the same keys. A restarted rank may so read
the address at which a dead one listened: the attempt fails to connect, or hangs. Here the ranks first agree on a name
that is new for each attempt, by a handshake that no older key can disturb, and meet under it. Who does not come is
named. Cost: some requests to the store for each rank, once.
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

from disttrain.errors import JoinError
from disttrain.launcher import ends_with_launcher
from disttrain.lightning.bases import StrategyBase
from disttrain.meeting import find_meeting
from disttrain.parallel.agree import PYTORCHS_TIMEOUT
from disttrain.parallel.store import meet
from disttrain.terminal import tell
from disttrain.world import World, detect_world

_POLL_SECONDS: Final = 0.02
_NOTE_SECONDS: Final = 30.0


class LoneEnvironment(LightningEnvironment):
    """Lightning's view of one rank alone, whoever started it."""

    def teardown(self) -> None:
        """Leave torchrun's WORLD_SIZE, which Lightning's own takes away: what follows the fit asks for it."""


class WorldEnvironment(ClusterEnvironment):
    """Lightning's view of the launcher: the ranks of :func:`~disttrain.world.detect_world`, whichever it was.

    Lightning's own classes would look at torchrun's and SLURM's variables by rules of their own.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    @property
    def creates_processes_externally(self) -> bool:
        """The launcher has started all ranks."""
        return True

    @property
    def main_address(self) -> str:
        """Host of the meeting."""
        return find_meeting(self._world).host

    @property
    def main_port(self) -> int:
        """Port of the meeting; under SLURM the first of several until the ranks have met."""
        return find_meeting(self._world).ports[0]

    @staticmethod
    def detect() -> bool:
        """Never chosen by Lightning; the Trainer passes it."""
        return False

    def world_size(self) -> int:
        """Number of ranks."""
        return self._world.size

    def set_world_size(self, size: int) -> None:
        """The launcher has set it."""

    def global_rank(self) -> int:
        """This rank."""
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        """The launcher has set it."""

    def local_rank(self) -> int:
        """This rank among those of its node."""
        return self._world.local_rank

    def node_rank(self) -> int:
        """Number of this node."""
        return self._world.node


class JoiningMixin(StrategyBase):
    """Joins the ranks of this attempt; to be mixed into a Lightning strategy, before its base."""

    def setup_distributed(self) -> None:
        """Make the process group, unless there is one. A collective."""
        world = detect_world()
        self.set_world_ranks()
        if world.size == self.world_size and not dist.is_initialized():
            timeout = self.timeout or PYTORCHS_TIMEOUT
            options: dict[str, Any] = {} if self.root_device.type == "cpu" else {"device_id": self.root_device}
            with ends_with_launcher():
                dist.init_process_group(
                    self.backend_name(),
                    # A rank alone meets nobody: it needs no port, which another program could take meanwhile.
                    store=join(world, min(timeout, PYTORCHS_TIMEOUT)) if world.size > 1 else dist.HashStore(),  # type: ignore[attr-defined]
                    rank=world.rank,
                    world_size=world.size,
                    timeout=timeout,
                    **options,
                )
        super().setup_distributed()


def join(world: World, timeout: timedelta) -> Store:
    """Meet the other ranks of this attempt; what is returned holds nothing of any other. A collective.

    Raises:
        ConfigError: the environment does not say where to meet, or another program has the port.
        JoinError: some ranks did not come in time, or rank 0 cannot be reached.
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
    """A name that the ranks of this attempt have in common, and with no other attempt.

    Each rank brings a word of its own that nobody could have used before, so rank 0's answer to it is no old one;
    rank 0 answers until it has seen every rank take the name, and tells every half minute whom it waits for. Every
    rank calls this.

    Args:
        store: the store of all ranks.
        rank: this rank.
        size: number of ranks.
        timeout: seconds to wait for the others.
        call: words for a rank, for messages.

    Raises:
        JoinError: some ranks did not come in time.
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
    """What a key holds; empty where it does not exist."""
    return store.get(key).decode() if store.check([key]) else ""


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def _pause(deadline: float, missing: list[str]) -> None:
    if time.monotonic() > deadline:
        raise JoinError(
            f"{_some(missing)} did not join the others in time",
            mend="look at what these ranks printed, and whether they have started; `disttrain doctor` tells more",
        )
    time.sleep(_POLL_SECONDS)
