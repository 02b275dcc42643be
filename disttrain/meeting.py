"""Where the ranks of a run meet: a host and a port that all of them come to on their own.

torchrun says it (``MASTER_ADDR``, ``MASTER_PORT``). SLURM does not: the host is the step's first node, from its list of
nodes, and the port one of a few that follow from job, step and restart, so that two steps of a job do not meet, nor a
restarted job its cut-off predecessor. Rank 0 takes the first of these that is free, and tells who comes the attempt's
name and the port at which its store is; the others look which one it was, and go past whatever else listens there. No
torch. Cost: a few connections; a call of ``scontrol`` where a node's name does not resolve.
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

from disttrain.errors import ConfigError, JoinError
from disttrain.terminal import tell
from disttrain.world import World

_FIRST_PORT: Final = 16_000
_NUM_PORTS: Final = 14_000
"""Below the ports that Linux gives to those who ask for any (32768 and up), above those of services."""
_CANDIDATES: Final = 8
_STRIDE: Final = 997
_GREETING: Final = "disttrain"
_LOOK_SECONDS: Final = 0.1
_ANSWER_SECONDS: Final = 3.0
_NOTE_SECONDS: Final = 30.0


@dataclass(frozen=True)
class Meeting:
    """Where the ranks meet.

    Attributes:
        host: name or address of rank 0's node.
        ports: which ports to try, in this order; one where the launcher has settled it.
        name: what the attempt is called; rank 0 says it to who comes, so that nobody meets another job's.
        hosts: names of the nodes, in the order of ranks, where they are known.
    """

    host: str
    ports: tuple[int, ...]
    name: str
    hosts: tuple[str, ...] = ()

    def on_host(self, rank: int, world: World) -> str:
        """Words for a rank: its number, and its node where that is known."""
        node = rank // world.local_size
        return f"rank {rank} on {self.hosts[node]}" if node < len(self.hosts) else f"rank {rank}"


def find_meeting(world: World, environ: Mapping[str, str] | None = None) -> Meeting:
    """Where the ranks of a world of several meet.

    Raises:
        ConfigError: the environment does not say, or names a node that has no address.
    """
    env = os.environ if environ is None else environ
    if world.launcher != "slurm":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
        if missing:
            raise ConfigError(
                f"the environment says rank {world.rank} of {world.size}, but {' and '.join(missing)} is not set",
                mend="launch with torchrun, disttrain launch or srun; or unset RANK WORLD_SIZE LOCAL_RANK to run alone",
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
    """Tell everyone who comes to the meeting that rank 0 is at a port, for as long as the context lasts. Rank 0 only.

    Raises:
        ConfigError: other programs have all ports of the meeting.
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
    """A free port of this host that stays free for processes to come, for as long as the context lasts.

    A number that is only looked up may be another program's by the time that it is used: as its own port, or as that of
    a connection it makes. A socket that is bound but does not listen keeps the kernel from giving it away, and lets
    others listen there that ask for ``SO_REUSEADDR``, as servers do, torch's stores among them.

    Args:
        everywhere: at all addresses, for ranks on other hosts, and not at the loopback alone.
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
                raise ConfigError(f"rank 0 cannot listen at port {port}: {error.strerror}") from None
    raise ConfigError(
        f"rank 0 cannot listen at port {', '.join(map(str, meeting.ports))} of {socket.gethostname()}: another program"
        " does",
        mend="set MASTER_PORT to a free port, the same for all ranks; on one node `disttrain launch` finds one",
    )


def hear(meeting: Meeting, deadline: float) -> int:
    """The port that rank 0 announces; all other ranks.

    Args:
        meeting: where.
        deadline: when to give up, as ``time.monotonic`` counts.

    Raises:
        JoinError: rank 0 did not answer in time; says what happened at each port.
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
            why[port] = said if word != _GREETING else f"{name} meets there, not {meeting.name}"
        ports = {text: [str(port) for port in why if why[port] == text] for text in why.values()}
        told = "; ".join(f"port {', '.join(numbers)}: {text}" for text, numbers in ports.items())
        if time.monotonic() > deadline:
            raise JoinError(
                f"rank 0 at {meeting.host} was not reached in time; {told}",
                mend="see whether rank 0 has started, and whether a firewall is between; `disttrain doctor` tells more",
            )
        if time.monotonic() > noted:
            noted = time.monotonic() + _NOTE_SECONDS
            tell(f"still waiting for rank 0 at {meeting.host}; {told}")
        time.sleep(_LOOK_SECONDS)


def _listen_to(host: str, port: int, seconds: float) -> str:
    """The greeting of what listens at a port, or why there is none."""
    try:
        with socket.create_connection((host, port), seconds) as connection, connection.makefile() as stream:
            line = stream.readline(200).strip()
    except TimeoutError:
        return "no answer"
    except (OSError, UnicodeDecodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return line if line.startswith(f"{_GREETING} ") else "what listens there is not rank 0"


def slurm_hosts(env: Mapping[str, str]) -> list[str]:
    """Names of the nodes of this SLURM step, or of the job, in SLURM's order.

    Raises:
        ConfigError: there is no list, or it has a form that only a missing ``scontrol`` can read.
    """
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    text = next((env[name] for name in names if env.get(name)), "")
    if not text:
        raise ConfigError(
            f"SLURM started this process, but none of {', '.join(names)} is set",
            mend="pass SLURM's variables on (srun --export=ALL; --env of the container), or set MASTER_ADDR",
        )
    try:
        return expand_nodes(text)
    except ValueError:
        return _scontrol("hostnames", text, f"the list of nodes {text!r} is in no form that disttrain knows").split()


def expand_nodes(text: str) -> list[str]:
    """The names in a list such as ``n[01-03,7],gpu-[1-2]-a``.

    Raises:
        ValueError: it is no such list.
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
    """A node's name if it resolves, or else the address that SLURM has for it."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        shown = _scontrol("node", host, f"the node name {host!r} does not resolve")
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    if found is None:
        raise ConfigError(
            f"the node name {host!r} does not resolve, and scontrol tells no address of it", mend="set MASTER_ADDR"
        )
    return found.group(1)


def _scontrol(what: str, argument: str, why: str) -> str:
    command = shutil.which("scontrol")
    if command is None:
        raise ConfigError(
            f"{why}, and there is no `scontrol` on PATH to ask",
            mend="set MASTER_ADDR to the first node's address, or put SLURM's commands into the container's PATH",
        )
    try:
        done = subprocess.run(
            [command, "show", what, argument], capture_output=True, text=True, timeout=20, check=False
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        said = done.stderr.strip() if done else "no answer within 20 s"
        raise ConfigError(f"{why}, and scontrol fails: {said}", mend="set MASTER_ADDR to the first node's address")
    return done.stdout


def _port(env: Mapping[str, str]) -> int:
    text = env["MASTER_PORT"]
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ConfigError(f"environment variable MASTER_PORT is {text!r}, not a port", mend="use 1024 to 65535")
    return int(text)
