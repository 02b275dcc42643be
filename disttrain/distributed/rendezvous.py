"""Rendezvous: how the ranks of a run independently agree on a host and port.

torchrun provides them (``MASTER_ADDR``, ``MASTER_PORT``). Under SLURM, the host is the first node in the step's node
list, and the port is one of a few derived from job, step and restart. So two steps of a job never meet, nor does a
requeued job meet a stale process of its previous run. Rank 0 listens on the first free port and sends each client the
attempt's name and the store's port. The other ranks try the ports and ignore anything else that listens there. Needs no
torch. Cost: a few connections, and a call to ``scontrol`` if a node name does not resolve.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from typing import Final

from disttrain.distributed.world import World
from disttrain.errors import ConfigError, JoinError
from disttrain.system.terminal import tell

_FIRST_PORT: Final = 16_000
_NUM_PORTS: Final = 14_000
"""Below Linux's ephemeral ports (32768 and up), above those of common services."""
_CANDIDATES: Final = 8
_STRIDE: Final = 997
_GREETING: Final = "disttrain"
_LOOK_SECONDS: Final = 0.1
_ANSWER_SECONDS: Final = 3.0
_NOTE_SECONDS: Final = 30.0


@dataclass(frozen=True)
class Meeting:
    """Rendezvous parameters.

    Attributes:
        host: name or address of rank 0's node.
        ports: ports to try, in this order; a single one if the launcher has fixed it.
        name: name of the attempt; rank 0 sends it to clients, so that no rank joins another job.
        hosts: node names in rank order, if known.
    """

    host: str
    ports: tuple[int, ...]
    name: str
    hosts: tuple[str, ...] = ()

    def on_host(self, rank: int, world: World) -> str:
        """Describe a rank for messages: its number, and its node if known."""
        node = rank // world.local_size
        return f"rank {rank} on {self.hosts[node]}" if node < len(self.hosts) else f"rank {rank}"


def find_meeting(world: World, environ: Mapping[str, str] | None = None) -> Meeting:
    """Find the rendezvous of a world with several ranks.

    Raises:
        ConfigError: the environment lacks it, or names a node without an address.
    """
    env = os.environ if environ is None else environ
    if world.launcher != "slurm":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
        if missing:
            raise ConfigError(
                f"the environment says rank {world.rank} of {world.size}, but {' and '.join(missing)} is not set",
                hint="launch with torchrun, disttrain launch or srun; or unset RANK WORLD_SIZE LOCAL_RANK to run alone",
            )
        return Meeting(env["MASTER_ADDR"], (_port(env),), env.get("TORCHELASTIC_RUN_ID", "ranks"))
    hosts = tuple(slurm_hosts(env))
    name = ".".join(env.get(part, "0") for part in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    start = zlib.crc32(name.encode())
    ports = tuple(_FIRST_PORT + (start + i * _STRIDE) % _NUM_PORTS for i in range(_CANDIDATES))
    if env.get("MASTER_PORT"):
        ports = (_port(env),)
    return Meeting(env.get("MASTER_ADDR") or _address(hosts[0]), ports, name, hosts)


@contextmanager
def announce(meeting: Meeting, port: int) -> Iterator[None]:
    """Within the context, send every client the port of rank 0's store. Rank 0 only.

    Raises:
        ConfigError: all candidate ports are in use by other programs.
    """
    listener = _listen(meeting)
    greeting = f"{_GREETING} {meeting.name} {port}\n".encode()

    def greet() -> None:
        while True:
            try:
                guest, _ = listener.accept()
            except OSError:  # closed
                return
            with guest, suppress(OSError):
                guest.sendall(greeting)

    threading.Thread(target=greet, name="disttrain-meeting", daemon=True).start()
    try:
        yield
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        listener.close()


@contextmanager
def reserve_port(*, everywhere: bool = False) -> Iterator[int]:
    """Reserve a free port on this host for processes yet to be started, for the duration of the context.

    Just looking up a free port is racy: another program may take it, as its own port or as the source port of a
    connection. A bound socket that does not listen keeps the kernel from handing the port out, but still allows servers
    with ``SO_REUSEADDR``, such as torch's stores, to listen on it.

    Args:
        everywhere: bind to all addresses, for ranks on other hosts, instead of only the loopback address.
    """
    both = everywhere and socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if both else socket.AF_INET) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if both:
            place.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        place.bind(("" if everywhere else "127.0.0.1", 0))
        yield place.getsockname()[1]


def _listen(meeting: Meeting) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    for port in meeting.ports:
        try:
            family = socket.AF_INET6 if both else socket.AF_INET
            return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"rank 0 cannot listen on port {port}: {error.strerror}") from None
    raise ConfigError(
        f"rank 0 cannot listen on port {', '.join(map(str, meeting.ports))} of {socket.gethostname()}: it is used by"
        " another program",
        hint="set MASTER_PORT to a free port, the same for all ranks; on one node `disttrain launch` finds one",
    )


