"""``disttrain report``: a page on a run, or a comparison of several.

Reads run folders and writes HTML and PNG files; it needs no accelerator, and loads neither torch nor
Lightning, so it also runs at once on a cluster's login node.
"""

from __future__ import annotations

import argparse

from disttrain.terminal import Parser, path_word, say


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the arguments that follow ``disttrain report``.

    Returns:
        the exit code.

    Raises:
        ConfigError: several runs are compared without ``--out``.
        DataError: a folder is no run folder.
    """
    arguments = _parser().parse_args(argv)
    from disttrain.report import write_report  # here, so that --help does not load Matplotlib

    say(write_report(arguments.run_dirs, arguments.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="disttrain report",
        description="Write a self-contained HTML page on a run, or one that compares several runs.",
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=path_word, help="a run folder (holds run.json)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=path_word,
        help="folder to write to; RUN_DIR/report by default, needed for several runs",
    )
    return parser
