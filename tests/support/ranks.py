"""Real ranks for tests: one process each, gloo on the CPU, started as torchrun would start them.

The processes are forked from a server that has imported disttrain but run none of it, so a rank starts in
milliseconds instead of seconds; everything after that is the real thing. A run that does not end within its
time is killed, all ranks of it, and fails with what the ranks printed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from disttrain.distributed.rendezvous import reserve_port

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preload"])


@dataclass(frozen=True)
class Outcome:
    """What a run's ranks returned and printed."""

    codes: list[int | None]
    outputs: list[str]

    @property
    def text(self) -> str:
        """All output, by rank."""
        return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(self.outputs))

    def ok(self) -> Outcome:
        """This outcome, if every rank ended with 0."""
        assert self.codes == [0] * len(self.codes), f"exit codes {self.codes}\n{self.text}"
        return self


class Ranks:
    """Ranks that are under way: one process each."""

    def __init__(self, ranks: int, target: Callable[..., Any], *arguments: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
        self._hold = ExitStack()
        port = self._hold.enter_context(reserve_port())
        self.processes = [
            _CONTEXT.Process(target=_rank, args=(rank, ranks, port, str(log), target, arguments), daemon=True)
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 120, *, grace: float = 3) -> Outcome:
        """How they ended; those that do not end in time, or not soon after another one failed, are killed.

        Args:
            timeout: seconds for all.
            grace: seconds for the others once one has failed.
        """
        _join(self.processes, timeout, grace)
        self._hold.close()
        return Outcome([process.exitcode for process in self.processes], [log.read_text() for log in self.logs])


def run_ranks(ranks: int, target: Callable[..., Any], *arguments: Any, folder: Path, timeout: float = 120) -> Outcome:
    """Call a function in that many ranks; an exception in one is its exit code 1."""
    return Ranks(ranks, target, *arguments, folder=folder).wait(timeout)


def run_cli(ranks: int, arguments: Sequence[str], *, folder: Path, timeout: float = 120) -> Outcome:
    """Run ``disttrain ARGUMENTS`` in that many ranks; a fit without its report, unless it is asked for."""
    if arguments[0] == "fit" and not any(word.startswith("--report") for word in arguments):
        arguments = [*arguments, "--report=false"]  # a report costs as much as all the rest
    return run_ranks(ranks, _cli, list(arguments), folder=folder, timeout=timeout)


def _cli(arguments: list[str]) -> None:
    from disttrain.cli import main

    sys.exit(main(arguments))


def _join(processes: list[BaseProcess], timeout: float, grace: float) -> None:
    """Wait for all; once one has failed, the others get a little longer and are killed, as torchrun does."""
    deadline = time.monotonic() + timeout
    while alive := [process for process in processes if process.is_alive()]:
        failed = any(process.exitcode not in (0, None) for process in processes)
        alive[0].join(0.1)
        if failed:
            deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            for process in alive:
                process.kill()
            for process in alive:
                process.join()


def _rank(rank: int, ranks: int, port: int, log: str, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # A test that trained in this process before the server was started has left its meeting place there.
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"):
        os.environ.pop(name, None)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        target(*arguments)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
