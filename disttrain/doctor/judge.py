"""Compare ranks by pure functions: versions, code, settings, clocks, speed, links."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from disttrain.distributed.consistency import describe_differences, name_ranks
from disttrain.doctor.finding import Finding, failure, ok, warning

_CLOCK_SECONDS: Final = 1.0
_SLOWER: Final = 1.5
_OF_LINK: Final = 0.25
_OF_GPUS: Final = 0.1
_OF_GLOO_INSIDE: Final = 0.02
"""Fraction of one TCP connection's speed; low, because many ranks share the cores that move the bytes."""
_LEAST: Final = 1e7
_LATENCY_SECONDS: Final = {"gloo": 0.1, "nccl": 0.01}


def compare_facts(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Compare versions, code, configuration and environment of the ranks that arrived, in rank order."""
    hosts = [each["host"] for each in facts]
    found = []
    for check, key, hint in (
        (
            "versions",
            "versions",
            "install the same versions on every node: pip install -c constraints.txt, or one container",
        ),
        ("code", "code", "check out the same commit on every node, or run from a folder that all nodes share"),
        ("configuration", "config", "give every rank the same --config, or put it in a folder that all nodes share"),
    ):
        differing = describe_differences([each[key] for each in facts], hosts)
        if differing:
            found.append(failure(check, f"differs between ranks: {differing}", hint))
    differing = describe_differences([each["environment"] for each in facts], hosts)
    if differing:
        hint = "export them before starting the launcher, so that all ranks inherit them (srun --export=ALL)"
        found.append(warning("environment", f"differs between ranks: {differing}", hint))
    differing = describe_differences(
        [{k: v for k, v in each["system"].items() if k != "kernel"} for each in facts], hosts
    )
    if differing:
        hint = "install the same driver on every node; NCCL and CUDA may behave differently between versions"
        found.append(warning("driver", f"differs between ranks: {differing}", hint))
    if not found:
        found.append(ok("ranks", f"{len(facts)} ranks on {_nodes(hosts)} have the same versions, code and settings"))
    kernels = describe_differences([{"kernel": each["system"].get("kernel", "")} for each in facts], hosts)
    return [*found, ok("kernel", f"differs between ranks: {kernels}")] if kernels else found


def compare_clocks(seconds: Mapping[int, float], hosts: Mapping[int, str]) -> Finding:
    """Compare clocks that all ranks read when rank 0's signal arrived.

    Args:
        seconds: each rank's clock reading, by rank.
        hosts: node of each rank.
    """
    offsets = {rank: each - seconds[0] for rank, each in seconds.items()}
    rank = max(offsets, key=lambda each: abs(offsets[each]))
    if abs(offsets[rank]) > _CLOCK_SECONDS:
        return warning(
            "clocks",
            f"the clock of {hosts[rank]} is {offsets[rank]:+.1f} s off from that of {hosts[0]}",
            "run chrony or ntpd on every node; logs and events are ordered by these clocks",
        )
    return ok("clocks", f"within {abs(offsets[rank]) * 1000:.0f} ms, including the delay of the query")


def compare_speeds(seconds: Mapping[int, float], hosts: Mapping[int, str]) -> list[Finding]:
    """Find ranks that take longer than the others for the same work at the same time.

    The reference is the lower median, so with two ranks it is the faster one.

    Args:
        seconds: duration of the work, by rank.
        hosts: node of each rank.
    """
    usual = statistics.median_low(seconds.values())
    slow = {rank: each / usual for rank, each in seconds.items() if each > _SLOWER * usual}
    if not slow:
        spread = max(seconds.values()) / min(seconds.values())
        return [
            ok("computing", f"{usual * 1000:.2f} ms for the same work; slowest rank {spread:.2f} times the fastest")
        ]
    names = [hosts[rank] for rank in range(max(hosts) + 1) if rank in hosts]
    order = sorted(hosts)
    whom = name_ranks([order.index(rank) for rank in slow], names) if order == list(range(len(order))) else str([*slow])
    return [
        warning(
            "computing",
            f"{whom} takes {max(slow.values()):.1f} times as long as the others for the same work"
            f" ({max(seconds[rank] for rank in slow) * 1000:.1f} ms instead of {usual * 1000:.1f} ms)",
            "check there with `top` and `nvidia-smi -q -d PERFORMANCE` for other processes, thermal and power limits,"
            " and ranks that share cores (srun --cpu-bind=cores); to avoid the node, use --exclude",
        )
    ]


@dataclass(frozen=True)
class Link:
    """Expected speed of the slowest link between the ranks.

    Attributes:
        name: its name in messages.
        speed: bytes per second; 0 if unknown.
        inside: whether the link is inside one node, where processors or the path between GPUs reduce the speed further.
    """

    name: str
    speed: float
    inside: bool = False


def judge_links(speeds: Mapping[str, float], *, backend: str, link: Link) -> Finding:
    """Compare the slowest link with its expected speed, and check the latency.

    Args:
        speeds: the result of :func:`disttrain.doctor.speed.exchange_speeds`.
        backend: ``gloo`` or ``nccl``.
        link: the expected link; an unknown speed is replaced by the minimum for any training.
    """
    reduce, gather, latency = speeds["all_reduce"], speeds["all_gather"], speeds["latency"]
    said = (
        f"{backend}: all-reduce {_rate(reduce)}, all-gather {_rate(gather)} per link, latency {latency * 1e6:,.0f} us"
    )
    if link.speed:
        said += f"; {link.name}: {_rate(link.speed)}"
    share = (_OF_GLOO_INSIDE if backend == "gloo" else _OF_GPUS) if link.inside else _OF_LINK
    if max(reduce, gather) < max(_LEAST, share * link.speed):
        if not link.inside:
            hint = "check for a slower interface on the path (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), or other traffic"
        elif backend == "gloo":
            hint = "check with `top` for other processes, and for ranks that share cores (srun --cpu-bind=cores)"
        else:
            hint = "check `nvidia-smi topo -m`, NCCL_P2P_DISABLE, NCCL_SHM_DISABLE, and the log of NCCL_DEBUG=INFO"
        return warning("collectives", said, hint)
    if latency > _LATENCY_SECONDS[backend]:
        hint = "check for ranks that share cores or wait for other programs and, between nodes, the `ping` time"
        return warning("collectives", f"{said}: every collective is slow, however small", hint)
    return ok("collectives", said)


def _rate(speed: float) -> str:
    return f"{speed / 1e9:.2f} GB/s" if speed >= 1e8 else f"{speed / 1e6:.1f} MB/s"


def _nodes(hosts: Sequence[str]) -> str:
    number = len(set(hosts))
    return f"{number} node{'' if number == 1 else 's'}"
