"""A process beside a rank that notices when the rank's Python does not run: code of C holds its lock and never ends.

Within the process nothing can tell that apart from a process that was only stopped for a while, and whoever writes down
the stacks of threads that do run reads memory that changes under its hands: Python's own timer for it
(``faulthandler.dump_traceback_later``) ended runs that had been suspended with a segmentation fault. So a thread of the
rank sends a byte a second, and this process counts the seconds without one in which the rank was not stopped and it was
awake itself. After ``limit`` seconds it has the rank print its stacks, by a signal whose handler is of C; after
``grace`` more without a byte it kills the rank, which nothing else in it could end.

It needs the standard library only, obeys no signal, and ends with the rank. Cost: a Python process of 10 MiB, and a
thread, that wake once a second.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

# The last one is nobody's: users and launchers send the named ones, the C library the first of the numbered ones.
PRINT_STACKS: Final = getattr(signal, "SIGRTMAX", signal.SIGUSR2)
_DISOBEYED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_MOST_SECONDS: Final = 1.0  # between two bytes, and two looks for them
_LOOKS: Final = 10  # within the limit


class Overseer:
    """Starts the process, and a thread that does nothing but to tell it that Python runs.

    Args:
        rank: that the process is to name.
        limit: seconds without Python after which the stacks are printed, to standard error.
        grace: seconds after that until the rank is killed.
    """

    def __init__(self, rank: int, *, limit: float, grace: float) -> None:
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):  # no process is to be had: the run goes on without
            faulthandler.register(PRINT_STACKS, file=2, all_threads=True)  # and never undone: it may be on its way
            # Blocked signals stay blocked in the new process: it is never one that a signal could end.
            former = signal.pthread_sigmask(signal.SIG_BLOCK, _DISOBEYED)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", __file__, *map(str, (os.getpid(), rank, limit, grace))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, former)
            arguments = (min(_MOST_SECONDS, limit / _LOOKS), self._process.stdin)
            # Apart from the watchdog's: that one may wait for a file system while the training goes on.
            self._thread = threading.Thread(target=self._feed, args=arguments, name="disttrain-runs", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """The process is gone when this returns."""
        self._ended.set()
        if self._process is not None:
            self._process.kill()
            self._thread.join()  # which writes no more: nobody reads
            self._process.communicate()
            self._process = None

    def _feed(self, interval: float, pipe: IO[bytes]) -> None:
        with suppress(OSError):  # the process has died: the run goes on without
            while not self._ended.wait(interval):
                os.write(pipe.fileno(), b".")


def oversee(pid: int, rank: int, limit: float, grace: float) -> None:
    """What the process does: it returns when the rank has ended, or lets go of standard input.

    Args:
        pid: the rank's process, which is this one's parent.
        rank: its number.
        limit: as for :class:`Overseer`.
        grace: likewise.
    """
    interval = min(_MOST_SECONDS, limit / _LOOKS)
    silent, printed, looked = 0.0, False, time.monotonic()
    while os.getppid() == pid:
        spoken = select.select([0], [], [], interval)[0]
        if spoken and not os.read(0, 4096):
            return
        now = time.monotonic()
        # Of a longer gap than between two looks, this process was stopped itself, most likely with the rank.
        passed, looked = min(now - looked, 2 * interval), now
        if spoken:
            silent, printed = 0.0, False
        elif not _is_stopped(pid):
            silent += passed
        if silent >= limit and not printed:
            printed = True
            why = f"no Python has run for {silent:.0f} s, code of C holds its lock"
            _tell(f"rank {rank} (process {pid}) hangs: {why}; its stacks:")
            _send(pid, PRINT_STACKS)
        if silent >= limit + grace:
            _tell(f"rank {rank} (process {pid}) is killed, since it cannot end by itself")
            _send(pid, signal.SIGKILL)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


def _is_stopped(pid: int) -> bool:
    """By SIGSTOP or a debugger."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):  # it has just ended, or this is no Linux
        return False


def _tell(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"disttrain: {text}\n".encode())


if __name__ == "__main__":
    oversee(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
