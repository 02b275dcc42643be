"""A process beside each rank that detects when native code holds the GIL and never returns.

From inside the rank's process, this cannot be told apart from a process that was merely stopped for a while, and
dumping the stacks of running threads reads memory that changes meanwhile: Python's own timer for this
(``faulthandler.dump_traceback_later``) made suspended runs end with a segmentation fault. So a thread of the rank sends
one byte per second, and the monitor process counts the seconds without one in which neither the rank nor the monitor
itself was stopped. After ``limit`` seconds it makes the rank print its stacks, with a signal whose handler is written
in C; after ``grace`` more without a byte it kills the rank, which nothing inside it could do.

The process ignores signals and exits with the rank. Cost: 8 MiB, 10 ms of CPU time at the start, and a thread; both
wake up once per second.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

# The last real-time signal is free: users and launchers send the named signals, glibc uses the first real-time ones.
PRINT_STACKS: Final = getattr(signal, "SIGRTMAX", signal.SIGUSR2)
_DISOBEYED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_MOST_SECONDS: Final = 1.0  # between two bytes, and between two checks
_LOOKS: Final = 10  # checks within the limit
_PROGRAM: Final = Path(__file__).with_name("monitor_main.py")


class Overseer:
    """Starts the monitor process, and a thread that only tells it that Python is running.

    Args:
        rank: the rank's number, for its messages.
        limit: seconds without Python running after which the stacks are printed to standard error.
        grace: seconds after that until the rank is killed.
    """

    def __init__(self, rank: int, *, limit: float, grace: float) -> None:
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):  # it cannot be started: continue without it
            faulthandler.register(PRINT_STACKS, file=2, all_threads=True)  # never undone: a signal may be pending
            interval = min(_MOST_SECONDS, limit / _LOOKS)
            arguments = (os.getpid(), rank, limit, grace, interval, int(PRINT_STACKS))
            # The child inherits the blocked signals, so none of them can ever end it.
            former = signal.pthread_sigmask(signal.SIG_BLOCK, _DISOBEYED)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_PROGRAM), *map(str, arguments)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, former)
            # Separate from the watchdog's thread, which may wait for a file system while training continues.
            self._thread = threading.Thread(target=self._feed, args=(interval,), name="disttrain-runs", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Kill the process, and wait until it is gone."""
        self._ended.set()
        if self._process is not None:
            self._process.kill()
            self._thread.join()  # it stops: its pipe has no reader anymore
            self._process.communicate()
            self._process = None

    def _feed(self, interval: float) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        pipe = self._process.stdin
        with suppress(OSError):  # the process has died: continue without it
            while not self._ended.wait(interval):
                os.write(pipe.fileno(), b".")
