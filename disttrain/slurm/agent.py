"""torchrun on one node of a SLURM job: ``python -m disttrain.slurm.agent RANKS SUBCOMMAND ...``, a task a node.

The nodes meet as ranks of srun do: the first node's agent takes a free port, holds it until torchrun's store listens
there, and tells it to the others at one of several places that follow from the job, whichever is free; so no port is
assumed, and all nodes agree on it. SIGTERM and SIGUSR1 go on to the ranks and to nothing else: torchrun itself would
kill the ranks 30 seconds after SIGTERM, whatever time the cluster grants to save. Told before there are ranks, the
agent ends by the signal, as ranks do that do not listen yet. The exit code is that of the rank that failed first.
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

from disttrain.errors import ConfigError, DisttrainError
from disttrain.meeting import announce, find_meeting, hear, reserve_port
from disttrain.terminal import say, tell
from disttrain.world import World

PASSED: Final = (signal.SIGTERM, signal.SIGUSR1)
_MEET_SECONDS: Final = 600.0
_LOOK_SECONDS: Final = 0.5


def main(argv: Sequence[str]) -> int:
    """Run the ranks of this node.

    Args:
        argv: ranks of each node, and what they run.

    Returns:
        the exit code: 0, or that of the rank that failed first, 128 + n where signal n ended it.
    """
    try:
        ranks, command = int(argv[0]), list(argv[1:])
        nodes, node = (int(os.environ[name]) for name in ("SLURM_NNODES", "SLURM_NODEID"))
    except (IndexError, KeyError, ValueError):
        return _say(ConfigError("this starts the ranks of a node of a SLURM job", mend="use disttrain submit"))
    _pass_signals_on()
    try:
        with _place(World(node, nodes, 0, 1, "slurm")) as (host, port):
            return _torchrun(ranks, nodes, node, host, port, command)
    except DisttrainError as error:
        return _say(error)


@contextmanager
def _place(world: World) -> Iterator[tuple[str, int]]:
    """Where the nodes meet: name and port of the first one."""
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
    # SIGINT alone is torchrun's; of the others it would make an end of all ranks.
    options += ["--signals-to-handle", "SIGINT"]
    try:
        run.main([*options, "-m", "disttrain", *command])
    except ChildFailedError as error:
        say(error, lines=True, err=True)
        code = int(error.get_first_failure()[1].exitcode)
        return 128 - code if code < 0 else code
    return 0


def _pass_signals_on() -> None:
    """From now on the ranks hear what this process is told, even while its main thread waits inside torch."""
    near, far = socket.socketpair()
    far.setblocking(False)
    near.settimeout(_LOOK_SECONDS)
    signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
    for number in PASSED:
        signal.signal(number, lambda *_: None)  # a handler, unlike "ignore", is not handed down to the ranks
    # The thread holds both ends: the one that is written to has to stay open.
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
