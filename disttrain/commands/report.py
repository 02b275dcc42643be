"""``disttrain report``: write a page about one run, or a comparison of several.

Reads run folders and writes HTML and PNG files. Needs no accelerator and imports neither torch nor Lightning, so it
starts fast and runs on a login node.
"""

from __future__ import annotations

import argparse

from disttrain.system.terminal import Parser, path_word, say


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the arguments that follow ``disttrain report``.

    Returns:
        The exit code.

    Raises:
        ConfigError: several runs are compared without ``--out``.
        DataError: a folder is not a run folder.
    """
    arguments = _parser().parse_args(argv)
    from disttrain.report import write_report  # here, so that --help does not import Matplotlib

    say(write_report(arguments.run_dirs, arguments.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="disttrain report",
        description="Write a self-contained HTML page about a run, or one that compares several runs.",
    )
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", nargs="+", type=path_word, help="a run folder (contains run.json)"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=path_word,
        help="folder to write to (default: RUN_DIR/report); required for several runs",
    )
    return parser
