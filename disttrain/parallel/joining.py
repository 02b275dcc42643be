"""How the ranks of a restarted job find each other, and not those of the attempt before.

torchrun (seen in PyTorch 2.13) lets all attempts of a job meet in one store of its agent, under the same keys. A
restarted rank may so read the address at which a dead one listened: the attempt fails to connect, or hangs. Here
the ranks first agree on a name that is new for each attempt, by a handshake that no older key can disturb, and meet
under it. Cost: some requests to the store for each rank, once; nothing without torchrun's store.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.distributed_c10d import PrefixStore, Store

from disttrain.errors import RankError

_POLL_SECONDS: Final = 0.02


class JoiningMixin(DDPStrategy):
    """Joins the ranks of this attempt; to be mixed into a Lightning strategy, before its base."""

    def setup_distributed(self) -> None:
        """Make the process group, unless there is one. A collective."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized():
            self.set_world_ranks()
            timeout = self._timeout or timedelta(minutes=30)
            options: dict[str, Any] = {} if self.root_device.type == "cpu" else {"device_id": self.root_device}
            dist.init_process_group(
                self._get_process_group_backend(),
                store=_store_of_this_attempt(self.global_rank, self.world_size, timeout),
                rank=self.global_rank,
                world_size=self.world_size,
                timeout=timeout,
                **options,
            )
        super().setup_distributed()


def _store_of_this_attempt(rank: int, size: int, timeout: timedelta) -> Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, size, is_master=False, timeout=timeout
    )
    name = agree_on_a_name(store, rank, size, timeout.total_seconds())
    return PrefixStore(f"disttrain/{name}", store)


def agree_on_a_name(store: Store, rank: int, size: int, timeout: float) -> str:
    """A name that the ranks of this attempt have in common, and with no other attempt.

    Each rank brings a word of its own that nobody could have used before, so rank 0's answer to it is no old one;
    rank 0 answers until it has seen every rank take the name. Every rank calls this.

    Raises:
        RankError: some ranks did not come in time.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    if rank > 0:
        store.set(f"hello/{rank}", own)
        while (answer := _read(store, f"welcome/{rank}").split())[:1] != [own]:
            _pause(deadline, [0])
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
            _pause(deadline, sorted(waiting))
    return own


def _read(store: Store, key: str) -> str:
    """What a key holds; empty where it does not exist."""
    return store.get(key).decode() if store.check([key]) else ""


def _pause(deadline: float, missing: list[int]) -> None:
    if time.monotonic() > deadline:
        raise RankError(f"rank {', '.join(map(str, missing))} did not join the others in time")
    time.sleep(_POLL_SECONDS)
