"""The torchrun that started this process, and an end where that has died before the ranks have met.

Ranks that wait for each other or for a store would otherwise wait on for half an hour, since nothing is left to end
them. Once they have met, a lost store or peer ends them. Linux only; elsewhere, and under other launchers, whose ranks
may outlive what has started them, nothing is watched. Cost: a few files of ``/proc`` at the import, and one file
descriptor and a sleeping thread while the ranks meet.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from disttrain.endings import note_ending
from disttrain.errors import JoinError
from disttrain.terminal import tell

_VARIABLE: Final = b"TORCHELASTIC_RUN_ID="


def _find_agent() -> int | None:
    """A descriptor of torchrun's process: the nearest ancestor that has not got its variables from another one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not hasattr(os, "pidfd_open"):
        return None
    pid = os.getppid()
    with suppress(OSError, ValueError, IndexError):
        while pid > 1 and any(word.startswith(_VARIABLE) for word in _words(pid, "environ")):
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])  # its parent
        return os.pidfd_open(pid)
    return None


def _words(pid: int, name: str) -> list[bytes]:
    return Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0")


# At the import, which is the earliest: whoever adopts this process once torchrun has died looks like it later.
_AGENT: Final = _find_agent()


@contextmanager
def ends_with_launcher() -> Iterator[None]:
    """End this process within a moment if torchrun dies, or has died, before this context is left."""
    if _AGENT is None:
        yield
        return
    over, done = os.pipe()
    thread = threading.Thread(target=_watch, args=(_AGENT, over), name="disttrain-launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(done)
        thread.join()
        os.close(over)


def _watch(agent: int, over: int) -> None:
    """Wait until either can be read, which a process's descriptor can once it has ended."""
    poll = select.poll()
    poll.register(agent, select.POLLIN)
    poll.register(over, select.POLLIN)
    ready = [descriptor for descriptor, _ in poll.poll()]
    if over in ready:
        return
    rank = os.environ.get("RANK", "?")
    tell(f"rank {rank} ends: torchrun has died before all ranks had met")
    note_ending(JoinError.exit_code, follows=True)
    os._exit(JoinError.exit_code)