def hear(meeting: Meeting, deadline: float) -> int:
    """Return the port that rank 0 announces. All ranks except 0.

    Args:
        meeting: the rendezvous.
        deadline: when to give up, in ``time.monotonic()`` seconds.

    Raises:
        JoinError: rank 0 did not answer in time; the message says what happened at each port.
    """
    noted = time.monotonic() + _NOTE_SECONDS
    why: dict[int, str] = {}
    while True:
        for port in meeting.ports:
            said = _listen_to(meeting.host, port, min(_ANSWER_SECONDS, max(0.2, deadline - time.monotonic())))
            word, _, rest = said.partition(" ")
            name, _, announced = rest.rpartition(" ")
            if word == _GREETING and name == meeting.name and announced.isdigit():
                return int(announced)
            why[port] = said if word != _GREETING else f"it is used by {name}, not {meeting.name}"
        ports = {text: [str(port) for port in why if why[port] == text] for text in why.values()}
        told = "; ".join(f"port {', '.join(numbers)}: {text}" for text, numbers in ports.items())
        if time.monotonic() > deadline:
            raise JoinError(
                f"rank 0 at {meeting.host} was not reached in time; {told}",
                hint="check that rank 0 has started and that no firewall blocks it; `disttrain doctor` shows more",
            )
        if time.monotonic() > noted:
            noted = time.monotonic() + _NOTE_SECONDS
            tell(f"still waiting for rank 0 at {meeting.host}; {told}")
        time.sleep(_LOOK_SECONDS)


def _listen_to(host: str, port: int, seconds: float) -> str:
    """Return the greeting received at a port, or why there was none."""
    try:
        with socket.create_connection((host, port), seconds) as connection, connection.makefile() as stream:
            line = stream.readline(200).strip()
    except TimeoutError:
        return "no answer"
    except (OSError, UnicodeDecodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return line if line.startswith(f"{_GREETING} ") else "another program listens there"


def slurm_hosts(env: Mapping[str, str]) -> list[str]:
    """Return the node names of this SLURM step, or of the job, in SLURM's order.

    Raises:
        ConfigError: there is no node list, or only ``scontrol`` could parse it, and that is missing.
    """
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    text = next((env[name] for name in names if env.get(name)), "")
    if not text:
        raise ConfigError(
            f"SLURM started this process, but none of {', '.join(names)} is set",
            hint="pass on SLURM's variables (srun --export=ALL; --env of the container), or set MASTER_ADDR",
        )
    try:
        return expand_nodes(text)
    except ValueError:
        return _scontrol("hostnames", text, f"the list of nodes {text!r} has an unknown format").split()


def expand_nodes(text: str) -> list[str]:
    """Expand a node list such as ``n[01-03,7],gpu-[1-2]-a``.

    Raises:
        ValueError: the text is not such a list.
    """
    names: list[str] = []
    items = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(items) != text or not items:
        raise ValueError(text)
    for item in items:
        parts = re.split(r"\[([^\]]*)\]", item)
        choices = [_numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
        names += ["".join(chosen) for chosen in product(*choices)]
    return names


def _numbers(ranges: str) -> list[str]:
    found: list[str] = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(ranges)
        found += [str(i).zfill(len(first)) for i in range(int(first), int(last if dash else first) + 1)]
    return found


def _address(host: str) -> str:
    """Return a node's name if it resolves, otherwise its address according to SLURM."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        shown = _scontrol("node", host, f"the node name {host!r} does not resolve")
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    if found is None:
        raise ConfigError(
            f"the node name {host!r} does not resolve, and scontrol gives no address for it", hint="set MASTER_ADDR"
        )
    return found.group(1)


def _scontrol(what: str, argument: str, why: str) -> str:
    command = shutil.which("scontrol")
    if command is None:
        raise ConfigError(
            f"{why}, and `scontrol` is not on PATH",
            hint="set MASTER_ADDR to the first node's address, or add SLURM's commands to the container's PATH",
        )
    try:
        done = subprocess.run(
            [command, "show", what, argument], capture_output=True, text=True, timeout=20, check=False
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        said = done.stderr.strip() if done else "no answer within 20 s"
        raise ConfigError(f"{why}, and scontrol fails: {said}", hint="set MASTER_ADDR to the first node's address")
    return done.stdout


def _port(env: Mapping[str, str]) -> int:
    text = env["MASTER_PORT"]
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ConfigError(f"environment variable MASTER_PORT is {text!r}, not a port", hint="use 1024 to 65535")
    return int(text)
