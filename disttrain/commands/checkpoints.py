"""``disttrain checkpoints``: list, verify, export and prune a run's checkpoints, local or remote.

``ls``, ``verify`` and ``prune`` read only markers and files and do not import torch. ``export`` reads the tensors; it
needs neither the model class nor a GPU. Errors that the user can fix are raised as
:class:`~disttrain.errors.DisttrainError`; the caller prints them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from disttrain.checkpoint.format.marker import MARKER, Committed, abandoned, check, committed, faults, remove
from disttrain.checkpoint.format.retention import Keep, best_of
from disttrain.checkpoint.remote.copies import Mirror, MirrorConfig, Stored, copy_of
from disttrain.data.remote.ranges import is_remote
from disttrain.errors import CheckpointError, ConfigError
from disttrain.system.terminal import Parser, path_word, say, tell


def main(argv: list[str]) -> int:
    """Run one subcommand.

    Returns:
        The exit code: 0, or 1 if ``verify`` found faults.

    Raises:
        DisttrainError: an error that the user can fix.
        SystemExit: from argparse, for ``--help`` (0) and wrong arguments (2).
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="disttrain checkpoints", description="List, verify, export and prune the checkpoints of a run."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, text in (
        ("ls", _ls, "list checkpoints with step, epoch, size, age and metric"),
        ("verify", _verify, "compare all files with their checksums; exit with 1 if any is damaged"),
        ("export", _export, "write the weights as safetensors or a state_dict"),
        ("prune", _prune, "remove checkpoints that no rule keeps"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        command.add_argument(
            "path", metavar="PATH", help="a run folder, a checkpoint, or the URL of either in a mirror"
        )
        if name == "ls":
            command.add_argument("--verify", action="store_true", help="compare checksums too; reads all files")
        if name == "export":
            command.add_argument("out", metavar="OUT", type=path_word, help="a .safetensors, .pt or .pth file")
            command.add_argument(
                "--which",
                choices=("best", "last"),
                default="best",
                help="which checkpoint of a run folder (default: best)",
            )
            command.add_argument("--ema", action="store_true", help="write the moving average of the weights")
            command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
        if name == "prune":
            command.add_argument(
                "--keep-last", metavar="K", type=int, default=1, help="number of newest to keep (default: 1)"
            )
            command.add_argument(
                "--keep-best", metavar="M", type=int, default=1, help="number of best to keep (default: 1)"
            )
            command.add_argument(
                "--keep-every-steps", metavar="N", type=int, help="also keep steps that are multiples of N"
            )
            command.add_argument("--dry-run", action="store_true", help="only list what would be removed")
    return parser


def _ls(arguments: argparse.Namespace) -> int:
    found, passed_over = _found(arguments.path)
    best = best_of([one.entry for one in found], 1)
    rows = [("checkpoint", "step", "epoch", "size", "age", "verified", "metric")]
    for one in found:
        entry, about = one.entry, one.entry.about
        metric = f"{about.metric.name} {about.metric.value:.6g}" if about.metric else ""
        rows.append(
            (
                one.name,
                f"{entry.global_step}",
                "" if about.epoch is None else f"{about.epoch}",
                _size(entry.num_bytes),
                _age(about.time if about.time is not None else entry.path.stat().st_mtime),
                _verdict(one, arguments.verify),
                f"{metric} (best)" if any(entry is other for other in best) else metric,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers, verdict, metric in rows:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:5], strict=True)]
        say("  ".join([name.ljust(widths[0]), *cells, verdict.ljust(widths[5]), metric]).rstrip())
    for reason in passed_over:
        say(f"skipped: {reason}")
    directory = None if is_remote(arguments.path) else _folder(Path(arguments.path))
    for entry in abandoned(directory) if directory is not None else []:
        say(
            f"abandoned, kept until the run passes step {entry.global_step}: {entry.path.name} {_size(entry.num_bytes)}"
        )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    found, told = _found(arguments.path)
    for one in found:
        entry, wrong = one.entry, one.faults()
        told += wrong
        if not wrong:
            sums = "all checksums match" if entry.format > 1 else "sizes match; format 1 has no checksums"
            say(f"{one.where}: {len(entry.files)} files, {_size(entry.num_bytes)}: {sums}")
    for reason in told:
        say(f"fault: {reason}")
    return 1 if told else 0


def _export(arguments: argparse.Namespace) -> int:
    from disttrain.checkpoint.format.export import read_weights, write_weights
    from disttrain.run.folder import best_checkpoint

    if arguments.out.exists() and not arguments.overwrite:
        raise ConfigError(f"{arguments.out} already exists", hint="choose another file, or add --overwrite")
    group = "ema" if arguments.ema else "model"
    with tempfile.TemporaryDirectory(prefix="disttrain-", ignore_cleanup_errors=True) as folder:
        if is_remote(arguments.path):
            path, where = _fetched(arguments.path, arguments.which, Path(folder))
        else:
            path = Path(arguments.path)
            path = best_checkpoint(path, arguments.which, tell=tell) if _folder(path) is not None else path
            where = str(path)
        tensors = read_weights(path, group=group)
        about = {"disttrain_checkpoint": path.name, "disttrain_step": f"{check(path).global_step}"}
    write_weights(arguments.out, tensors, about=about)
    elements = sum(tensor.numel() for tensor in tensors.values())
    say(f"{where} ({group}): {len(tensors)} tensors, {elements:,} elements -> {arguments.out}")
    return 0


def _fetched(url: str, which: str, folder: Path) -> tuple[Path, str]:
    """Download a checkpoint into a subfolder of ``folder``; return its path and its source URL."""
    mirror, found, _ = _copies(url)
    if not found:
        raise CheckpointError(f"{mirror.url} contains no committed checkpoint", hint="correct the URL")
    rated = best_of([one.entry for one in found], 1) if which == "best" else []
    stored = next((one for one in found if any(one.entry is entry for entry in rated)), found[-1])
    path = folder / stored.entry.path
    path.mkdir()
    for file in stored.entry.files:
        if fault := mirror.fault(stored, file, path):
            raise CheckpointError(fault, hint="use another checkpoint")
    (path / MARKER).write_bytes(stored.marker)
    return path, f"{mirror.url}/{stored.name}"


def _prune(arguments: argparse.Namespace) -> int:
    for name, least in (("keep_last", 1), ("keep_best", 0), ("keep_every_steps", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}", hint=f"use at least {least}")
    if is_remote(arguments.path):
        return _prune_copies(arguments)
    directory = _folder(Path(arguments.path))
    if directory is None:
        raise ConfigError(f"{arguments.path} is not a run folder", hint="give the folder that contains checkpoints/")
    found, passed_over = committed(directory)
    best = [entry.path.name for entry in best_of(found, arguments.keep_best)]
    keep = Keep(arguments.keep_last, best, arguments.keep_every_steps)
    superfluous = keep.superfluous(found)
    for entry in superfluous:
        say(f"{'would remove' if arguments.dry_run else 'removed'} {entry.path} ({_size(entry.num_bytes)})")
        if not arguments.dry_run:
            remove(entry.path)
    say(f"{len(found) - len(superfluous)} of {len(found)} kept")
    for reason in passed_over:
        say(f"skipped: {reason}")
    return 0


def _prune_copies(arguments: argparse.Namespace) -> int:
    mirror, found, passed_over = _copies(arguments.path)
    best = [entry.path.name for entry in best_of([one.entry for one in found], arguments.keep_best)]
    keep = Keep(arguments.keep_last, best, arguments.keep_every_steps)
    gone, number = mirror.prune(keep, dry_run=arguments.dry_run)
    for one in gone:
        what = "would remove" if arguments.dry_run else "removed"
        say(f"{what} {mirror.url}/{one.name} ({_size(one.entry.num_bytes)})")
    say(f"{number - len(gone)} of {number} kept")
    for reason in passed_over:
        say(f"skipped: {reason}")
    return 0


@dataclass(frozen=True)
class _One:
    """A checkpoint to show: its name, its location, its marker, and a function that lists faults of its files."""

    name: str
    where: str
    entry: Committed
    faults: Callable[[], list[str]]


def _copies(url: str) -> tuple[Mirror, list[Stored], list[str]]:
    """List the copies at a URL, or the single copy that it names."""
    folder, name = copy_of(url)
    mirror = Mirror(MirrorConfig(folder))
    found, passed_over = mirror.committed()
    if name:
        found = [one for one in found if one.name == name]
        passed_over = [reason for reason in passed_over if f"/{name} " in reason]
    if not found and not passed_over:
        raise CheckpointError(f"there is no checkpoint at {mirror.url}{name and '/'}{name}", hint="correct the URL")
    return mirror, found, passed_over


def _folder(path: Path) -> Path | None:
    """Return the checkpoint folder of a run folder, or None if ``path`` is something else."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else None


def _found(place: str) -> tuple[list[_One], list[str]]:
    if is_remote(place):
        mirror, copies, passed_over = _copies(place)

        def wrong(one: Stored) -> list[str]:
            return [fault for file in one.entry.files if (fault := mirror.fault(one, file))]

        return [
            _One(one.name, f"{mirror.url}/{one.name}", one.entry, partial(wrong, one)) for one in copies
        ], passed_over
    path = Path(place)
    directory = _folder(path)
    found: list[Committed] = []
    passed_over = []
    if directory is not None:
        found, passed_over = committed(directory)
    elif not path.is_dir():
        raise CheckpointError(f"{path} is neither a run folder nor a checkpoint", hint="correct the path")
    else:
        try:
            found = [check(path)]
        except CheckpointError as error:
            passed_over = [error.what]
    return [_One(one.path.name, str(one.path), one, partial(faults, one.path)) for one in found], passed_over


def _verdict(one: _One, read: bool) -> str:
    if not read or one.entry.format == 1:
        return "sizes"
    return "DAMAGED" if one.faults() else "checksums"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def _age(since: float) -> str:
    seconds = max(0.0, time.time() - since)
    for name, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s"
