"""Many items at a time: results in order, the first error ends it, progress that suits where it is shown."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from disttrain.data.index import parallel_map as together_module
from disttrain.data.index.parallel_map import together

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_results_are_in_order(count: int, quick: bool) -> None:
    assert list(together(lambda n: n * n, range(count), quick=quick)) == [n * n for n in range(count)]


def test_calls_overlap() -> None:
    gate = threading.Barrier(4, timeout=20)
    list(together(lambda _: gate.wait(), range(8), threads=4))


def test_the_first_error_ends_it() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 3:
            raise ValueError("three")
        time.sleep(0.001)
        done.append(number)

    with pytest.raises(ValueError, match="three"):
        list(together(work, range(10_000), threads=2))
    assert len(done) < 1000, "what had not begun was done all the same"


def test_a_result_does_not_wait_for_the_last() -> None:
    go_on = threading.Event()
    results = together(lambda number: go_on.wait(20) if number else True, range(3))
    assert next(results)
    go_on.set()
    assert list(results) == [True, True]


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    list(together(lambda n: n, range(50), label="indexing"))
    assert log.getvalue() == "", "what is soon done needs no line"
    monkeypatch.setattr(together_module, "_LINE_SECONDS", 0.0)
    list(together(lambda n: n, range(2000), threads=1, label="indexing"))
    lines = log.getvalue().splitlines()
    assert lines[-1] == "indexing: 2,000 of 2,000"
    assert all(line.startswith("indexing: ") for line in lines)


def test_a_terminal_gets_a_bar_and_a_pipe_keeps_what_is_its() -> None:
    script = (
        "import time\n"
        "from disttrain.data.index.parallel_map import together\n"
        "for n in together(lambda n: time.sleep(0.02) or n, range(40), label='indexing'):\n"
        "    print('result', n, flush=True)\n"
    )
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=terminal, text=True, cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(screen, 4096):
            shown += piece
    except OSError:
        pass  # how Linux says that the other end is closed
    os.close(screen)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.splitlines() == [f"result {n}" for n in range(40)]
    assert b"indexing" in shown
    assert b"/40" in shown
    assert b"result" not in shown
