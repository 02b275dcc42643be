"""``disttrain launch``: run a subcommand or a script on all GPUs of this machine, as a thin wrapper around torchrun.

Counts the GPUs, prints the torchrun command and runs it. torchrun picks a free port, so concurrent launches do not
clash. Signals are forwarded to torchrun and from there to the ranks. The exit code is the ranks' own (75 preempted, 76
hung, 77 out of memory, 2 usage error), where torchrun alone always returns 1. If a rank ran out of memory for a micro
batch, all ranks are restarted with at most half its size. Does not import torch itself.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from types import FrameType
from typing import Final

from disttrain.distributed.exit_codes import VARIABLE, Ending, code_of, read_endings
from disttrain.distributed.world import detect_world
from disttrain.errors import OUT_OF_MEMORY_CODE, ConfigError, nearest
from disttrain.system.terminal import Parser, tell

_FORWARDED: Final = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
_MOST_RANKS: Final = 1024
_PR_SET_PDEATHSIG: Final = 1


def main(argv: list[str], subcommands: Collection[str]) -> int:
    """Run the command under torchrun.

    Args:
        argv: the arguments that follow ``disttrain launch``.
        subcommands: the names of all subcommands.

    Returns:
        The exit code of the ranks, or torchrun's if they recorded none.

    Raises:
        ConfigError: no command or an unknown one is given, or this process is itself a rank.
    """
    arguments = _parser().parse_args(argv)
    if not arguments.command:
        raise ConfigError(
            "disttrain launch needs a subcommand or a script",
            hint="name one, as in: disttrain launch fit --config X.yaml",
        )
    _check_command(arguments.command[0], subcommands)
    if arguments.nproc is not None and arguments.nproc < 1:
        raise ConfigError(f"--nproc is {arguments.nproc}", hint="use at least 1, or omit it for one rank per GPU")
    if arguments.nproc is not None and arguments.nproc > _MOST_RANKS:
        raise ConfigError(f"--nproc is {arguments.nproc}", hint=f"use at most {_MOST_RANKS} on one machine")
    if arguments.max_restarts < 0:
        raise ConfigError(f"--max-restarts is {arguments.max_restarts}", hint="use 0 or more")
    _check_outside(os.environ)
    nproc = arguments.nproc or max(1, count_gpus(os.environ, Path("/dev")))
    command = torchrun_command(arguments.command, nproc=nproc, max_restarts=arguments.max_restarts)
    threads = {} if "OMP_NUM_THREADS" in os.environ or nproc == 1 else {"OMP_NUM_THREADS": "1"}
    shown = " ".join([*(f"{name}={value}" for name, value in threads.items()), shlex.join(command)])
    tell(shown)
    folder = Path(tempfile.mkdtemp(prefix="disttrain-launch-"))
    try:
        code, endings, asked = _run(command, {**os.environ, **threads}, folder)
        before: list[Ending] = []
        # The same failure again means that the restarted ranks did not learn of it: another folder, say.
        while code and not asked and endings != before and any(one.code == OUT_OF_MEMORY_CODE for one in endings):
            _tell(endings, nproc, again=True)
            before = endings
            code, endings, asked = _run(command, {**os.environ, **threads}, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _tell(endings, nproc)
    return code_of(endings, code)


def _check_command(name: str, subcommands: Collection[str]) -> None:
    """Reject what every rank would reject, before any rank starts."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ConfigError(f"there is no script {name}", hint="give its path, relative to the current folder")
    elif name == "launch":
        raise ConfigError("disttrain launch cannot launch itself", hint="name the subcommand that the ranks should run")
    elif name not in subcommands:
        known = nearest(name, subcommands)
        raise ConfigError(f"there is no subcommand {name!r} to launch", hint=f"see `disttrain --help`; {known}")


def torchrun_command(command: list[str], *, nproc: int, max_restarts: int = 0) -> list[str]:
    """Return the command that runs a disttrain subcommand or a script in ``nproc`` local ranks."""
    target = command if command[0].endswith(".py") else ["-m", "disttrain", *command]
    options = ["--standalone", "--nproc-per-node", str(nproc), "--signals-to-handle", ",".join(_FORWARDED)]
    if max_restarts:
        options += ["--max-restarts", str(max_restarts)]
    return [sys.executable, "-m", "disttrain.commands.torchrun", *options, *target]


