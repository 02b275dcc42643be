"""Record stop signals instead of acting on them.

Inside :class:`NotedSignals`, the handlers of SIGTERM, SIGUSR1 and SIGINT only set a flag: no collective, no file I/O,
no exception, so the interrupted code continues undisturbed. The training loop checks the flag where stopping is safe.
A second SIGINT ends the process immediately with code 130; a thread does this, so that it works while the main thread
waits inside a collective. SIGHUP is ignored, since closing a terminal is not a reason to stop. Cost: none until a
signal arrives.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Final

from disttrain.system.terminal import tell

NOTED: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
INTERRUPTED_CODE: Final = 130
_ONE_PRESS_SECONDS: Final = 0.2  # on Ctrl-C, SIGINT arrives from both the terminal and the launcher


class NotedSignals:
    """Records signals within the context, and restores the previous handlers on exit.

    Python only allows handlers in the main thread; in any other thread, nothing is recorded.

    Args:
        speaks: whether this process logs the first signal to stderr.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self.noted: signal.Signals | None = None
        """The first signal received."""
        self._speaks = speaks
        self._former: dict[signal.Signals, Any] = {}
        self._wire: socket.socket | None = None
        self._interrupted = 0.0

    def __enter__(self) -> NotedSignals:
        self.noted, self._interrupted = None, 0.0
        if threading.current_thread() is not threading.main_thread():
            return self
        # Python's C-level handler writes each signal number here, even while the main thread is inside C code.
        near, far = socket.socketpair()
        far.setblocking(False)
        former = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
        if former != -1:  # already in use, for example by an event loop in the main thread: leave it alone
            signal.set_wakeup_fd(former)
            near.close()
            far.close()
        else:
            self._wire = far
            threading.Thread(target=self._watch, args=(near,), name="disttrain-signals", daemon=True).start()
        self._former = {number: signal.signal(number, self._note) for number in NOTED}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # neither nohup nor the program has set it
            launched = "TORCHELASTIC_RUN_ID" in os.environ
            signal.signal(signal.SIGHUP, self._note_launcher if launched else signal.SIG_IGN)
            self._former[signal.SIGHUP] = signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._former = {}
        if self._wire is not None:
            signal.set_wakeup_fd(-1)
            self._wire.close()  # ends the thread
            self._wire = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted is None:
            self.noted = signal.Signals(number)

    def _note_launcher(self, number: int, frame: FrameType | None) -> None:
        """Treat SIGHUP as SIGTERM: torchrun forwards it and then kills ranks that do not exit."""
        self._note(signal.SIGTERM, frame)

    def _watch(self, near: socket.socket) -> None:
        told = False
        with near:
            while numbers := near.recv(64):
                for number in numbers:
                    if number == signal.SIGINT:
                        self._interrupt()
                    if number in NOTED and not told and self._speaks:
                        told = True
                        _say(f"{signal.Signals(number).name}: stopping at the next step boundary")

    def _interrupt(self) -> None:
        before, self._interrupted = self._interrupted, time.monotonic()
        if before and self._interrupted - before > _ONE_PRESS_SECONDS:
            _say("interrupted again: ending at once; the same command goes on from the last checkpoint")
            os._exit(INTERRUPTED_CODE)
        self._interrupted = before or self._interrupted


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # stderr may be gone, for example after the terminal was closed
        tell(text)
