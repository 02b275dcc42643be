"""Runs of one recipe on this machine, one layout after the other, in processes as torchrun starts them.

Each rank has one thread, because sums of several threads depend on how many there are. Output goes to a file a rank.
Where a run is to be killed, its ranks kill themselves before a step and the same command is started again, which
resumes. Cost: a run of a few steps a layout, and the start of its processes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from disttrain.errors import DisttrainError
from disttrain.parity.layouts import Layout
from disttrain.parity.traces import Trace

_GRACE_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.1


class ParityError(DisttrainError):
    """A run of a comparison that failed."""


@dataclass(frozen=True)
class Runs:
    """What every run of a comparison has in common.

    Attributes:
        arguments: of ``disttrain fit``: the recipe and its overrides.
        folder: where the runs go.
        steps: optimizer steps of each.
        kill: kill each half-way and resume it.
    """

    arguments: tuple[str, ...]
    folder: Path
    steps: int
    kill: bool = False

    def run(self, layout: Layout, name: str = "") -> Trace:
        """Run the recipe in a layout.

        Raises:
            ParityError: the run failed; the message quotes its last words.
        """
        name = name or layout.name
        run_dir = self.folder / name
        codes = self._start(layout, run_dir)
        if self.kill and all(code == -signal.SIGKILL for code in codes):
            codes = self._start(layout, run_dir)
        if any(codes):
            rank = next((r for r, code in enumerate(codes) if code not in (0, -signal.SIGKILL)), 0)
            raise ParityError(
                f"layout {name} failed with exit code {codes[rank]}: {_last_words(_log(run_dir, rank))}",
                mend=f"see {_log(run_dir, rank)}",
            )
        return Trace(name, run_dir)

    def _command(self, layout: Layout, run_dir: Path) -> list[str]:
        command = [sys.executable, "-m", "disttrain", "fit", *self.arguments, *layout.settings]
        command += ["--trainer.run_dir", str(run_dir)]
        command += ["--trainer.log_every_steps", "1", "--trainer.progress_bar", "false"]
        command += ["--trainer.callbacks+=disttrain.callbacks.ledger.SampleLedger"]
        trace = {"class_path": "disttrain.callbacks.trace.StepTrace", "init_args": self._trace_settings()}
        command += [f"--trainer.callbacks+={json.dumps(trace)}"]
        if self.kill:
            # On disk before the next step begins: the kill is meant to come after a checkpoint.
            command += [f"--checkpoint.every_steps={max(1, self.steps // 4)}", "--checkpoint.save=sync"]
        return command

    def _trace_settings(self) -> dict[str, int]:
        return {"stop_at": self.steps, "kill_at": self.steps // 2 if self.kill else -1}

    def _start(self, layout: Layout, run_dir: Path) -> list[int]:
        """Start all ranks and wait for them; once one has failed, the others have a few seconds."""
        run_dir.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        processes = []
        try:
            for rank in range(layout.num_ranks):
                with open(_log(run_dir, rank), "ab") as log:
                    processes.append(
                        subprocess.Popen(
                            self._command(layout, run_dir),
                            env=_environment(rank, layout.num_ranks, port),
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                        )
                    )
            return _wait(processes)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    patience = _GRACE_SECONDS
    while any(process.poll() is None for process in processes):
        waiting = next(process for process in processes if process.poll() is None)
        try:
            waiting.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if any(process.poll() for process in processes):
                patience -= _POLL_SECONDS
        if patience < 0:
            for process in processes:
                if process.poll() is None:
                    process.kill()
            for process in processes:
                process.wait()
    return [process.wait() for process in processes]


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    # The ranks of a launcher that this runs under are not these.
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC_", "SLURM_"))}
    ours |= {"OMP_NUM_THREADS": "1"}
    if size == 1:
        return {name: value for name, value in ours.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return ours | {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _log(run_dir: Path, rank: int) -> Path:
    return run_dir / f"rank-{rank:05d}.log"


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("disttrain: error")]
    return (errors or lines or ["it said nothing"])[-1][:400]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
