"""The command line: ``disttrain SUBCOMMAND`` or ``python -m disttrain SUBCOMMAND``.

Subcommands are imported on demand, so that ``shards`` and ``report`` start without PyTorch. A user's mistake is
printed as one message, with exit code 2. A mistake that all ranks make is only printed by the first rank of each node.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from disttrain.distributed.exit_codes import note_ending
from disttrain.distributed.world import World, detect_world
from disttrain.errors import (
    PREEMPTED_CODE,
    ConfigError,
    DisttrainError,
    Preempted,
    RankError,
    first_line,
    nearest,
    passed_through_users_code,
)
from disttrain.system.output import lossy_output, open_descriptors, silence
from disttrain.system.terminal import redacted, say, tell, warning_line

_TRAINING = {
    "fit": "train, stop early, restore the best weights, test and report",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "write one result for each sample, in order",
}
_TOOLS = {
    "launch": "run a subcommand with several ranks on this machine",
    "doctor": "check devices, network, folders and speed, on one rank or all",
    "shards": "pack, index, verify, list and measure shards",
    "checkpoints": "list, verify, export and prune the checkpoints of a run",
    "submit": "check a training job and queue it on a SLURM cluster",
    "jobs": "list runs with the state of their SLURM jobs",
    "parity": "show that a recipe trains the same in several layouts",
    "report": "plot the report of a run, or compare several runs",
}

_BACKENDS = ("gloo", "NCCL", "nccl")
_MOST_LETTERS = 300
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE)
_OF_A_PATH = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ENXIO, errno.EBADF, errno.EINVAL),
)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit code."""
    code, usual = 1, warnings.formatwarning
    warnings.formatwarning = warning_line
    arguments = sys.argv[1:] if argv is None else argv
    open_descriptors()
    try:
        # The output of a training run is a log; that of other commands is their result.
        with lossy_output(last=True) if arguments[:1] == ["fit"] else lossy_output("stderr"):
            code = _main(arguments)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        raise
    except Exception as error:
        if passed_through_users_code(error):
            raise
        code = _unexpected(error)
    finally:
        note_ending(code)
        warnings.formatwarning = usual
    return code


def _main(arguments: list[str]) -> int:
    try:
        code = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # so that a write error counts as the command's, not as one at interpreter exit
        return code
    except DisttrainError as error:
        _print_error(error)
        return error.exit_code
    except RuntimeError as error:
        if str(error).startswith("Symlink loop from"):  # Path.resolve's, before Python 3.13
            told = DisttrainError(f"{str(error).partition('from ')[2]} is a link to itself", hint="correct the path")
            _print_error(told)
            return told.exit_code
        if not _lost_a_peer(error):
            raise
        world = detect_world()
        note_ending(RankError.exit_code, follows=True)
        why = first_line(error)[:_MOST_LETTERS]
        text = f"rank {world.rank} of {world.size} stops: another rank failed or was killed: {why}"
        tell(text)
        return RankError.exit_code
    except KeyboardInterrupt:
        return _interrupted()
    except Preempted as stop:
        if detect_world().rank == 0:
            tell(stop)
        return PREEMPTED_CODE
    except SystemExit as exit_:
        # Lightning ends training interrupted by Ctrl-C with a bare exit().
        if isinstance(exit_.__context__, KeyboardInterrupt):
            return _interrupted()
        if not isinstance(exit_.__context__, BrokenPipeError):  # rich turns this into an exit
            raise
        silence(sys.stdout)
        return 0
    except BrokenPipeError as error:
        if arguments[:1] == ["fit"] or passed_through_users_code(error):
            raise  # a different pipe: broken output does not end training
        # The reader of the output, such as `head`, has exited; there is nobody left to report to.
        silence(sys.stdout)
        return 0
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            told = DisttrainError(
                f"{error.filename or 'the output or a file'} cannot be written: {error.strerror}",
                hint="check free space, quota and permissions; then rerun the same command to resume from the last"
                " checkpoint",
            )
        elif error.errno in _OF_A_PATH and error.filename is not None and not passed_through_users_code(error):
            told = DisttrainError(
                f"{os.fsdecode(error.filename)}: {error.strerror}", hint="correct the path, or its permissions"
            )
        else:
            raise
        _print_error(told)
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except (OSError, ValueError):  # the output's own disk is full: keep its buffer from failing again at exit
            silence(sys.stdout)
        return told.exit_code


