"""Show a comparison as a table, two plots and JSON.

The plots show the losses of all layouts, and the distance of each layout's weights from the reference after each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from disttrain.parity.compare import DIFFERENT, SAME, Comparison
from disttrain.parity.traces import Trace
from disttrain.report.draw import MAX_LINES, Line, Picture, draw
from disttrain.system.files import to_json, write_atomically
from disttrain.system.terminal import say


def print_comparisons(reference: Trace, compared: Sequence[Comparison], again: Comparison | None) -> None:
    """Print the table and, for each layout that differs, its first difference and possible causes.

    Args:
        reference: the run that others were compared with.
        compared: the others.
        again: a repeat of the reference, if one was needed.
    """
    table = Table(title=f"disttrain parity: {len(reference.steps)} steps, compared with {reference.name}")
    for head in ("layout", "verdict"):
        table.add_column(head)
    for head in ("weights", "loss", "gradient norm", "metrics"):
        table.add_column(head, justify="right")
    for one in compared:
        table.add_row(one.name, one.verdict, *map(_number, (one.weights, one.loss, one.grad_norm, one.metrics)))
    Console().print(table)
    say("weights: max|w - w'| / max|w| after the last step; loss, norm: largest relative difference in any step")
    for one in compared:
        if one.verdict == SAME:
            continue
        beyond = "not bit-identical" if one.exact else f"beyond {one.tolerance:g}"
        what = beyond if one.verdict == DIFFERENT else "only the last bits differ"
        say(f"{one.name}: {what}, first {one.first}")
        if one.verdict == DIFFERENT:
            for number, cause in enumerate(_causes(one, again), start=1):
                say(f"  likely cause {number}: {cause}")


def draw_pictures(traces: Sequence[Trace], compared: Sequence[Comparison], out: Path) -> list[Path]:
    """Draw the plots of losses and distances into a folder."""
    losses = tuple(
        Line(trace.name, [(step, values["loss"]) for step, values in trace.steps.items()], color)
        for color, trace in enumerate(traces[:MAX_LINES])
    )
    apart = tuple(
        Line(one.name, list(one.distances.items()), color + 1) for color, one in enumerate(compared[: MAX_LINES - 1])
    )
    pictures = [
        Picture("loss", "Training loss by layout", "loss", losses),
        Picture("distance", f"Distance of the weights from {traces[0].name}", "max|w - w'| / max|w|", apart),
    ]
    paths = [out / f"{picture.name}.png" for picture in pictures]
    for path, picture in zip(paths, pictures, strict=True):
        path.write_bytes(draw(picture))
    return paths


def write_json(path: Path, reference: Trace, compared: Sequence[Comparison], again: Comparison | None) -> None:
    """Write all figures as JSON."""
    content = {
        "reference": reference.name,
        "steps": len(reference.steps),
        "repeats_itself": None if again is None else again.verdict,
        "layouts": [dataclasses.asdict(one) | {"causes": _causes(one, again)} for one in compared],
    }
    write_atomically(path, to_json(content, indent=2) + "\n")


def _causes(one: Comparison, again: Comparison | None) -> list[str]:
    causes = list(one.causes)
    if one.verdict != DIFFERENT or again is None:
        return causes
    # If rounding is allowed, a repeat that differs by rounding explains nothing.
    if again.verdict == DIFFERENT or (one.exact and again.verdict != SAME):
        causes.insert(
            0,
            "not the layout: a repeat of the reference run differs too, because of a nondeterministic kernel or"
            " unkeyed randomness",
        )
    return causes


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
