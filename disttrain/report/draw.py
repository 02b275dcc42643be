"""Draw one plot of a report as a PNG.

A frozen :class:`Picture` describes the plot; :func:`draw` renders it. The same picture gives the same bytes regardless
of the user's Matplotlib settings, and no data makes it fail: empty, single-point, non-finite or constant series are
drawn as far as possible. A long series is drawn as its mean over about a hundred spans of steps, with a band from
minimum to maximum. Readability and cost therefore do not depend on its length, and no spike is lost.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter
from numpy.typing import NDArray

from disttrain.run.metrics_file import Series

# The Okabe-Ito palette, safe for color-blind readers; its yellow is left out because it is too faint on white.
PALETTE: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#999999")
MAX_LINES: Final = len(PALETTE)

_NUM_SPANS: Final = 120  # number of spans that a plot with a long series is divided into
_MAX_POINTS: Final = 2 * _NUM_SPANS  # a series with at most this many points is drawn unaveraged
_MARKED_POINTS: Final = 40  # a line with at most this many points gets a dot per point
_LEGEND_LETTERS: Final = 68  # fit side by side in two columns
_LOG_SPAN: Final = 100.0
_LARGEST: Final = 1e150  # clips values, because Matplotlib's transforms overflow beyond it
_MAX_LABEL: Final = 60
_WIDTH_INCHES, _HEIGHT_INCHES, _DPI = 6.4, 3.5, 150
_INK, _GRID = "#333333", "#dddddd"
_STYLE: Final[dict[Any, Any]] = {
    "font.size": 10.5,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.fontsize": 9.5,
}


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: its name in the legend.
        series: its points.
        color: index into the palette.
    """

    label: str
    series: Series
    color: int = 0


@dataclass(frozen=True)
class Picture:
    """The content of one plot.

    Attributes:
        name: file name without its extension.
        title: the title above the plot.
        unit: quantity and unit of the vertical axis.
        lines: the curves, at most eight.
        resumes: steps from which the run was resumed.
        stop: the step at which the run stopped, and its legend text.
        best: step and value of the best point, and its legend text.
        from_zero: whether the vertical axis starts at zero.
        percent: whether values are fractions to be shown in percent.
        preempted: steps at which the run was preempted.
        left_out: steps without an update.
        rollbacks: pairs of steps, from and to, for each rollback.
    """

    name: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    resumes: tuple[int, ...] = ()
    stop: tuple[int, str] | None = None
    best: tuple[int, float, str] | None = None
    from_zero: bool = False
    percent: bool = False
    preempted: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()
    rollbacks: tuple[tuple[int, int], ...] = ()


