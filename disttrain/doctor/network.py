"""Check a node's network: its interfaces, which one the ranks will use, ports, and whether peers are reachable."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from disttrain.doctor.finding import Finding, failure, ok, warning
from disttrain.errors import nearest

_ELSEWHERE: Final = "198.51.100.1"
"""An address reserved for documentation (TEST-NET-2); looking up its route sends no packets."""
_REACH_SECONDS: Final = 3.0
_INFINIBAND: Final = Path("/sys/class/infiniband")
_STREAM_BYTES: Final = 64 * 2**20


@dataclass(frozen=True)
class Interface:
    """A network interface.

    Attributes:
        name: its name, such as ``eth0``.
        addresses: its addresses, IPv4 first.
        megabits: speed in megabits per second; 0 if unknown.
    """

    name: str
    addresses: tuple[str, ...]
    megabits: int = 0

    @property
    def is_loopback(self) -> bool:
        """Whether it is the loopback interface."""
        return any(ipaddress.ip_address(address).is_loopback for address in self.addresses)

    def __str__(self) -> str:
        speed = f" at {self.megabits / 1000:g} Gbit/s" if self.megabits > 0 else ""
        return f"{self.name} ({self.addresses[0]}{speed})"


def interfaces() -> list[Interface]:
    """List the interfaces that are up and have an address."""
    stats, found = psutil.net_if_stats(), []
    for name, addresses in psutil.net_if_addrs().items():
        known = sorted(
            (each.address.partition("%")[0] for each in addresses if each.family in (socket.AF_INET, socket.AF_INET6)),
            key=lambda text: ":" in text,
        )
        if known and name in stats and stats[name].isup:
            found.append(Interface(name, tuple(known), stats[name].speed))
    return found


def towards(host: str) -> str:
    """Return this node's source address for packets to a host; empty if there is no route."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def examine_network(env: Mapping[str, str], *, host: str = "") -> tuple[list[Finding], Interface | None]:
    """Check the interfaces and find the one that will be used.

    Args:
        env: the environment, which may set the interface for gloo and NCCL.
        host: the rendezvous host; by default, any address outside.
    """
    known = interfaces()
    names = {each.name for each in known}
    found = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = [text.strip("=^") for text in env.get(variable, "").split(",") if text and not text.startswith("^")]
        # NCCL also accepts a prefix of the name.
        absent = [text for text in wanted if not any(name.startswith(text) for name in names)]
        if absent:
            hint = f"correct it; {nearest(absent[0], names)}"
            found.append(
                failure("network", f"{variable} is {env[variable]!r}, which is not an interface of this node", hint)
            )
    if found:
        return found, None
    address = _gloo_address(env, known) or towards(host or _ELSEWHERE)
    used = next((each for each in known if address in each.addresses), None)
    others = [str(each) for each in known if each != used and not each.is_loopback]
    listed = f"; others: {', '.join(others[:4])}" if others else ""
    infiniband = _infiniband()
    if infiniband:
        listed += f"; InfiniBand: {', '.join(infiniband)}"
    if used is None:
        return [ok("network", f"no route out of this node; {', '.join(map(str, known))}{listed}")], None
    return [ok("network", f"{used} is used{listed}")], used


def _gloo_address(env: Mapping[str, str], known: Sequence[Interface]) -> str:
    """Return the address that gloo listens on: that of the named interface, or of the host name."""
    name = env.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if name:
        return next((each.addresses[0] for each in known if each.name == name), "")
    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return ""


def _infiniband() -> list[str]:
    found = []
    for port in sorted(_INFINIBAND.glob("*/ports/*")):
        with suppress(OSError):
            state = (port / "state").read_text().partition(":")[2].strip()
            found.append(f"{port.parts[-3]} {state}, {(port / 'rate').read_text().strip()}")
    return found


def infiniband_speed() -> float:
    """Return bytes per second of this node's fastest active InfiniBand or RoCE port; 0 if it has none."""
    rates = (re.search(r" ACTIVE, (\d+(?:\.\d+)?) Gb/sec", said) for said in _infiniband())
    return max((float(rate[1]) * 1e9 / 8 for rate in rates if rate), default=0.0)