def count_gpus(env: Mapping[str, str], devices: Path) -> int:
    """Count the GPUs that a child process would see, from device files and ``CUDA_VISIBLE_DEVICES``.

    Args:
        env: the environment.
        devices: the folder of device files.
    """
    there = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.glob("nvidia*"))
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not there:
        return there
    named = [name.strip() for name in visible.split(",")]
    # CUDA ignores the first invalid entry and all that follow it; -1 is the usual way to hide devices.
    return next((i for i, name in enumerate(named) if not _exists(name, there)), len(named))


def _exists(name: str, num_gpus: int) -> bool:
    """Return whether an entry of ``CUDA_VISIBLE_DEVICES`` names a GPU; a UUID is not checked."""
    return int(name) < num_gpus if name.isdigit() else name not in ("", "-1")


def _check_outside(env: Mapping[str, str]) -> None:
    world = detect_world(env)
    if world.launcher == "slurm":
        raise ConfigError(
            f"srun started {world.size} tasks, each of which would launch its own ranks",
            hint="omit `launch`, since srun starts one task per rank; or use torchrun with srun --ntasks-per-node=1",
        )
    if "TORCHELASTIC_RUN_ID" in env:
        raise ConfigError(
            f"disttrain launch was started by torchrun, as rank {world.rank} of {world.size}",
            hint="pass the subcommand to torchrun directly; or unset the TORCHELASTIC_ variables if they are left over",
        )


def _run(command: list[str], env: dict[str, str], folder: Path) -> tuple[int, list[Ending], bool]:
    """Run torchrun and forward signals to it.

    Args:
        command: the torchrun command.
        env: its environment.
        folder: where the ranks record how they ended.

    Returns:
        torchrun's exit code, how the ranks ended, and whether a signal was forwarded.
    """
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []
    passed_on: list[int] = []
    for path in folder.iterdir():
        path.unlink()

    def forward(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        if process is None:
            early.append(number)
        elif process.poll() is None:
            process.send_signal(number)

    # SIGHUP (terminal closed) is ignored: the ranks keep training and this process waits for them.
    before = {
        name: signal.signal(signal.Signals[name], signal.SIG_IGN if name == "SIGHUP" else forward)
        for name in _FORWARDED
    }
    try:
        # In a separate session, so that Ctrl-C reaches torchrun only through forward(), not also from the terminal.
        process = subprocess.Popen(
            command,
            env={**env, VARIABLE: str(folder)},
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - this process has one thread
        )
        for number in early:
            process.send_signal(number)
        code = process.wait()
        return code, read_endings(folder), bool(passed_on)
    finally:
        for name, handler in before.items():
            signal.signal(signal.Signals[name], handler)


def _die_with_parent() -> None:
    """Have the kernel send torchrun SIGTERM when the launcher dies, even by SIGKILL. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _tell(endings: list[Ending], nproc: int, *, again: bool = False) -> None:
    """Print each distinct error of the ranks once, below torchrun's log, or why the ranks are restarted."""
    by_message: dict[str, list[int]] = {}
    for ending in endings:
        if ending.message:
            by_message.setdefault(ending.message, []).append(ending.rank)
    for message, ranks in by_message.items():
        where = f" (rank {', '.join(map(str, ranks))} of {nproc})" if nproc > 1 else ""
        tell(f"{message}; restarting all ranks" if again else f"error{where}: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="disttrain launch",
        usage="disttrain launch [--nproc N] [--max-restarts K] SUBCOMMAND ... | SCRIPT.py ...",
        description="Run a subcommand of disttrain, or a script, in several ranks on this machine: one rank per GPU, or"
        " one on the CPU, unless --nproc is given. Prints the torchrun command that it runs.",
        epilog="Exits with the code of the ranks (see docs/cli.md). For several nodes, use torchrun or srun.",
        allow_abbrev=False,
    )
    parser.add_argument("--nproc", type=int, help="number of ranks (default: one per GPU, or 1 without GPUs)")
    parser.add_argument(
        "--max-restarts", type=int, default=0, help="how many times to restart failed ranks (default: %(default)s)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the subcommand or script, with its arguments")
    return parser
