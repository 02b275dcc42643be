"""The real torchrun, as a process with all of its workers; whatever happens, none of them is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil


class Launch:
    """A torchrun that is under way, and what it and its workers print."""

    def __init__(self, options: Sequence[str], arguments: Sequence[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        target = arguments if arguments[0].endswith(".py") else ["-m", "disttrain", *arguments]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *options, *target],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
            )

    def workers(self) -> list[psutil.Process]:
        """The ranks' processes, and all that they have started."""
        try:
            return list(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def wait_for(self, sign: Path | str, timeout: float = 120) -> None:
        """Until a file exists, or words were printed."""
        deadline = time.monotonic() + timeout
        while not (sign.exists() if isinstance(sign, Path) else sign in self.log.read_text()):
            assert self.process.poll() is None, f"ended before {sign}\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {sign} within {timeout} s\n{self.log.read_text()}"
            time.sleep(0.05)

    def wait_for_port(self, port: int, timeout: float = 60) -> None:
        """Until something listens there."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return
            except OSError:
                assert time.monotonic() < deadline, f"nothing listens on {port}\n{self.log.read_text()}"
                time.sleep(0.05)

    def wait(self, timeout: float = 180) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {timeout} s\n{self.log.read_text()}") from None

    def kill(self) -> None:
        """The launcher and its workers die at once, as a node does."""
        victims = self.workers()
        self.process.kill()
        for victim in victims:
            try:
                victim.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


@contextmanager
def torchrun(options: Sequence[str], arguments: Sequence[str], log: Path) -> Iterator[Launch]:
    """Start it; what is left of it at the end is killed."""
    launch = Launch(options, arguments, log)
    try:
        yield launch
    finally:
        launch.kill()
