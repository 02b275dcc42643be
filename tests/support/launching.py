"""The real ``disttrain launch``, as a process with all of its ranks; whatever happens, none of them is left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.torchrun import Launch


class Launcher(Launch):
    """A launch that is under way."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "disttrain", "launch", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
            )


@contextmanager
def launched(arguments: Sequence[str], log: Path) -> Iterator[Launcher]:
    """Start it; what is left of it at the end is killed."""
    launcher = Launcher(arguments, log)
    try:
        yield launcher
    finally:
        launcher.kill()