def draw(picture: Picture) -> bytes:
    """Render the picture as a PNG."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Missing glyphs and values near the floating-point limits cause warnings; neither should fail the report.
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06), facecolor="white", dpi=_DPI)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw_lines(axes, picture)
        _draw_marks(axes, picture)
        _dress(axes, picture)
        rows = _add_legend(figure, axes)
        figure.set_size_inches(_WIDTH_INCHES, _HEIGHT_INCHES + 0.2 * rows)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def is_averaged(picture: Picture) -> bool:
    """Return whether lines are means over spans of steps, with a band from minimum to maximum."""
    return _edges([_points(line.series) for line in picture.lines]) is not None


def uses_log_scale(picture: Picture) -> bool:
    """Return whether all values are positive and span more than two decades."""
    values = [value for line in picture.lines for _, value in line.series if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    wide = low > 1 / _LARGEST and high / low > _LOG_SPAN
    return wide and not picture.from_zero and not picture.percent


def _draw_lines(axes: Axes, picture: Picture) -> None:
    every = [_points(line.series) for line in picture.lines]
    edges = _edges(every)
    for line, points in zip(picture.lines, every, strict=True):
        if not len(points):
            continue
        steps, mean, low, high = _thin(points, edges)
        color = PALETTE[line.color % MAX_LINES]
        if low is not high:
            alpha = 0.22 if len(picture.lines) <= 3 else 0.1  # overlapping bands would hide the lines
            axes.fill_between(steps, low, high, color=color, alpha=alpha, linewidth=0)
        marker = "o" if len(points) <= _MARKED_POINTS or len(steps) == 1 else ""
        axes.plot(steps, mean, color=color, linewidth=1.6, marker=marker, markersize=3.5, label=_plain(line.label))
    if not any(len(points) for points in every):
        axes.text(0.5, 0.5, "no finite values", ha="center", va="center", transform=axes.transAxes)


def _draw_marks(axes: Axes, picture: Picture) -> None:
    if picture.resumes:
        steps = sorted(picture.resumes)
        shown = _first([f"{step:,}" for step in steps])
        for i, step in enumerate(steps):
            label = _plain(f"resumed at step {shown}") if i == 0 else None
            axes.axvline(step, color="#777777", linestyle=":", linewidth=1.4, zorder=1.5, label=label)
    if picture.stop is not None:
        step, words = picture.stop
        axes.axvline(step, color=_INK, linestyle="--", linewidth=1.2, zorder=1.5, label=_plain(words))
    if picture.best is not None and math.isfinite(picture.best[1]):
        step, value, words = picture.best
        height = min(max(value, -_LARGEST), _LARGEST)
        axes.plot(
            [step], [height], linestyle="", marker="*", markersize=13, markerfacecolor="#F0E442",
            markeredgecolor=_INK, markeredgewidth=0.9, zorder=5, label=_plain(words),
        )  # fmt: skip
    _draw_life(axes, picture)


def _draw_life(axes: Axes, picture: Picture) -> None:
    """Mark events of the run along the edges of the plot."""
    edges = axes.get_xaxis_transform()  # x in steps, y from 0 to 1
    for i, (step, to_step) in enumerate(picture.rollbacks):
        words = f"rolled back from step {_first([f'{a:,} to {b:,}' for a, b in picture.rollbacks], 2)}"
        axes.axvspan(to_step, step, color="#F0E442", alpha=0.3, linewidth=0, zorder=0.5, label=None if i else words)
        height = 0.94 - 0.07 * (i % 8)
        arrow = {"arrowstyle": "->", "color": _INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (to_step, height), (step, height), edges, edges, arrowprops=arrow)
    if picture.left_out:
        count = len(picture.left_out)
        words = (
            f"{count:,} update{'s' * (count > 1)} skipped, step {_first([f'{step:,}' for step in picture.left_out])}"
        )
        axes.plot(
            picture.left_out, [0.025] * count, linestyle="", marker="|", markersize=9, markeredgewidth=1.5,
            color="#AA3377", transform=edges, zorder=4, label=_plain(words),
        )  # fmt: skip
    if picture.preempted:
        words = f"preempted at step {_first([f'{step:,}' for step in picture.preempted])}"
        axes.plot(
            picture.preempted, [1.0] * len(picture.preempted), linestyle="", marker="v", markersize=8, clip_on=False,
            markerfacecolor="#E69F00", markeredgecolor=_INK, markeredgewidth=0.9, transform=edges, zorder=5,
            label=_plain(words),
        )  # fmt: skip


def _first(words: Sequence[str], number: int = 3) -> str:
    return ", ".join(words[:number]) + (", ..." if len(words) > number else "")


def _dress(axes: Axes, picture: Picture) -> None:
    """Set title, scales, limits and axis labels."""
    axes.set_title(_plain(picture.title), loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    unit = _plain(picture.unit)
    if uses_log_scale(picture):
        axes.set_yscale("log")
        axes.set_ylabel(f"{unit} (log scale)")
        return
    axes.set_ylabel(unit)
    if picture.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    else:
        formatter = ScalarFormatter(useOffset=False)  # an offset in a corner is easily overlooked
        formatter.set_powerlimits((-3, 6))
        axes.yaxis.set_major_formatter(formatter)
    if picture.from_zero:
        axes.set_ylim(bottom=0.0, top=None if axes.get_ylim()[1] > 0 else 1.0)


def _add_legend(figure: Figure, axes: Axes) -> int:
    """Place the legend below the axes.

    Returns:
        The number of legend rows.
    """
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return 0
    half = -(-len(labels) // 2)
    letters = max(map(len, labels[:half])) + max(map(len, labels[half:]), default=0)
    columns = 2 if len(labels) > 1 and letters <= _LEGEND_LETTERS else 1
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, columnspacing=1.5)
    return -(-len(labels) // columns)


def _points(series: Series) -> NDArray[np.float64]:
    """Return the finite points of a series by step. points: (logged, (step, value))"""
    points = np.array(series, dtype=np.float64).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1])]
    points[:, 1] = np.clip(points[:, 1], -_LARGEST, _LARGEST)
    return points[np.argsort(points[:, 0], kind="stable")]


def _edges(lines: Sequence[NDArray[np.float64]]) -> NDArray[np.float64] | None:
    """Return the edges of the spans over which a plot's lines are averaged, or None if all lines are short.

    All lines share the spans, so none looks smoother than another.
    """
    if max((len(points) for points in lines), default=0) <= _MAX_POINTS:
        return None
    first = min(points[0, 0] for points in lines if len(points))
    last = max(points[-1, 0] for points in lines if len(points))
    return np.linspace(first, last, _NUM_SPANS, endpoint=False)


def _thin(points: NDArray[np.float64], edges: NDArray[np.float64] | None) -> tuple[NDArray[np.float64], ...]:
    """Return steps, means, minima and maxima of the points in each non-empty span."""
    steps, values = points[:, 0], points[:, 1]
    if edges is None or len(points) <= _NUM_SPANS:
        return steps, values, values, values
    starts = np.unique(np.searchsorted(steps, edges))
    starts = starts[starts < len(points)]
    counts = np.diff(np.append(starts, len(points)))
    return (
        np.add.reduceat(steps, starts) / counts,
        np.add.reduceat(values / np.repeat(counts, counts), starts),
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )


def _plain(text: str) -> str:
    """Escape text for Matplotlib: short, one line, no math mode, not hidden from the legend."""
    text = " ".join(text.split())
    if len(text) > _MAX_LABEL:
        text = f"{text[: _MAX_LABEL // 2 - 1]}…{text[-_MAX_LABEL // 2 :]}"  # folders differ at the end
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")
