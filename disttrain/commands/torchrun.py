"""``python -m disttrain.commands.torchrun``: torchrun, without the traceback that it prints when a rank fails.

It takes torchrun's own options and does what torchrun does. A failed rank has printed its own error by then, and
torchrun's traceback of thirty lines, which is about torchrun and not about the run, would push that error off the
screen. What torchrun logs of each failed rank, its exit code or the signal that killed it, stays; signals that say
little to a user are explained.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from typing import Final

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from disttrain.system.terminal import tell

_SIGNALS: Final = {
    signal.SIGBUS: "a shard or another mapped file was cut off or its disk failed while it was read, or /dev/shm is"
    " full; check the disk, and run `disttrain shards verify`",
    signal.SIGKILL: "something else killed it: the kernel, if the machine ran out of memory (see `dmesg`), or the job's"
    " memory limit",
    signal.SIGSEGV: "native code crashed: look for an extension that does not fit this version of PyTorch",
}


def explain(exit_codes: Iterable[tuple[int, int]]) -> str:
    """Explain the first rank that a signal ended; empty if none of the signals needs it.

    Args:
        exit_codes: rank and exit code of the failed ranks, -n if signal n ended it; the first failure first.
    """
    for rank, code in exit_codes:
        for number, cause in _SIGNALS.items():
            if code == -number:
                return f"rank {rank} was ended by {number.name}: {cause}"
    return ""


def main() -> int:
    """Run torchrun with the arguments of this process.

    Returns:
        0, or 1 if a rank failed or a signal ended the ranks, as from torchrun itself.
    """
    try:
        torchrun()
    except SignalException:
        return 1
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        if text := explain((rank, failure.exitcode) for rank, failure in failures):
            tell(text)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
