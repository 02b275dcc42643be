"""``disttrain submit``: check a training job, then queue it on SLURM.

Reads the configuration as ``fit`` does, checks it against the requested ranks, renders the script of the chosen style
and has SLURM test it. Then saves the script, the configuration and the state of the code in the run folder, queues the
job and prints how to follow it. ``--dry-run`` prints the script without queueing; it does not need SLURM.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

from disttrain.errors import ConfigError, DataError
from disttrain.slurm import commands
from disttrain.slurm.job import Job, Style, check_ranks
from disttrain.slurm.render import INDEX, SUBMIT, Script, render
from disttrain.slurm.site import DEFAULT, VARIABLE, Site, find_site, load_site
from disttrain.slurm.snapshot import read_job, write_job, write_snapshot
from disttrain.system.reading import read_run
from disttrain.system.terminal import Parser, path_word, say


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        The exit code.

    Raises:
        DisttrainError: an error that the user can fix; nothing was queued.
        SystemExit: from argparse.
    """
    arguments = _parser().parse_args(argv)
    site_file = find_site(arguments.site)
    site = _with_options(load_site(site_file), arguments)
    job = Job(
        name=arguments.name or Path(arguments.config[0]).stem,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        tasks_per_node=arguments.tasks_per_node,
        style=arguments.style,
        time=arguments.time,
        partition=arguments.partition,
        array=arguments.array,
        requeue=arguments.requeue,
        max_requeues=arguments.max_requeues,
        signal_seconds=arguments.signal_seconds,
    )
    fixed, by_index = _settings(arguments.set, job)

    from disttrain.commands.config_check import check_data, read_config  # imports torch

    # Values that differ by array index are checked for the first index only.
    if first := [f"{name}={value.replace(INDEX, str(job.first_index))}" for name, value in by_index.items()]:
        read_config(arguments.config, [*fixed, *first])
    checked = read_config(arguments.config, fixed)
    layout = check_ranks(job, checked.parallel, checked.global_batch_size, checked.micro_batch_size)
    if arguments.check_data:
        try:
            check_data(checked)
        except DataError as error:
            hint = f"{error.hint}; or use --no-check-data if only the nodes have the data"
            raise DataError(error.what, hint=hint.removeprefix("; ")) from None
    script = Script(
        run_dir=Path(os.path.abspath(checked.run_dir)),
        folder=Path.cwd(),
        python=site.python or sys.executable,
        settings=by_index,
        output=None if arguments.output is None else os.path.abspath(arguments.output),
    )
    _check_folder(script, job, checked.resume)
    _check_output(script)
    text = render(job, site, script)
    if arguments.dry_run:
        say(text.rstrip("\n"), lines=True)
        return 0
    said = _let_slurm_check(job, site, script, text)
    path = write_snapshot(script, config=checked.text, text=text, arguments=["disttrain", "submit", *argv])
    number = commands.submit(path)
    write_job(script, job, number)
    _tell(number, job, script, layout, said, site_file)
    return 0


def _with_options(site: Site, arguments: argparse.Namespace) -> Site:
    """Override the site's settings with those of the command line."""
    given = {name: getattr(arguments, name) for name in ("account", "qos", "cpus_per_task", "memory")}
    options: dict[str, str | None] = dict(site.sbatch)
    for text in arguments.sbatch:
        name, equals, value = text.lstrip("-").partition("=")
        options[name] = value if equals else None
    return replace(site, sbatch=options, **{name: value for name, value in given.items() if value is not None})


def _settings(given: list[str], job: Job) -> tuple[list[str], dict[str, str]]:
    """Split settings into those of the whole job and those that differ by array index."""
    fixed: list[str] = []
    by_index: dict[str, str] = {}
    for text in given:
        name, equals, value = text.removeprefix("--").partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {text} is not a setting", hint="write --set NAME=VALUE")
        if INDEX not in value:
            fixed.append(f"{name}={value}")
        elif job.array is None:
            raise ConfigError(
                f"--set {text} uses {INDEX}, the index of a job array, but the job is not an array",
                hint="add --array, such as --array 0-3",
            )
        elif name == "trainer.run_dir":
            raise ConfigError(
                f"--set {text}: the runs of an array already have separate folders",
                hint=f"remove {INDEX}: run 3 goes to RUN_DIR/3",
            )
        else:
            by_index[name] = value
    return fixed, by_index


def _check_folder(script: Script, job: Job, resume: str) -> None:
    """Check that the job can resume in its run folder however often it is started."""
    if resume == "never":
        raise ConfigError(
            "resume is never, so every start of the job, even after a preemption, would start over",
            hint="remove it, and set trainer.run_dir to a new folder: --set trainer.run_dir=FOLDER",
        )
    if read_run(script.run_dir).get("status") == "completed":
        raise ConfigError(
            f"run folder {script.run_dir} contains a complete run",
            hint="choose another one with --set trainer.run_dir=FOLDER, or move it away",
        )
    if complete := _complete(script.run_dir, job):
        left = job.without(complete)
        names = ", ".join(map(str, complete[:8])) + (f" and {len(complete) - 8} more" if len(complete) > 8 else "")
        raise ConfigError(
            f"run folder {script.run_dir} contains complete runs of the array: {names}",
            hint=f"skip them: --array {left}; or move them away" if left else "move them away; all are complete",
        )
    before = str(read_job(script.run_dir).get("job", ""))
    if before and commands.has("squeue"):
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
        alive = [one for one in commands.queue([before]) if one.state not in over]
        if alive:
            raise ConfigError(
                f"job {alive[0].job} of run folder {script.run_dir} is {alive[0].state.lower()}",
                hint=f"wait for it, or cancel it: scancel {before}",
            )


