"""A process beside a rank that notices when the rank's Python does not run: code of C holds its lock and never ends.

Within the process nothing can tell that apart from a process that was only stopped for a while, and whoever writes down
the stacks of threads that do run reads memory that changes under its hands: Python's own timer for it
(``faulthandler.dump_traceback_later``) ended runs that had been suspended with a segmentation fault. So a thread of the
rank sends a byte a second, and the process counts the seconds without one in which the rank was not stopped and it was
awake itself. After ``limit`` seconds it has the rank print its stacks, by a signal whose handler is of C; after
``grace`` more without a byte it kills the rank, which nothing else in it could end.

The process obeys no signal and ends with the rank. Cost: 8 MiB, 10 ms of its own at the start, and a thread, that wake
once a second.
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

# The last one is nobody's: users and launchers send the named ones, the C library the first of the numbered ones.
PRINT_STACKS: Final = getattr(signal, "SIGRTMAX", signal.SIGUSR2)
_DISOBEYED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_MOST_SECONDS: Final = 1.0  # between two bytes, and two looks for them
_LOOKS: Final = 10  # within the limit
_PROGRAM: Final = Path(__file__).with_name("monitor_main.py")


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
            interval = min(_MOST_SECONDS, limit / _LOOKS)
            arguments = (os.getpid(), rank, limit, grace, interval, int(PRINT_STACKS))
            # Blocked signals stay blocked in the new process: it is never one that a signal could end.
            former = signal.pthread_sigmask(signal.SIG_BLOCK, _DISOBEYED)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_PROGRAM), *map(str, arguments)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, former)
            # Apart from the watchdog's: that one may wait for a file system while the training goes on.
            self._thread = threading.Thread(target=self._feed, args=(interval,), name="disttrain-runs", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """The process is gone when this returns."""
        self._ended.set()
        if self._process is not None:
            self._process.kill()
            self._thread.join()  # which writes no more: nobody reads
            self._process.communicate()
            self._process = None

    def _feed(self, interval: float) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        pipe = self._process.stdin
        with suppress(OSError):  # the process has died: the run goes on without
            while not self._ended.wait(interval):
                os.write(pipe.fileno(), b".")
