"""The most memory that a process and its children hold at once, sampled from outside until standard input ends.

Counted are anonymous and shared pages, each shared one in parts among those who map it (PSS). Mapped files are
left out: they are the page cache's, which the kernel may take back. Imports nothing heavy, so that it runs in a process
of its own: ``python -S memory.py PID``.
"""

from __future__ import annotations

import os
import select
import sys

INTERVAL_SECONDS = 0.01


def held(pid: int) -> int:
    """Bytes that a process holds."""
    found = 0
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            for line in file:
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    found += int(line.split()[1]) * 1024
    except OSError:  # it has ended
        return 0
    return found


def tree(pid: int) -> list[int]:
    """A process and all its descendants but this one."""
    found = [pid]
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                for child in map(int, file.read().split()):
                    if child != os.getpid():
                        found += tree(child)
    except OSError:
        pass
    return found


def main() -> None:
    pid, most = int(sys.argv[1]), 0
    print("ready", flush=True)
    while True:
        most = max(most, sum(map(held, tree(pid))))
        if select.select([sys.stdin], [], [], INTERVAL_SECONDS)[0]:
            break
    print(most, flush=True)


if __name__ == "__main__":
    main()
