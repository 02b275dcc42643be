"""Where ranks meet: SLURM's lists of nodes, ports of their own for each attempt, and what is missing."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from disttrain.distributed.rendezvous import expand_nodes, find_meeting, reserve_port, slurm_hosts
from disttrain.distributed.world import World
from disttrain.errors import ConfigError

SLURM = World(0, 4, 0, 2, "slurm")
HERE = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost,localhost"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12]", ["n08", "n09", "n10", "n12"]),
        ("gpu-[1-2]-ib,login", ["gpu-1-ib", "gpu-2-ib", "login"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
    ],
)
def test_lists_of_nodes(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


@pytest.mark.parametrize("text", ["", "n[1-", "n[a-b]", "n[]", "n1,,n2"])
def test_what_is_no_list_of_nodes(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        expand_nodes(text)


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="SLURM is not installed")
@pytest.mark.parametrize("text", ["n[08-10,12]", "gpu-[1-2],login", "r[1-2]n[3-4]"])
def test_slurm_reads_these_lists_the_same(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "slurm.conf"
    config.write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=localhost\nPartitionName=p Nodes=ALL\n")
    monkeypatch.setenv("SLURM_CONF", str(config))
    done = subprocess.run(["scontrol", "show", "hostnames", text], capture_output=True, text=True)
    assert expand_nodes(text) == done.stdout.split(), done.stderr


def test_the_step_comes_before_the_job() -> None:
    lists = {"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_NODELIST": "n[1-4]"}
    assert slurm_hosts(lists) == ["n1", "n2", "n3", "n4"]
    assert slurm_hosts(lists | {"SLURM_STEP_NODELIST": "n[3-4]"}) == ["n3", "n4"]
    with pytest.raises(ConfigError, match=r"none of SLURM_STEP_NODELIST.* is set\n.*--export=ALL"):
        slurm_hosts({})


def test_a_reserved_port_is_left_to_who_knows_it(port: int) -> None:
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    with socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with reserve_port(everywhere=True) as number:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.2", number))
        with socket.create_server(("", number), family=socket.AF_INET6, dualstack_ipv6=True):
            socket.create_connection(("127.0.0.2", number), timeout=5).close()


def test_each_attempt_of_each_step_meets_elsewhere() -> None:
    attempts = [{}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "78"}]
    meetings = [find_meeting(SLURM, HERE | attempt) for attempt in attempts]
    assert len({meeting.name for meeting in meetings}) == 4
    assert len({meeting.ports[0] for meeting in meetings}) == 4
    for meeting in meetings:
        assert len(set(meeting.ports)) == len(meeting.ports) > 1
        assert all(16_000 <= port < 32_768 for port in meeting.ports)
    assert find_meeting(World(3, 4, 1, 2, "slurm"), HERE) == meetings[0], "ranks of one attempt disagree"


def test_what_the_environment_says_counts() -> None:
    said = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "2222"}
    for world in (SLURM, World(0, 4, 0, 2, "torchrun")):
        meeting = find_meeting(world, HERE | said)
        assert (meeting.host, meeting.ports) == ("10.0.0.7", (2222,))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = World(1, 2, 1, 2, "torchrun")
    with pytest.raises(ConfigError, match="rank 1 of 2, but MASTER_ADDR and MASTER_PORT is not set"):
        find_meeting(torchrun, {})
    with pytest.raises(ConfigError, match="rank 1 of 2, but MASTER_PORT is not set"):
        find_meeting(torchrun, {"MASTER_ADDR": "localhost"})
    with pytest.raises(ConfigError, match="MASTER_PORT is '99999', not a port"):
        find_meeting(torchrun, {"MASTER_ADDR": "localhost", "MASTER_PORT": "99999"})
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"'no-such-node.invalid' does not resolve, and `scontrol` is not on PATH"):
        find_meeting(SLURM, HERE | {"SLURM_STEP_NODELIST": "no-such-node.invalid"})
    with pytest.raises(ConfigError, match=r"list of nodes 'n\[' has an unknown format, and `scontrol` is not on PATH"):
        find_meeting(SLURM, HERE | {"SLURM_STEP_NODELIST": "n["})


def test_an_address_is_asked_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in the place of scontrol, as the name of a node that nothing resolves would need a cluster."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$3 Arch=x86_64\\n   NodeAddr=10.1.2.3 NodeHostName=$3"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert find_meeting(SLURM, HERE | {"SLURM_STEP_NODELIST": "no-such-node.invalid"}).host == "10.1.2.3"
    scontrol.write_text("#!/bin/sh\necho 'slurm_load_node error: Invalid node name' >&2\nexit 1\n")
    with pytest.raises(ConfigError, match="scontrol fails: slurm_load_node error"):
        find_meeting(SLURM, HERE | {"SLURM_STEP_NODELIST": "no-such-node.invalid"})


def test_ranks_are_named_with_their_nodes() -> None:
    meeting = find_meeting(SLURM, HERE | {"SLURM_STEP_NODELIST": "localhost,n2"})
    assert [meeting.on_host(rank, SLURM) for rank in (1, 2)] == ["rank 1 on localhost", "rank 2 on n2"]
