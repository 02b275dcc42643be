"""End this process if torchrun dies before the ranks have connected.

Ranks that wait for each other or for a store would otherwise hang for half an hour, since no agent is left to kill
them. Once they are connected, a lost store or peer ends them. Linux only. Elsewhere, and under other launchers (whose
ranks may outlive their parent), nothing is watched. Cost: reading a few files of ``/proc`` at import, and a file
descriptor and a sleeping thread while the ranks connect.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from disttrain.distributed.exit_codes import note_ending
from disttrain.errors import JoinError
from disttrain.system.terminal import tell

_VARIABLE: Final = b"TORCHELASTIC_RUN_ID="


def _find_agent() -> int | None:
    """Return a pidfd of torchrun: the nearest ancestor that did not inherit torchrun's variables."""
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


# At import, as early as possible: if torchrun dies, the process that adopts this one would look like torchrun.
_AGENT: Final = _find_agent()


@contextmanager
def ends_with_launcher() -> Iterator[None]:
    """End this process promptly if torchrun dies, or has already died, within this context."""
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
    """Wait until either descriptor is readable; a pidfd is, once its process has ended."""
    poll = select.poll()
    poll.register(agent, select.POLLIN)
    poll.register(over, select.POLLIN)
    ready = [descriptor for descriptor, _ in poll.poll()]
    if over in ready:
        return
    rank = os.environ.get("RANK", "?")
    tell(f"rank {rank} exits: torchrun died before all ranks had joined")
    note_ending(JoinError.exit_code, follows=True)
    os._exit(JoinError.exit_code)
