"""The process beside a rank: what it prints and ends, what it lets be, and when it ends itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

from disttrain.callbacks.watchdog import monitor_process

# A rank of which C holds Python's lock; `sem_wait` goes on after a signal, `sleep` does not.
RANK = """
import ctypes, os, runpy, signal
Overseer = runpy.run_path("{path}")["Overseer"]  # by itself, since importing the package takes seconds
library = ctypes.PyDLL(None)
overseer = Overseer(3, limit=0.5, grace={grace})
other = overseer._process.pid
def in_c():
    {act}
in_c()
"""


def rank(act: str, *, grace: float = 0.5) -> subprocess.Popen[str]:
    code = RANK.format(path=monitor_process.__file__, act=act, grace=grace)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_rank_that_c_holds_prints_its_stacks_and_is_killed() -> None:
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")  # what launchers send to all processes
    sends = "; ".join(f"os.kill(other, signal.{name})" for name in names)
    with rank(f"{sends}; library.sem_wait(ctypes.create_string_buffer(64))") as process:
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGKILL, errors
    first, *stacks, last = errors.splitlines()
    assert first.startswith(f"disttrain: rank 3 (process {process.pid}) hangs: no Python has run for "), first
    assert any(line.endswith(" in in_c") for line in stacks), errors
    assert last == f"disttrain: rank 3 (process {process.pid}) is killed, since it cannot end by itself"


def test_a_rank_that_goes_on_is_not_killed() -> None:
    goes_on = "library.sleep(600); overseer.end(); print(psutil.pid_exists(other))"
    with rank(f"import psutil; {goes_on}", grace=600) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors.count("disttrain: ") == 1
    assert output == "False\n", "ending it leaves its process"


def test_a_rank_that_is_stopped_is_let_be() -> None:
    """For three times the limit; it runs on as if nothing had been, and nobody looks into its stacks."""
    stops = "os.kill(os.getpid(), signal.SIGSTOP); overseer.end()"
    with rank(stops) as process:
        watched = psutil.Process(process.pid)
        while watched.status() != psutil.STATUS_STOPPED:
            assert process.poll() is None, process.communicate()
        time.sleep(1.5)  # what is tested is the passing of time
        process.send_signal(signal.SIGCONT)
        errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors) == (0, "")


def test_it_ends_with_its_rank() -> None:
    """Also where another process has inherited the rank's end of the pipe, as a loader's worker does."""
    forks = "print(other, os.fork() or signal.pause(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    with rank(forks, grace=600) as process:
        assert process.stdout is not None
        pids = [int(each) for each in process.stdout.readline().split()]
        try:
            assert process.wait(timeout=60) == -signal.SIGKILL
            psutil.wait_procs(processes(pids[:1]), timeout=20)
            assert not processes(pids[:1]), "it is left without its rank"
        finally:
            os.kill(pids[1], signal.SIGKILL)


def processes(pids: list[int]) -> list[psutil.Process]:
    found = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return [each for each in found if each.status() != psutil.STATUS_ZOMBIE]
