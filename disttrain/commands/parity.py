"""``disttrain parity``: check on this machine, with a recipe's own data, that it trains the same in every layout.

Runs a few steps in each layout and compares samples, losses, gradient norms, weights and metrics with those of the
first layout. Prints a table, the first difference and its possible causes, and draws two plots. Exit code 0 if all
layouts agree within tolerance, 1 otherwise.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from disttrain.errors import ConfigError
from disttrain.system.files import resolve_path
from disttrain.system.terminal import Parser, say

if TYPE_CHECKING:
    from disttrain.commands.config_check import Checked
    from disttrain.parity.compare import Comparison
    from disttrain.parity.layouts import Layout
    from disttrain.parity.runs import Runs
    from disttrain.parity.traces import Trace

_FILES: Final = ("parity.json", "loss.png", "distance.png")
"""Files that a comparison writes next to its run folders."""
_LAYOUTS: Final = "1,2xddp,2xfsdp"
_TOLERANCE, _TOLERANCE_SGD = 1e-5, 1e-6
"""Default tolerances. Optimizers that divide by the gradient's magnitude amplify rounding errors."""
_LOOSER: Final = 10
"""Factor on the tolerance for another tensor-parallel degree, which splits the sums inside layers."""


def main(argv: list[str]) -> int:
    """Run the comparison.

    Args:
        argv: the arguments that follow ``disttrain parity``; unknown ones are passed to ``disttrain fit``.

    Returns:
        0 if all layouts agree, 1 if one differs.

    Raises:
        ConfigError: a layout or a number is invalid, or the recipe cannot run in a layout.
        ParityError: a run failed.
    """
    arguments, more = _parser().parse_known_args(argv)
    from disttrain.parity.layouts import check_sizes, parse_layouts, replaced_settings

    layouts = parse_layouts(arguments.layouts or _LAYOUTS)
    out = resolve_path(arguments.out, name="--out")
    _check(arguments, out)

    from disttrain.commands.config_check import read_words  # here: --help and command-line mistakes do not need torch
    from disttrain.parity.compare import DIFFERENT, compare
    from disttrain.parity.comparison_page import draw_pictures, print_comparisons, write_json
    from disttrain.parity.runs import Runs

    reduction = ["--trainer.parallel.reduction", arguments.reduction] if arguments.reduction else []
    words = ["--config", arguments.config, *more, *reduction]
    recipe = read_words(["fit", *words])
    _check_recipe(recipe)
    notes = replaced_settings(layouts, recipe.parallel)
    size, told = _common_size(recipe, layouts)
    notes += told
    check_sizes(layouts, recipe.global_batch_size, size)
    for layout in layouts:
        layout.parallel(recipe.parallel)  # reports an impossible layout before any layout runs
    _clear(out)
    runs = Runs(tuple(words), out, arguments.steps, recipe.parallel, size)
    say(f"disttrain parity: {arguments.steps} steps in {len(layouts)} layouts, the first is the reference")
    for note in notes:
        say(f"  {note}")
    reference = _run(runs, layouts[0])
    if arguments.layouts is None:
        added, note = _another_size(reference, recipe.global_batch_size)
        layouts += added
        if note:
            say(f"  {note}")
    others, traces = layouts[1:], []
    if arguments.kill:
        # The reference stays undisturbed: if it were killed too, an effect common to all kills would not show.
        others = layouts
        traces.append(_run(runs, layouts[0], name=f"{layouts[0].name}-killed", kill=True))
    traces += [_run(runs, layout, kill=arguments.kill) for layout in layouts[1:]]
    tolerance, why = _tolerance(arguments.tolerance, reference)
    tree = recipe.parallel.reduction == "tree"
    compared = []
    for layout, trace in zip(others, traces, strict=True):
        same_sums = layout.tensor == layouts[0].tensor  # another degree splits the products' sums differently
        compared.append(_compare(reference, trace, tolerance, same_sums=same_sums, tree=tree))
    again = None
    if any(one.verdict == DIFFERENT for one in compared):
        # If the reference does not reproduce itself, the layout is not the cause.
        again = compare(reference, runs.run(layouts[0], name=f"{layouts[0].name}-again"), tolerance)
    print_comparisons(reference, compared, again)
    say(f"tolerance: {tolerance:g}, {why}" + (", or bit-identical where reduction: tree guarantees it" if tree else ""))
    pictures = draw_pictures([reference, *traces], compared, out)
    write_json(out / "parity.json", reference, compared, again)
    say("pictures: " + ", ".join(str(path) for path in pictures))
    return _judge([one for one in compared if one.verdict == DIFFERENT])


def _common_size(recipe: Checked, layouts: Sequence[Layout]) -> tuple[int, list[str]]:
    """Return the micro batch size for layouts that do not set one, and notes to print about it."""
    from disttrain.parity.layouts import common_size, fitting_size

    asked, batch = recipe.micro_batch_size, recipe.global_batch_size
    if asked == "auto":
        size = common_size(layouts, batch)
        return size, [f"data.micro_batch_size auto is {size} in every layout, the largest that fits all of them"]
    size = asked if batch % asked else fitting_size(layouts, batch, asked)
    told = f"data.micro_batch_size is {size} in every layout, because the recipe's {asked} does not fit all of them"
    return size, [told] if size != asked else []


def _compare(reference: Trace, trace: Trace, tolerance: float, *, same_sums: bool, tree: bool) -> Comparison:
    """Compare bit for bit if the layouts must match exactly, otherwise within the rounding tolerance."""
    from disttrain.parity.compare import compare

    exact = tree and same_sums and trace.micro_batch_size == reference.micro_batch_size
    return compare(reference, trace, tolerance * (1 if same_sums else _LOOSER), exact=exact)


