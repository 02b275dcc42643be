"""``disttrain jobs``: list the runs under a folder with SLURM job state, step and last checkpoint.

Reads run folders and calls ``squeue`` once; if the cluster keeps accounting, also calls ``sacct`` once for jobs that
have left the queue. Without SLURM, uses the run folders alone. Does not import torch.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from disttrain.errors import ConfigError
from disttrain.run.listing import Row, find_runs, rows_of
from disttrain.slurm import commands
from disttrain.slurm.snapshot import read_job
from disttrain.system.files import to_json
from disttrain.system.terminal import Parser, path_word, say, tell


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        The exit code.

    Raises:
        ConfigError: a folder does not exist.
    """
    arguments = _parser().parse_args(argv)
    for folder in arguments.folders:
        if not folder.is_dir():
            raise ConfigError(
                f"folder {folder} does not exist", hint="give a run folder, or a folder that contains runs"
            )
    runs = find_runs(arguments.folders, skipped=_skip)
    queued: dict[str, commands.Queued] = {}
    if commands.has("squeue"):
        try:
            queued = {one.job: one for one in commands.queue()}
        except commands.SlurmError as error:
            tell(f"cannot query the queue, so states come from the run folders: {error.what}")
        gone = {str(job) for run in runs if (job := read_job(run).get("job"))}
        gone = {job for job in gone if not any(name.partition("_")[0] == job for name in queued)}
        queued |= {one.job: one for one in commands.ended(sorted(gone))}
    rows = [row for run in runs for row in rows_of(run, queued)]
    if arguments.json:
        say(to_json([asdict(row) for row in rows], indent=2), lines=True)
    else:
        _print(rows)
    return 0


def _skip(folder: Path, error: OSError) -> None:
    tell(f"skipping {folder}: {error.strerror}")


def _print(rows: list[Row]) -> None:
    if not rows:
        say("no runs found")
        return
    cells = [("run", "job", "state", "attempts", "step", "checkpoint", "note")]
    for row in rows:
        saved = "" if row.checkpoint is None else f"{row.checkpoint}"
        if row.checkpoint_age_seconds is not None:
            saved += f" ({_age(row.checkpoint_age_seconds)} ago)"
        step = "" if row.step is None else f"{row.step}"
        cells.append((row.run, row.job, row.state, f"{row.attempts}", step, saved, row.note))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _age(seconds: float) -> str:
    for name, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="disttrain jobs", description="List runs with the state of their jobs, step and last checkpoint."
    )
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        type=path_word,
        default=[Path("runs")],
        help="folder of runs (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    return parser
