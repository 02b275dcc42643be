"""Ranks agree on a name for their attempt, whatever an attempt before has left in the store."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from disttrain.distributed import tcp_store as store_module
from disttrain.distributed.process_group import agree_on_a_name
from disttrain.distributed.rendezvous import Meeting
from disttrain.distributed.tcp_store import meet
from disttrain.distributed.world import World
from disttrain.errors import JoinError


def attempt(store: dist.TCPStore, size: int) -> set[str]:
    """The names that the ranks of an attempt agree on, each through a connection of its own."""
    clients = [dist.TCPStore("127.0.0.1", store.port, is_master=False) for _ in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return set(pool.map(lambda rank: agree_on_a_name(clients[rank], rank, size, 20.0), range(size)))


@pytest.fixture
def store() -> dist.TCPStore:
    """What torchrun's agent keeps for all attempts."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def test_each_attempt_has_a_name_of_its_own_at_any_size(store: dist.TCPStore) -> None:
    names = [attempt(store, size) for size in (4, 4, 2, 5, 1)]
    assert [len(each) for each in names] == [1] * 5, f"ranks of one attempt disagree: {names}"
    assert len(set.union(*names)) == 5, f"two attempts have one name: {names}"


def test_words_of_a_rank_that_died_in_the_handshake_are_not_taken_for_a_new_one(store: dist.TCPStore) -> None:
    store.set("hello/1", "old")
    store.set("welcome/1", "old name")
    store.set("settled/1", "name")
    names = attempt(store, 2)
    assert len(names) == 1
    assert names != {"name"}


def test_ranks_that_do_not_come_are_named(store: dist.TCPStore) -> None:
    store.set("hello/1", "old")
    with pytest.raises(JoinError, match="rank 1, rank 2 did not join"):
        agree_on_a_name(store, 0, 3, 0.1)


def test_an_agent_whose_store_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there before the ranks are, so nobody waits for it to come."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        monkeypatch.setattr(store_module, "_AGENT_TIMEOUT", timedelta(seconds=1))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        meeting, world = Meeting("127.0.0.1", (port,), "job"), World(1, 2, 1, 2, launcher="torchrun")
        said = f"store of torchrun's agent at 127.0.0.1:{port} cannot be reached"
        with pytest.raises(JoinError, match=said), meet(meeting, world, timedelta(minutes=30)):
            pass