def examine_port(port: int) -> Finding:
    """Check whether this node can listen on a port."""
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        owner = _owner(port)
        said = (
            f"port {port} on {socket.gethostname()}: {os.strerror(error.errno or 0)}{f', by {owner}' if owner else ''}"
        )
        return failure(
            "port", said, "stop that program, or set MASTER_PORT to a free port; `disttrain launch` finds one"
        )
    return ok("port", f"port {port} is free")


def _owner(port: int) -> str:
    """Return the program that listens on a port, if this user may see it."""
    with suppress(psutil.Error, OSError):
        for each in psutil.net_connections(kind="tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                return f"{psutil.Process(each.pid).name()} (pid {each.pid})"
    return ""


class Reached:
    """Accept connections at :attr:`port` until closed, so that other ranks can test whether they reach this one."""

    def __init__(self) -> None:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=256, dualstack_ipv6=both)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._greet, name="disttrain-doctor", daemon=True).start()

    def _greet(self) -> None:
        while True:
            try:
                guest, _ = self._listener.accept()
            except OSError:  # closed
                return
            with guest, suppress(OSError):
                guest.sendall(b"here\n")

    def close(self) -> None:
        """Stop accepting connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def reach(peers: Mapping[int, tuple[str, int]]) -> dict[int, str]:
    """Return why peers cannot be reached, by rank; empty if all can.

    Args:
        peers: address and port of each peer, by rank.
    """
    with ThreadPoolExecutor(max(1, min(32, len(peers)))) as pool:
        said = pool.map(_reach, peers.values())
    return {rank: why for rank, why in zip(peers, said, strict=True) if why}


def _reach(place: tuple[str, int]) -> str:
    try:
        with socket.create_connection(place, _REACH_SECONDS) as connection:
            connection.settimeout(_REACH_SECONDS)
            said = connection.recv(5)
            return "" if said == b"here\n" else "another program answered" if said else "it closed the connection"
    except TimeoutError:
        return f"no answer within {_REACH_SECONDS:g} s"
    except OSError as error:
        return error.strerror or str(error)


def loopback_speed() -> float:
    """Measure the bytes per second of one TCP connection inside this node, which bounds gloo here."""
    block = bytes(4 * 2**20)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_REACH_SECONDS)

        def send() -> None:
            with suppress(OSError), socket.create_connection(listener.getsockname()[:2], _REACH_SECONDS) as sender:
                for _ in range(_STREAM_BYTES // len(block)):
                    sender.sendall(block)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        received, buffer = 0, bytearray(2**20)
        try:
            stream, _ = listener.accept()
        except OSError:
            return 0.0
        with stream:
            stream.settimeout(_REACH_SECONDS)
            start = time.perf_counter()
            with suppress(OSError):
                while (number := stream.recv_into(buffer)) and time.perf_counter() - start < _REACH_SECONDS:
                    received += number
        return received / (time.perf_counter() - start)


def watched_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return variables that affect how ranks compute or communicate, and should be equal on all ranks."""
    begins = ("NCCL_", "GLOO_", "TORCH_NCCL", "TORCH_DISTRIBUTED", "CUBLAS_", "OMP_NUM_THREADS", "MKL_")
    own = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG_FILE")  # may differ between nodes
    found = os.environ if env is None else env
    return {name: value for name, value in sorted(found.items()) if name.startswith(begins) and name not in own}


def warn_of_loopback(used: Interface | None, num_hosts: int) -> Finding | None:
    """Warn if several nodes would use the loopback interface, which reaches only the node itself."""
    if num_hosts < 2 or used is None or not used.is_loopback:
        return None
    others = [each.name for each in interfaces() if not each.is_loopback]
    name = socket.gethostname()
    return warning(
        "network",
        f"{name} resolves to {used.addresses[0]} here: over gloo, the other nodes would connect to themselves",
        f"set GLOO_SOCKET_IFNAME={others[0] if others else 'INTERFACE'}, or correct {name} in /etc/hosts",
    )
