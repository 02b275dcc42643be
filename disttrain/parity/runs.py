"""Run one recipe in several layouts on this machine, one after the other, with one process per rank as under torchrun.

Each rank uses one thread, because sums over several threads depend on their number. Output goes to one file per rank.
To test a kill, rank 0 kills itself before a step, which ends the other ranks; then the same command runs again and
resumes. Whatever the recipe says, each run starts from scratch in its own folder and copies no checkpoints elsewhere,
so it cannot touch the user's runs. Cost: a run of a few steps per layout. Ranks are forked from a server that has
imported disttrain but executed nothing, so libraries are loaded once, not once per rank.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

from disttrain.distributed.rendezvous import reserve_port
from disttrain.parallel.config import ParallelConfig
from disttrain.parity.layouts import Layout
from disttrain.parity.traces import ParityError, Trace

_GRACE_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.1
_CONTEXT: Final = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["disttrain.commands.training"])


@dataclass(frozen=True)
class Runs:
    """What all runs of a comparison share.

    Attributes:
        arguments: arguments of ``disttrain fit``: the recipe and its overrides.
        folder: the parent of the run folders.
        steps: optimizer steps of each run.
        parallel: the recipe's settings, which each layout overrides.
        micro_batch_size: for layouts that do not set one; None for the recipe's.
    """

    arguments: tuple[str, ...]
    folder: Path
    steps: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batch_size: int | None = None

    def run(self, layout: Layout, *, name: str = "", kill: bool = False) -> Trace:
        """Run the recipe in a layout.

        Args:
            layout: how the run is spread over ranks.
            name: name of the run and its folder; the layout's by default.
            kill: whether to kill the run half-way and resume it.

        Raises:
            ParityError: the run failed (the message quotes its last output), or it was not killed and resumed as
                requested.
        """
        name = name or layout.name
        run_dir = self.folder / name
        trace = Trace(name, run_dir)
        words = self._arguments(layout, run_dir, kill)
        codes = self._start([*words, "--resume", "never"], layout, run_dir)
        if kill and codes[0] == -signal.SIGKILL and trace.was_killed:  # the other ranks fail on the lost connection
            codes = self._start([*words, "--resume", "auto"], layout, run_dir)
        if any(codes):
            rank = next((r for r, code in enumerate(codes) if code not in (0, -signal.SIGKILL)), 0)
            raise ParityError(
                f"layout {name} failed with exit code {codes[rank]}: {_last_words(_log(run_dir, rank))}",
                hint=f"see {_log(run_dir, rank)}",
            )
        if kill:
            self._check_killed(trace)
        return trace

    def _check_killed(self, trace: Trace) -> None:
        """Check that a run was killed and resumed as requested."""
        if not trace.was_killed:
            done = max(trace.steps)
            raise ParityError(
                f"layout {trace.name} was not killed: it ended by itself after step {done}, but the kill"
                f" was due before step {self._kill_at + 1}",
                hint=f"use --steps {done}, or let the recipe train longer (trainer.max_steps, trainer.max_epochs)",
            )
        if not trace.resumed_from:
            raise ParityError(
                f"layout {trace.name} was killed after step {self._kill_at} and did not resume from a checkpoint",
                hint="increase --steps, and configure checkpoints in the recipe's `checkpoint:` only",
            )

    @property
    def _kill_at(self) -> int:
        return self.steps // 2

    def _arguments(self, layout: Layout, run_dir: Path, kill: bool) -> list[str]:
        words = ["fit", *self.arguments, "--trainer.parallel", json.dumps(asdict(layout.parallel(self.parallel)))]
        if size := layout.micro_batch_size or self.micro_batch_size:
            words += ["--data.micro_batch_size", str(size)]
        # The recipe's own run folder and its remote copies must not be touched.
        words += ["--trainer.run_dir", str(run_dir), "--checkpoint.mirror", "null"]
        words += ["--trainer.log_every_steps", "1", "--trainer.progress_bar", "false"]
        words += ["--trainer.callbacks+=disttrain.callbacks.records.sample_ledger.SampleLedger"]
        settings = {"stop_at": self.steps, "kill_at": self._kill_at if kill else -1}
        trace = {"class_path": "disttrain.callbacks.records.trace.StepTrace", "init_args": settings}
        words += [f"--trainer.callbacks+={json.dumps(trace)}"]
        if kill:
            # Saved synchronously, so that the checkpoint is on disk before the kill.
            words += [f"--checkpoint.every_steps={max(1, self.steps // 4)}", "--checkpoint.save=sync"]
        return words

    def _start(self, words: list[str], layout: Layout, run_dir: Path) -> list[int]:
        """Start all ranks and wait for them; once one fails, the others get a few seconds."""
        run_dir.mkdir(parents=True, exist_ok=True)
        processes: list[BaseProcess] = []
        with reserve_port() as port:
            try:
                for rank in range(layout.num_ranks):
                    environment = _environment(rank, layout.num_ranks, port)
                    arguments = (words, environment, str(_log(run_dir, rank)))
                    started = _CONTEXT.Process(target=_run_rank, args=arguments)
                    started.start()
                    processes.append(started)
                return _wait(processes)
            finally:
                for process in processes:
                    process.kill()
                    process.join()


def _run_rank(words: list[str], environment: dict[str, str], log: str) -> None:
    """Run one rank of a run, in its own process."""
    os.environ.clear()
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    import torch

    torch.set_num_threads(1)
    sys.argv = ["disttrain", *words]
    code = 1
    try:
        runpy.run_module("disttrain", run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(processes: Sequence[BaseProcess]) -> list[int]:
    """Return the exit codes; once one rank fails, the others get a few seconds."""
    patience = _GRACE_SECONDS
    while alive := [process for process in processes if process.is_alive()]:
        failed = any(process.exitcode not in (0, None) for process in processes)
        alive[0].join(_POLL_SECONDS)
        if failed:
            patience -= _POLL_SECONDS
        if patience < 0:
            for process in alive:
                process.kill()
                process.join()
    return [process.exitcode or 0 for process in processes]


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    # Drop the variables of any launcher around this process; they describe other ranks.
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
    return (errors or lines or ["no output"])[-1][:400]
