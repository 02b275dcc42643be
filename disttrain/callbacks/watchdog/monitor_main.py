"""The monitor process of a rank. It is run by its path and imports almost nothing, so it starts in 10 ms.

:mod:`disttrain.callbacks.watchdog.monitor_process` starts it and explains why.
"""

from __future__ import annotations

import os
import select
import sys
import time

_SIGKILL = 9  # importing signal takes nearly as long as starting Python


def oversee(pid: int, rank: int, limit: float, grace: float, interval: float, print_stacks: int) -> None:
    """Monitor a rank; return when it has exited or has closed this process's standard input.

    Args:
        pid: the rank's process, which is this one's parent.
        rank: the rank's number.
        limit: seconds without a byte on standard input after which the rank is made to print its stacks.
        grace: seconds after that until it is killed.
        interval: seconds between two checks.
        print_stacks: number of the signal that makes it print them.
    """
    silent, printed, looked = 0.0, False, time.monotonic()
    while os.getppid() == pid:
        spoken = select.select([0], [], [], interval)[0]
        if spoken and not os.read(0, 4096):
            return
        now = time.monotonic()
        # A longer gap than between two checks means that this process was stopped, most likely along with the rank.
        passed, looked = min(now - looked, 2 * interval), now
        if spoken:
            silent, printed = 0.0, False
        elif not _is_stopped(pid):
            silent += passed
        if silent >= limit and not printed:
            printed = True
            why = f"no Python has run for {silent:.0f} s, code of C holds its lock"
            _tell(f"rank {rank} (process {pid}) hangs: {why}; its stacks:")
            _send(pid, print_stacks)
        if silent >= limit + grace:
            _tell(f"rank {rank} (process {pid}) is killed, since it cannot end by itself")
            _send(pid, _SIGKILL)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has just exited
        return


def _is_stopped(pid: int) -> bool:
    """Return whether the process is stopped by SIGSTOP or a debugger."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):  # it has just exited, or this is not Linux
        return False


def _tell(text: str) -> None:
    try:
        os.write(2, f"disttrain: {text}\n".encode())
    except OSError:  # standard error is closed
        return


if __name__ == "__main__":
    _, text_pid, text_rank, text_limit, text_grace, text_interval, text_signal = sys.argv
    durations = (float(text_limit), float(text_grace), float(text_interval))
    oversee(int(text_pid), int(text_rank), *durations, int(text_signal))