def _complete(run_dir: Path, job: Job) -> list[int]:
    """Return the indices of an array whose runs are complete."""
    if job.array is None or not run_dir.is_dir():
        return []
    there = sorted(int(child.name) for child in run_dir.iterdir() if child.name.isdecimal())
    return [i for i in there if job.has_index(i) and read_run(run_dir / str(i)).get("status") == "completed"]


def _check_output(script: Script) -> None:
    """Check the output folder: SLURM accepts a job whose output cannot be opened, and the job then fails silently."""
    if script.output is not None:
        folder = Path(script.output).parent
        if INDEX not in str(folder) and not folder.is_dir():
            raise ConfigError(
                f"the folder of --output, {folder}, does not exist, and SLURM does not create it",
                hint=f"create it: mkdir -p {shlex.quote(str(folder))}; or omit --output",
            )
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"the folder of --output, {folder}, cannot be written", hint="choose another one")


def _let_slurm_check(job: Job, site: Site, script: Script, text: str) -> str:
    if not commands.has("sbatch"):
        raise ConfigError("sbatch is not installed here", hint="submit on a machine of the cluster, or use --dry-run")
    if partition := job.partition or site.partition:
        commands.check_partition(partition)
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", prefix="disttrain-") as file:
        file.write(text)
        file.flush()
        return commands.check_script(Path(file.name))


def _tell(number: str, job: Job, script: Script, layout: str, said: str, site_file: Path | None) -> None:
    output = script.output_of(job).replace("%j", number).replace("%A", number)
    shown = Path(os.path.relpath(script.run_dir))
    say(f"submitted job {number}: {shown} on {layout}, style {job.style}")
    lines = [("script", str(shown / SUBMIT / "job.sbatch"))]
    if site_file is not None:
        lines.append(("site", str(site_file)))
    if said:
        lines.append(("SLURM says", said))
    lines.append(("follow", f"tail -F {shlex.quote(os.path.relpath(output)).replace('%a', str(job.first_index))}"))
    lines += [("state", f"disttrain jobs {shlex.quote(str(shown))}"), ("cancel", f"scancel {number}")]
    for name, value in lines:
        say(f"  {name:<11} {value}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="disttrain submit", description="Check a `disttrain fit` job and queue it on SLURM.")
    add = parser.add_argument
    add(
        "--config",
        "-c",
        metavar="FILE",
        action="append",
        required=True,
        help="configuration file; may be repeated, and later ones override",
    )
    add(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help=f"override a setting; %{INDEX} in a value is the index of the job array; may be repeated",
    )
    add("--nodes", metavar="N", type=int, default=1, help="number of nodes (default: 1)")
    add("--gpus-per-node", metavar="K", type=int, default=0, help="GPUs per node, one rank each")
    add("--tasks-per-node", metavar="K", type=int, help="ranks per node, on a cluster without GPUs")
    add("--cpus-per-task", metavar="C", type=int, help="cores per rank (default: the site's)")
    add("--memory", metavar="SIZE", help="memory per node, such as 64G; 0 for all (default: the site's)")
    add("--time", metavar="T", help="time limit: 3h50m, or in SLURM's notation (default: the partition's)")
    add("--partition", metavar="P", help="partition (default: the site's)")
    add("--account", metavar="A", help="account (default: the site's)")
    add("--qos", metavar="Q", help="quality of service (default: the site's)")
    add("--array", metavar="INDICES", help="a job array, such as 0-3; run 3 goes to RUN_DIR/3")
    add("--style", choices=get_args(Style), default="srun", help="what starts the ranks of a node (default: srun)")
    add(
        "--requeue",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="requeue after a preemption, at the time limit, or after a node failure (default: no)",
    )
    add("--max-requeues", metavar="N", type=int, default=50, help="maximum number of requeues (default: 50)")
    add(
        "--signal-seconds",
        metavar="S",
        type=int,
        default=120,
        help="seconds before the time limit to signal the ranks (default: 120)",
    )
    add("--name", metavar="NAME", help="name of the job (default: the configuration's)")
    add("--output", metavar="FILE", help="output file, in SLURM's notation (default: RUN_DIR/submit/%%j.log)")
    add(
        "--sbatch", metavar="OPTION", action="append", default=[], help="another sbatch option, such as constraint=h100"
    )
    add(
        "--site", metavar="FILE", type=path_word, help=f"settings of the cluster (default: ${VARIABLE}, else {DEFAULT})"
    )
    add(
        "--check-data",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="check that local data files exist (default: yes)",
    )
    add("--dry-run", action="store_true", help="print the script and queue nothing")
    return parser
