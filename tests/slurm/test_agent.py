"""The agent of a node, which runs torchrun there, by itself; jobs of several nodes are in ``test_requeue.py``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "disttrain.slurm.agent"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_there_are_ranks_ends_it_at_once(number: signal.Signals) -> None:
    """The second node waits for the first, whose place is somebody's who says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(60)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(mute.getsockname()[1])}
        job = {"SLURM_JOB_ID": "7", "SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_STEP_NODELIST": "n[1-2]"}
        agent = subprocess.Popen([*COMMAND, "1", "fit"], env={**os.environ, **job, **place})
        with mute.accept()[0]:
            agent.send_signal(number)
            assert agent.wait(60) == 128 + number


def test_it_is_for_jobs_of_slurm() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run([*COMMAND, "1", "fit"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("disttrain: error: this command starts the ranks of a node, inside a SLURM job only")
