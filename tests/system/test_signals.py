"""Signals leave a note; a second SIGINT ends the process, whatever the main thread does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from disttrain.system.signals import NOTED, NotedSignals


@pytest.mark.parametrize("number", NOTED)
def test_a_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in NOTED]
    signals = NotedSignals(speaks=False)
    with signals:
        assert signals.noted is None
        os.kill(os.getpid(), number)
        assert signals.noted == number
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.noted == number, "the first one counts"
    assert [signal.getsignal(each) for each in NOTED] == before
    with signals:
        assert signals.noted is None, "another run begins without notes"


def test_a_terminal_that_hangs_up_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where torchrun passes the signal on, it kills the ranks that do not end."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        for launched in (False, True):
            if launched:
                monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
            with NotedSignals(speaks=False) as signals:
                os.kill(os.getpid(), signal.SIGHUP)
                assert signals.noted == (signal.SIGTERM if launched else None)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, former)


def test_in_another_thread_nothing_is_changed() -> None:
    seen = []

    def enter() -> None:
        with NotedSignals():
            seen.extend(signal.getsignal(each) for each in NOTED)

    before = [signal.getsignal(each) for each in NOTED]
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == before


BLOCKED = """
import ctypes, os, sys
from disttrain.system.signals import NotedSignals
with NotedSignals():
    print("ready", flush=True)
    # Waits in C, where no Python handler runs: a lock that is never released, with signals restarting the wait.
    lib, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    lib.pthread_mutex_lock(lock)
    lib.pthread_mutex_lock(lock)
"""


def test_a_second_sigint_ends_a_process_that_waits_inside_c() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline() == "disttrain: SIGINT: stopping at the next step boundary\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "ending at once" in errors
