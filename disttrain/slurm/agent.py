"""torchrun on one node of a SLURM job: ``python -m disttrain.slurm.agent RANKS SUBCOMMAND ...``, one task per node.

Nodes rendezvous as ranks under srun do. The first node's agent reserves a free port until torchrun's store listens on
it, and announces it at the first free one of several ports derived from the job. No port is assumed to be free, and all
nodes agree on it. SIGTERM and SIGUSR1 are forwarded to the ranks only: torchrun itself would kill the ranks 30 seconds
after SIGTERM, however much time the cluster grants to save. If the signal arrives before there are ranks, the agent
exits by it, as a rank without handlers would. The exit code is that of the first rank to fail.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import psutil

from disttrain.distributed.rendezvous import announce, find_meeting, hear, reserve_port
from disttrain.distributed.world import World
from disttrain.errors import ConfigError, DisttrainError
from disttrain.system.terminal import say, tell

PASSED: Final = (signal.SIGTERM, signal.SIGUSR1)
_MEET_SECONDS: Final = 600.0
_LOOK_SECONDS: Final = 0.5


def main(argv: Sequence[str]) -> int:
    """Run the ranks of this node.

    Args:
        argv: the number of ranks per node, followed by their command.

    Returns:
        The exit code: 0, or that of the first rank to fail, 128 + n if signal n ended it.
    """
    try:
        ranks, command = int(argv[0]), list(argv[1:])
        nodes, node = (int(os.environ[name]) for name in ("SLURM_NNODES", "SLURM_NODEID"))
    except (IndexError, KeyError, ValueError):
        return _say(
            ConfigError("this command starts the ranks of a node, inside a SLURM job only", hint="use disttrain submit")
        )
    _pass_signals_on()
    try:
        with _place(World(node, nodes, 0, 1, "slurm")) as (host, port):
            return _torchrun(ranks, nodes, node, host, port, command)
    except DisttrainError as error:
        return _say(error)


@contextmanager
def _place(world: World) -> Iterator[tuple[str, int]]:
    """Yield the rendezvous: host name and port of the first node."""
    meeting = find_meeting(world)
    if world.rank:
        yield meeting.host, hear(meeting, time.monotonic() + _MEET_SECONDS)
        return
    with reserve_port(everywhere=True) as port, announce(meeting, port):
        yield meeting.host, port


def _torchrun(ranks: int, nodes: int, node: int, host: str, port: int, command: list[str]) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = ["--nnodes", str(nodes), "--node-rank", str(node), "--nproc-per-node", str(ranks)]
    options += ["--master-addr", host, "--master-port", str(port)]
    # torchrun handles only SIGINT; on any other signal it would kill all ranks.
    options += ["--signals-to-handle", "SIGINT"]
    try:
        run.main([*options, "-m", "disttrain", *command])
    except ChildFailedError as error:
        say(error, lines=True, err=True)
        code = int(error.get_first_failure()[1].exitcode)
        return 128 - code if code < 0 else code
    return 0


def _pass_signals_on() -> None:
    """Start forwarding signals to the ranks, even while the main thread is blocked inside torch."""
    near, far = socket.socketpair()
    far.setblocking(False)
    near.settimeout(_LOOK_SECONDS)
    signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
    for number in PASSED:
        signal.signal(number, lambda *_: None)  # a handler, unlike SIG_IGN, is not inherited by the ranks
    # The thread keeps a reference to both ends, because the wakeup descriptor must stay open.
    threading.Thread(target=_watch, args=(near, far), name="disttrain-signals", daemon=True).start()


def _watch(near: socket.socket, far: socket.socket) -> None:
    begun = False
    while True:
        try:
            numbers = near.recv(64)
        except TimeoutError:
            numbers = b""
        ranks = [] if begun and not numbers else psutil.Process().children()
        begun = begun or bool(ranks)
        if begun:
            near.settimeout(None)
        for number in numbers:
            if number in PASSED and not begun:
                os._exit(128 + number)
            for rank in ranks:
                if number in PASSED:
                    with suppress(psutil.Error):
                        rank.send_signal(number)


def _say(error: DisttrainError) -> int:
    tell(f"error: {error}")
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