def _dispatch(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        say(_usage(), lines=True)
        return 0
    if name == "--version":
        from disttrain.version import __version__

        say(f"disttrain {__version__}")
        return 0
    if name in _TOOLS:
        command = import_module(f"disttrain.commands.{name}")
        code: int = command.main(rest, (*_TRAINING, *_TOOLS)) if name == "launch" else command.main(rest)
        return code
    if name in _TRAINING:
        from disttrain.commands import training

        return training.run(arguments)
    known = [*_TRAINING, *_TOOLS]
    raise ConfigError(f"there is no subcommand {name!r}", hint=f"see `disttrain --help`; {nearest(name, known)}")


def _interrupted() -> int:
    tell("interrupted; rerun the same command to resume from the last checkpoint")
    return 130


def _lost_a_peer(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank is gone; that rank reports the reason itself.

    A user's own error may have the same message, so it must come from a collective: by its type, by the backend's name
    in its text, or because it was raised inside PyTorch, Lightning or disttrain.
    """
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    text, torch = str(error), sys.modules.get("torch")
    if torch is None or detect_world().size == 1 or not any(sign in text for sign in signs):
        return False
    if isinstance(error, getattr(torch.distributed, "DistError", ())) or any(name in text for name in _BACKENDS):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    path = frame.tb_frame.f_code.co_filename if frame is not None else ""
    modules = [sys.modules.get(name) for name in ("disttrain", "torch", "lightning")]
    return path.startswith(tuple(f"{Path(str(module.__file__)).parent}/" for module in modules if module is not None))


def _unexpected(error: Exception) -> int:
    """Print an internal or library error in a few lines, and save its traceback to a file."""
    package = f"{Path(__file__).parent}{os.sep}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(package)]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    words = (str(error).splitlines() or [""])[0][:_MOST_LETTERS]
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, of a setting or a module
        told: DisttrainError = ConfigError(words, hint="correct the setting or the module that it names")
    elif isinstance(error, MemoryError):
        told = DisttrainError(f"not enough memory{place}: {words}", hint="check the sizes that the command asks for")
        told.exit_code = 1
    else:
        told = DisttrainError(
            f"unexpected {type(error).__name__}{place}: {words}",
            hint=f"if the command and its files are right, report this with the traceback in {_keep_traceback(error)}",
        )
        told.exit_code = 1
    _print_error(told)
    return told.exit_code


def _keep_traceback(error: Exception) -> str:
    """Write the traceback to the run folder if there is one, or to a temporary file; return its path."""
    text = redacted("".join(traceback.format_exception(error)))
    runs = sys.modules.get("disttrain.run.folder")
    for folder in (runs.last_begun() if runs is not None else None, None):
        with suppress(OSError):
            descriptor, name = tempfile.mkstemp(prefix="traceback-", suffix=".txt", dir=folder)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return name
    say(text, lines=True, err=True)
    return "the lines above"


def _usage() -> str:
    lines = [f"  {name:<11} {text}" for name, text in {**_TRAINING, **_TOOLS}.items()]
    return "\n".join(["usage: disttrain SUBCOMMAND [--help] [OPTIONS]", "", *lines])


def _print_error(error: DisttrainError) -> None:
    try:
        world = detect_world()
    except ConfigError:  # the environment itself is the problem
        world = World()
    if isinstance(error, RankError):
        note_ending(error.exit_code, follows=True)
        return  # another rank prints its own
    if note_ending(error.exit_code, message=str(error)):
        return  # the launcher prints it
    if world.local_rank > 0 and isinstance(error, ConfigError):
        return  # all ranks of a node have the same configuration and environment
    where = f" (rank {world.rank} of {world.size})" if world.size > 1 else ""
    tell(f"error{where}: {error}")


if __name__ == "__main__":
    sys.exit(main())
