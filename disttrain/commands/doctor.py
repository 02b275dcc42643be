"""``disttrain doctor``: check whether this machine, or a group of ranks, can train.

Runs alone, or under ``disttrain launch``, torchrun or srun. Prints a table of versions, devices, network, folders and
speeds, with a fix for each problem, or JSON. Exit code 0 if all is well or there are only warnings; 1 if something
would break a run (with ``--strict``, for warnings too); 2 for a command-line mistake.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from disttrain.errors import ConfigError
from disttrain.system.files import to_json
from disttrain.system.terminal import Parser, say


def main(argv: list[str]) -> int:
    """Run all checks and print the findings; every rank returns the same exit code.

    Args:
        argv: the arguments that follow ``disttrain doctor``.

    Raises:
        ConfigError: a setting is wrong.
    """
    arguments = _parser().parse_args(argv)
    if not arguments.timeout > 0:
        raise ConfigError(f"--timeout is {arguments.timeout:g}", hint="use a positive number of seconds")
    if arguments.port is not None and not 0 < arguments.port < 65536:
        raise ConfigError(f"--port is {arguments.port}", hint="use 1 to 65535")

    # Imported here: --help and command-line mistakes do not need torch.
    from disttrain.distributed.world import World, detect_world
    from disttrain.doctor.examine import Options, Report, examine
    from disttrain.doctor.finding import failure, worst
    from disttrain.doctor.folders import folders_of
    from disttrain.doctor.table import print_report

    def show(report: Report) -> None:
        if not report.speaks:
            return
        if arguments.json:
            say(to_json(report.as_json(), indent=2), lines=True)
        else:
            print_report(report)

    options = Options(
        folders=folders_of(arguments.config, arguments.run_dir, arguments.data or []),
        config=Path(arguments.config) if arguments.config else None,
        shm=Path(arguments.shm),
        port=arguments.port,
        timeout=arguments.timeout,
    )
    trouble = None
    try:
        world = detect_world()
    except ConfigError as error:
        # Contradictory launcher variables are a finding, not a reason to stop: this node can still be checked.
        world, trouble = World(), failure("launcher", error.what, error.hint)
    report = examine(world, options, caught=show)
    if trouble is not None:
        report.findings.append(trouble)
    show(report)
    status = worst(report.findings)
    return int(status == "failure" or (arguments.strict and status == "warning"))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="disttrain doctor",
        description="Check versions, devices, memory, network, ports and folders; on several ranks, also whether they"
        " reach each other, match, and compute and communicate at the expected speed. Run it alone, or on all ranks in"
        " the way a training is started: disttrain launch doctor, torchrun ... -m disttrain doctor, srun disttrain"
        " doctor.",
        epilog="Exit code 0 if there are at most warnings, 1 for failures, 2 for a command-line mistake.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", help="a recipe's YAML: check its run folder and data, and compare the file across ranks"
    )
    parser.add_argument("--run-dir", help="folder for checkpoints (default: that of --config, or runs)")
    parser.add_argument("--data", action="append", help="shards or a folder to read; may be repeated")
    parser.add_argument("--port", type=int, default=_port_of_environment(), help="a port that must be free on rank 0")
    parser.add_argument("--shm", default="/dev/shm", help="where shared memory is mounted (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=15.0, help="seconds to wait for other ranks (default: %(default)g)"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings too")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _port_of_environment() -> int | None:
    """Return ``MASTER_PORT``, unless torchrun's store or the ranks' rendezvous already holds that port."""
    text = os.environ.get("MASTER_PORT", "")
    return int(text) if text.isdigit() and "RANK" not in os.environ and "SLURM_PROCID" not in os.environ else None
