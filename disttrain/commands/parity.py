"""``disttrain parity``: does a recipe train the same in every layout? On this machine, with the recipe's own data.

Runs a few steps of it in each layout, compares samples, losses, gradient norms, weights and metrics with those of the
first, and prints a table, what differed first and why it may, and two pictures. Exit code 0 where all layouts agree as
they should, 1 where one does not.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from disttrain.errors import ConfigError

if TYPE_CHECKING:
    from disttrain.parity.compare import Comparison
    from disttrain.parity.layouts import Layout

_TOLERANCE: Final = 1e-5
_LOOSER: Final = 10
"""How much more tensor parallelism may round, which cuts the sums inside layers."""


def main(argv: list[str]) -> int:
    """Run the comparison.

    Args:
        argv: the arguments that follow ``disttrain parity``; those it does not know go to ``disttrain fit``.

    Returns:
        0 where all layouts agree, 1 where one differs.

    Raises:
        ConfigError: a layout or a number is none.
        ParityError: a run failed.
    """
    arguments, more = _parser().parse_known_args(argv)
    from disttrain.parity.layouts import parse_layouts

    layouts = parse_layouts(arguments.layouts)
    _check(arguments)
    out = Path(arguments.out)
    _clear(out)

    from disttrain.parity.compare import DIFFERENT, compare  # here: --help and mistakes need no torch
    from disttrain.parity.launch import Runs
    from disttrain.parity.show import draw_pictures, print_comparisons, write_json

    reduction = ["--trainer.parallel.reduction", arguments.reduction] if arguments.reduction else []
    runs = Runs(("--config", arguments.config, *more, *reduction), out, arguments.steps, arguments.kill)
    print(
        f"disttrain parity: {arguments.steps} steps in {len(layouts)} layouts, the first is the reference", flush=True
    )
    traces = []
    for layout in layouts:
        traces.append(runs.run(layout))
        print(f"  {layout.name}: done", flush=True)
    tolerances = [arguments.tolerance * (1 if _adds_alike(layout, layouts) else _LOOSER) for layout in layouts]
    compared = [
        compare(traces[0], trace, tolerance) for trace, tolerance in zip(traces[1:], tolerances[1:], strict=True)
    ]
    again = None
    if any(comparison.verdict == DIFFERENT for comparison in compared):
        # A run that does not even repeat itself differs for another reason than its layout.
        again = compare(traces[0], runs.run(layouts[0], f"{layouts[0].name}-again"), arguments.tolerance)
    print_comparisons(traces[0], compared, again, tolerance=arguments.tolerance)
    pictures = draw_pictures(traces, compared, out)
    write_json(out / "parity.json", traces[0], compared, again)
    print("pictures: " + ", ".join(str(path) for path in pictures))
    exact = {layout.name for layout in layouts if arguments.reduction == "tree" and _adds_alike(layout, layouts)}
    return _judge(compared, exact, arguments.tolerance)


def _adds_alike(layout: Layout, layouts: Sequence[Layout]) -> bool:
    """Whether a layout rounds as the first: another tensor degree adds other parts of each product."""
    return layout.tensor == layouts[0].tensor


def _judge(compared: Sequence[Comparison], exact: set[str], tolerance: float) -> int:
    """Tell which layouts differ from the first by more than they may; gives the exit code."""
    from disttrain.parity.compare import CLOSE, SAME

    failed = [one.name for one in compared if one.verdict not in ({SAME} if one.name in exact else {SAME, CLOSE})]
    if failed:
        need = "the same bits" if exact else f"a tolerance of {tolerance:g}"
        print(f"FAILED: {', '.join(failed)} does not keep to {need}")
    return 1 if failed else 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers that are none, and a recipe that does not exist."""
    if arguments.steps < 1:
        raise ConfigError(f"--steps is {arguments.steps}", mend="use at least 1")
    if not 0 <= arguments.tolerance < 1:
        raise ConfigError(f"--tolerance is {arguments.tolerance}", mend="use a small number, such as 1e-5")
    if not Path(arguments.config).is_file():
        raise ConfigError(f"{arguments.config} does not exist", mend="correct --config")


def _clear(out: Path) -> None:
    """Make an empty folder, in place of an earlier comparison alone."""
    if out.exists() and not (out / "parity.json").exists() and any(out.iterdir()):
        raise ConfigError(f"{out} holds something else than a comparison", mend="choose another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "parity.json").write_text("{}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="disttrain parity",
        description="Run a recipe for a few steps in several layouts on this machine, and compare order, losses,"
        " gradients, weights and metrics with those of the first. Further arguments are overrides of the recipe, as"
        " for disttrain fit.",
        epilog="Exit code 0 where all layouts agree, 1 where one differs, 2 for a mistake.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="the recipe's YAML")
    parser.add_argument(
        "--layouts",
        default="1,2xddp,2xfsdp",
        help="such as 1,2xddp,4xfsdp,2x2hsdp,2x2tp, with @SIZE for another micro batch size; the first is the reference"
        " (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument(
        "--reduction",
        choices=("fast", "tree"),
        help="how gradients are summed; with tree, all bits must be equal, but for layouts with another tensor degree"
        " than the first",
    )
    parser.add_argument("--kill", action="store_true", help="kill every run half-way and resume it")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=_TOLERANCE,
        help="largest max|w - w'| / max|w| that counts as rounding, ten times that for another"
        " tensor degree (default: %(default)g)",
    )
    parser.add_argument("--out", default="runs/parity", help="folder to write to (default: %(default)s)")
    return parser
