"""Run all checks: each rank on its own, then all ranks together, with a time limit on everything.

Ranks exchange facts through a store before they create a process group. Rank 0 therefore has each rank's facts before
anything can hang, and can report which ranks are missing, differ or stopped responding. A watchdog ends a rank that is
stuck in a library call, after printing what is known so far. The whole run takes a few seconds, or a few times the time
limit if ranks are missing or hang.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from disttrain.distributed.consistency import package_checksum, versions
from disttrain.distributed.exit_codes import in_time
from disttrain.distributed.rendezvous import Meeting, find_meeting
from disttrain.distributed.tcp_store import meet
from disttrain.distributed.world import World
from disttrain.doctor import judge, network, speed
from disttrain.doctor.finding import Finding, failure, ok, worst
from disttrain.doctor.folders import Folders, SharedSign, examine_folders
from disttrain.doctor.machine import examine_device, examine_machine, gpu_link, system_facts
from disttrain.errors import DisttrainError, first_line

_POLL_SECONDS: Final = 0.05
_LAST_SECONDS: Final = 3.0
_GUARD_SECONDS: Final = 30.0
_LOOK_AT_RANK_0: Final = (
    "check whether rank 0 has started and what it printed, whether MASTER_ADDR is its node, and whether a firewall"
    " blocks the connection"
)


@dataclass(frozen=True)
class Options:
    """What to check.

    Attributes:
        folders: run folder and data.
        config: the configuration file whose content the ranks compare.
        shm: where shared memory is mounted.
        port: a port that rank 0 must be able to listen on.
        timeout: seconds of each wait for other ranks.
    """

    folders: Folders
    config: Path | None = None
    shm: Path = Path("/dev/shm")
    port: int | None = None
    timeout: float = 15.0


@dataclass
class Report:
    """The results so far.

    Attributes:
        world: this rank's place among all ranks.
        findings: of this rank and, on rank 0, of all ranks.
        measured: measurements by name, in seconds and bytes per second.
        speaks: whether this rank prints the report.
        stage: what the rank is currently doing.
    """

    world: World
    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    speaks: bool = True
    stage: str = "checking its node"

    def as_json(self) -> dict[str, Any]:
        """Return the whole report as JSON-serializable data."""
        return {
            "status": worst(self.findings),
            "world": asdict(self.world),
            "findings": [asdict(finding) for finding in self.findings],
            "measured": self.measured,
        }


def examine(world: World, options: Options, *, caught: Callable[[Report], None]) -> Report:
    """Check this rank and, if there are several, all of them together. Every rank calls it.

    Args:
        world: this rank's place among all ranks.
        options: what to check.
        caught: called from another thread with the report so far, before a hung rank is ended.
    """
    report = Report(world, speaks=world.rank == 0)
    start = time.perf_counter()
    with _guarded(report, 5 * options.timeout + _GUARD_SECONDS, caught):
        meeting = _meeting(report)
        used = _examine_node(report, options, meeting)
        if world.size == 1:
            device = speed.device_of(world)
            report.stage = "computing"
            report.measured["compute_seconds"] = speed.compute_seconds(device)
            said = f"{report.measured['compute_seconds'] * 1000:.2f} ms per matrix product on {device.type}"
            report.findings += [
                ok("computing", said),
                ok("ranks", "one; run it on all ranks to check links and other nodes"),
            ]
        elif meeting is not None:
            _examine_together(report, options, meeting, used)
    report.measured["seconds"] = round(time.perf_counter() - start, 1)
    return report


def _meeting(report: Report) -> Meeting | None:
    if report.world.size == 1:
        return None
    try:
        return find_meeting(report.world)
    except DisttrainError as error:
        report.speaks = True
        report.findings.append(failure("ranks", error.what, error.hint))
        return None


def _examine_node(report: Report, options: Options, meeting: Meeting | None) -> network.Interface | None:
    world = report.world
    used = None
    if world.local_rank == 0:
        report.findings += examine_machine(world, shm=options.shm)
        found, used = network.examine_network(os.environ, host=meeting.host if meeting else "")
        report.findings += found + examine_folders(options.folders)
    report.findings += examine_device(world)
    if options.port is not None and world.rank == 0:
        report.findings.append(network.examine_port(options.port))
    return used


def _examine_together(report: Report, options: Options, meeting: Meeting, used: network.Interface | None) -> None:
    world, timeout = report.world, timedelta(seconds=options.timeout)
    report.stage = "connecting to the other ranks"
    with ExitStack() as stack:
        reached = network.Reached()
        stack.callback(reached.close)
        try:
            store = stack.enter_context(meet(meeting, world, timeout))
        except DisttrainError as error:
            check = "port" if world.rank == 0 else "peers"
            hint = error.hint if world.rank == 0 else _LOOK_AT_RANK_0
            # Rank 0 does not know about this rank, so this rank has to print its own report.
            report.speaks = True
            found = network.examine_port(meeting.ports[-1]) if world.rank == 0 else None
            said = found.said if found is not None and found.status == "failure" else error.what
            report.findings.append(failure(check, said, hint))
            return
        store = PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        together = _Together(report, options, meeting, store)
        together.tell_facts(network.towards(meeting.host) if used is None else used.addresses[0], reached.port)
        plan = together.plan()
        if plan is None:
            return
        together.act(plan, used)
        together.conclude(plan)


class _Together:
    """One rank's share of the checks that involve all ranks."""

    def __init__(self, report: Report, options: Options, meeting: Meeting, store: Store) -> None:
        self.report, self.options, self.meeting, self.store = report, options, meeting, store
        self.world = report.world
        self.sign = SharedSign(options.folders.run_dir, meeting.name.replace("/", "-"))

    def tell_facts(self, address: str, port: int) -> None:
        """Send this rank's facts to rank 0."""
        if self.world.rank == 0:
            self.sign.leave()
        facts = {
            "host": socket.gethostname(),
            "place": [address, port],
            "versions": versions(),
            "code": {"source of disttrain": package_checksum()},
            "config": _config_facts(self.options.config),
            "environment": network.watched_environment(),
            "system": system_facts(),
            "findings": [asdict(finding) for finding in self.report.findings],
        }
        self.store.set(f"facts/{self.world.rank}", json.dumps(facts))

    def plan(self) -> dict[str, Any] | None:
        """Return which ranks arrived, as decided by rank 0, or None if rank 0 went away."""
        self.report.stage = "waiting for the other ranks"
        if self.world.rank > 0:
            text = self._read("plan", 2 * self.options.timeout)
            if text is None:
                self.report.speaks = True
                self.report.findings.append(failure("peers", "rank 0 stopped responding", "see what rank 0 printed"))
                return None
            plan: dict[str, Any] = json.loads(text)
        else:
            came = self._wait_for("facts", range(self.world.size), self.options.timeout)
            facts = {rank: json.loads(self.store.get(f"facts/{rank}")) for rank in came}
            places = {str(rank): facts[rank]["place"] for rank in came}
            plan = {"hosts": {str(rank): facts[rank]["host"] for rank in came}, "places": places}
            self._judge_facts(facts)
            self.store.set("plan", json.dumps(plan))
        plan["clock"] = time.time()
        return plan

    def _judge_facts(self, facts: Mapping[int, dict[str, Any]]) -> None:
        for rank in sorted(facts):
            if rank > 0:
                told = [Finding(**{**each, "ranks": (rank,)}) for each in facts[rank]["findings"]]
                self.report.findings += told
        missing = [self.meeting.on_host(rank, self.world) for rank in range(self.world.size) if rank not in facts]
        if missing:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            self.report.findings.append(
                failure(
                    "peers",
                    f"{shown} did not connect to {self.meeting.host} within {self.options.timeout:g} s",
                    "check whether these ranks were started, what they printed, and whether a firewall blocks their"
                    f" connections to {self.meeting.host}",
                )
            )
        if len(facts) > 1:
            self.report.findings += judge.compare_facts([facts[rank] for rank in sorted(facts)])

    def act(self, plan: dict[str, Any], used: network.Interface | None) -> None:
        """Connect to other ranks, compute, exchange tensors, and send the results to rank 0."""
        found: list[Finding] = []
        told: dict[str, Any] = {"clock": plan["clock"]}
        world, came = self.world, sorted(int(rank) for rank in plan["hosts"])
        hosts = set(plan["hosts"].values())
        self.report.stage = "testing connections to the other ranks"
        found += self._reach(plan, came)
        lost = network.warn_of_loopback(used, len(hosts))
        if lost is not None:
            found.append(lost)
        if world.local_rank == 0 and world.rank > 0 and len(hosts) > 1:
            found.append(self.sign.seen())
        device = speed.device_of(world)
        self.report.stage = "computing"
        told["compute_seconds"] = speed.compute_seconds(device)
        if len(came) == world.size:
            self.report.stage = "exchanging tensors"
            try:
                timeout = timedelta(seconds=self.options.timeout)
                with speed.quiet():
                    speed.join_group(PrefixStore("group", self.store), world, device, timeout)
                    told["speeds"] = speed.exchange_speeds(device)
            except RuntimeError as error:
                hint = (
                    "see the other findings; for more, set NCCL_DEBUG=INFO, or TORCH_DISTRIBUTED_DEBUG=DETAIL for gloo"
                )
                found.append(failure("collectives", f"{first_line(error):.300}", hint))
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        told["findings"] = [asdict(finding) | {"ranks": [world.rank]} for finding in found]
        if world.rank == 0:
            told["link"] = asdict(self._link(len(hosts), device.type == "cuda", used))
        self.store.set(f"result/{world.rank}", json.dumps(told))

    def _link(self, num_hosts: int, on_gpus: bool, used: network.Interface | None) -> judge.Link:
        """Return the expected speed of the links between the ranks."""
        if num_hosts > 1:
            infiniband = network.infiniband_speed() if on_gpus else 0.0
            interface = used.megabits * 1e6 / 8 if used else 0.0
            return judge.Link("InfiniBand", infiniband) if infiniband else judge.Link("interface", interface)
        name, speed = gpu_link() if on_gpus else ("", 0.0)
        if speed:
            return judge.Link(name, speed, inside=True)
        return judge.Link("one TCP connection within the node", network.loopback_speed(), inside=True)

    def _reach(self, plan: Mapping[str, Any], came: list[int]) -> list[Finding]:
        """Connect to the ranks at power-of-two distances, which covers all ranks with few connections each."""
        here, size = came.index(self.world.rank), len(came)
        peers = {came[(here + 2**k) % size] for k in range(size.bit_length()) if 2**k < size}
        places = {rank: (str(plan["places"][str(rank)][0]), int(plan["places"][str(rank)][1])) for rank in peers}
        return [
            failure(
                "peers",
                f"rank {self.world.rank} on {socket.gethostname()} cannot reach rank {rank} on"
                f" {plan['hosts'][str(rank)]} at {places[rank][0]}: {why}",
                "allow connections between the nodes on all ports; or set GLOO_SOCKET_IFNAME and"
                " NCCL_SOCKET_IFNAME to an interface that they share",
            )
            for rank, why in network.reach(places).items()
        ]

    def conclude(self, plan: Mapping[str, Any]) -> None:
        """Judge the results on rank 0 and send the findings to the other ranks, which return the same exit code."""
        self.report.stage = "waiting for the results of the other ranks"
        if self.world.rank > 0:
            text = self._read("verdict", 3 * self.options.timeout + 15)
            if text is None:
                self.report.findings.append(failure("peers", "rank 0 stopped responding", "see what rank 0 printed"))
            else:
                self.report.findings = [Finding(**each) for each in json.loads(text)]
                self.store.add("read", 1)
            return
        came = sorted(int(rank) for rank in plan["hosts"])
        # A rank may have started connecting after this one, and then waits a full timeout for a peer that is gone.
        ready = self._wait_for("result", came, 2 * self.options.timeout + 5)
        hosts = {int(rank): str(host) for rank, host in plan["hosts"].items()}
        told = {rank: json.loads(self.store.get(f"result/{rank}")) for rank in ready}
        self._judge_results(told, hosts, [rank for rank in came if rank not in ready])
        self.sign.remove()
        self.store.set("verdict", json.dumps([asdict(finding) for finding in self.report.findings]))
        deadline = time.monotonic() + _LAST_SECONDS
        while self.store.add("read", 0) < len(ready) - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _judge_results(self, told: Mapping[int, dict[str, Any]], hosts: Mapping[int, str], silent: list[int]) -> None:
        report = self.report
        for rank in silent:
            said = f"rank {rank} on {hosts[rank]} connected, but then stopped responding"
            report.findings.append(failure("peers", said, "see what it printed: it reports where it was"))
        for each in told.values():
            report.findings += [Finding(**finding) for finding in each["findings"]]
        clocks = {rank: float(each["clock"]) for rank, each in told.items()}
        seconds = {rank: float(each["compute_seconds"]) for rank, each in told.items()}
        report.measured |= {"compute_seconds": seconds, "clocks": {rank: c - clocks[0] for rank, c in clocks.items()}}
        if len(set(hosts.values())) > 1:
            report.findings.append(judge.compare_clocks(clocks, hosts))
        if len(told) > 1:
            report.findings += judge.compare_speeds(seconds, hosts)
        if "speeds" in told[0]:
            link = judge.Link(**told[0]["link"])
            report.measured |= {**told[0]["speeds"], "link": link.speed}
            backend = "nccl" if speed.device_of(self.world).type == "cuda" else "gloo"
            report.findings.append(judge.judge_links(told[0]["speeds"], backend=backend, link=link))

    def _read(self, key: str, seconds: float) -> str | None:
        """Return the value of a key once it is set, or None after a timeout."""
        try:
            self.store.wait([key], timedelta(seconds=seconds))
            return self.store.get(key).decode()
        except RuntimeError:
            return None

    def _wait_for(self, what: str, ranks: Any, seconds: float) -> list[int]:
        """Return the ranks that set their key in time."""
        deadline, waiting = time.monotonic() + seconds, set(ranks)
        came: list[int] = []
        while waiting:
            now = [rank for rank in sorted(waiting) if self.store.check([f"{what}/{rank}"])]
            came, waiting = came + now, waiting - set(now)
            if waiting and time.monotonic() > deadline:
                break
            if waiting:
                time.sleep(_POLL_SECONDS)
        return sorted(came)


def _config_facts(config: Path | None) -> dict[str, str]:
    if config is None:
        return {}
    try:
        return {str(config): f"{zlib.crc32(config.read_bytes()):08x}"}
    except OSError as error:
        return {str(config): f"unreadable ({error.strerror})"}


@contextmanager
def _guarded(report: Report, seconds: float, caught: Callable[[Report], None]) -> Iterator[None]:
    """End this process if the body does not finish in time."""

    def end() -> None:
        world, report.speaks = report.world, True
        said = f"rank {world.rank} on {socket.gethostname()} hung for more than {seconds:g} s while {report.stage}"
        report.findings.append(failure("peers", said, "see the other findings, and what the other ranks printed"))
        with suppress(Exception):
            caught(report)
            sys.stdout.flush()
        os._exit(1)

    with in_time(seconds, end):
        yield