def _run(runs: Runs, layout: Layout, *, name: str = "", kill: bool = False) -> Trace:
    """Run the recipe in one layout and print a line when done."""
    trace = runs.run(layout, name=name, kill=kill)
    resumed = f", killed and resumed from step {trace.resumed_from}" if kill else ""
    say(f"  {trace.name}: done{resumed}")
    return trace


def _judge(failed: Sequence[Comparison]) -> int:
    """Print the layouts that differ from the first by more than the tolerance; return the exit code."""
    needs = ("be bit-identical" if one.exact else f"differ by at most {one.tolerance:g}" for one in failed)
    if failed:
        say("FAILED: " + ", ".join(f"{one.name} (must {need})" for one, need in zip(failed, needs, strict=True)))
    return 1 if failed else 0


def _another_size(reference: Trace, global_batch_size: int) -> tuple[list[Layout], str]:
    """Return a layout that tests whether the gradient depends on the micro batch size, if needed, and a note."""
    from disttrain.parity.layouts import another_size, parse_layout

    if reference.is_task or reference.micro_batch_size is None:  # a Task's gradient is always that of the global batch
        return [], ""
    size = another_size(global_batch_size, reference.micro_batch_size)
    followers = ["dropout masks"] * reference.draws + ["batch norms"] * bool(reference.batch_norms)
    if size is not None and not followers:
        note = "the module is not a disttrain.Task: another micro batch size is tried, to detect a mean of means"
        return [parse_layout(f"1@{size}")], note
    why = f"{' and '.join(followers)} depend on it" if followers else "no other size is possible"
    return [], f"another micro batch size was not tried, because {why}: a mean of means would not be detected"


def _tolerance(asked: float | None, reference: Trace) -> tuple[float, str]:
    """Return the rounding tolerance and the reason for it."""
    names = " and ".join(reference.optimizers) or "an unknown optimizer"
    if asked is not None:
        return asked, "as given by --tolerance"
    if set(reference.optimizers) == {"SGD"}:
        return _TOLERANCE_SGD, f"the default for {names}"
    return _TOLERANCE, f"the default for {names}"


def _check(arguments: argparse.Namespace, out: Path) -> None:
    """Reject invalid numbers, a missing recipe, and an output folder that holds anything but a comparison."""
    if arguments.steps < 1:
        raise ConfigError(f"--steps is {arguments.steps}", hint="use at least 1")
    if arguments.kill and arguments.steps < 2:
        raise ConfigError("--steps is 1, but --kill kills a run between two steps", hint="use at least --steps 2")
    if arguments.tolerance is not None and not 0 <= arguments.tolerance < 1:
        raise ConfigError(f"--tolerance is {arguments.tolerance}", hint="use a small number, such as 1e-5")
    if not Path(arguments.config).is_file():
        raise ConfigError(f"{arguments.config} does not exist", hint="correct --config")
    there = list(out.iterdir()) if out.exists() else []
    others = [path.name for path in there if not ((out / _FILES[0]).is_file() and _is_ours(path))]
    if others:
        raise ConfigError(
            f"{out} contains something other than a comparison: {min(others)}", hint="choose another folder with --out"
        )


def _is_ours(path: Path) -> bool:
    """Return whether an entry of the output folder comes from a comparison: one of its files or a run folder."""
    if not path.is_dir():
        return path.name in _FILES
    return (path / "rank-00000.log").is_file() or not any(path.iterdir())


def _check_recipe(recipe: Checked) -> None:
    """Reject a recipe whose runs would not start from scratch, or would overwrite another run's checkpoints."""
    if recipe.resume not in ("auto", "never"):
        raise ConfigError(
            f"resume is {recipe.resume}, but the runs of a comparison start from scratch",
            hint="remove it; to start from a checkpoint's weights, use --initialize_from",
        )
    if recipe.mirroring:
        raise ConfigError(
            f"trainer.callbacks has {recipe.mirroring[0]} with a mirror, which a comparison would write to",
            hint="use checkpoint.mirror, which a comparison turns off, or remove the mirror",
        )


def _clear(out: Path) -> None:
    """Create an empty output folder, replacing an earlier comparison."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "parity.json").write_text("{}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="disttrain parity",
        description="Run a recipe for a few steps in several layouts on this machine, and compare sample order, losses,"
        " gradients, weights and metrics with those of the first layout. Further arguments override the recipe, as for"
        " disttrain fit. Checkpoints are written only to the folder of the comparison.",
        epilog="Exit code 0 if all layouts agree, 1 if one differs, 2 for a mistake.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="the recipe's YAML")
    parser.add_argument(
        "--layouts",
        help="layouts such as 1,2xddp,4xfsdp,2x2hsdp,2x2tp, with @SIZE for another micro batch size; the first is the"
        f" reference (default: {_LAYOUTS}, and another micro batch size if that must not make a difference)",
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument(
        "--reduction",
        choices=("fast", "tree"),
        help="how gradients are summed (default: the recipe's); with tree, layouts must be bit-identical, except those"
        " with another tensor degree or micro batch size than the first",
    )
    parser.add_argument(
        "--kill",
        action="store_true",
        help="kill each run half-way and resume it; the reference is run once more for this",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest max|w - w'| / max|w| that counts as rounding; ten times that for another tensor degree"
        f" (default: {_TOLERANCE_SGD:g} for SGD, {_TOLERANCE:g} for any other optimizer)",
    )
    parser.add_argument("--out", default="runs/parity", help="folder to write to (default: %(default)s)")
    return parser
