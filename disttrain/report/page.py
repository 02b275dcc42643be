"""Write the HTML page of a report.

Plain functions that build strings; all external text passes through :func:`html.escape`. The page runs no script (its
content security policy forbids scripts too), fetches nothing, and reads well on a phone, on paper and in dark mode.
Times are in UTC, so the page is the same wherever it is written.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from disttrain.report.choose import caption
from disttrain.report.draw import MAX_LINES, PALETTE, Picture, is_averaged
from disttrain.report.read import Run, config_differences, mapping_differences

_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #626a73; --rule: #d9dde2; --paper: #fff; --card: #f6f7f9;
  --good: #14683c; --open: #8a5300; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --faint: #9aa3ad; --rule: #3a4048; --paper: #16191d;
  --card: #1f2429; --good: #6fcf97; --open: #f2b65a; } }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; overflow-wrap: anywhere; }
.faint, figcaption { color: var(--faint); font-size: .9rem; }
.status { display: inline-block; border: 1px solid; border-radius: 1rem; padding: 0 .7rem; margin-right: .4rem;
  font-size: .9rem; font-weight: 600; color: var(--open); }
.completed { color: var(--good); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--rule); padding: .3rem 1.2rem .3rem 0; text-align: left; vertical-align: top; }
thead th, tbody th { font-weight: 500; color: var(--faint); }
td { min-width: 5rem; max-width: 30rem; overflow-wrap: break-word; }
.chip { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
figure { margin: 0; break-inside: avoid; }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--rule);
  border-radius: .5rem; box-sizing: border-box; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .8rem 1rem;
  overflow-x: auto; font: .85rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { pre { white-space: pre-wrap; } }
"""

_SHADE_NOTE: Final = (
    "If a line has a band behind it, the line is the mean over spans of steps, and the band shows the minimum and"
    " maximum."
)

Row = tuple[str, Sequence[str | None]]
"""The row header of a table, and its cells; None is shown as a dash."""


@dataclass(frozen=True)
class Figure:
    """A picture and its PNG.

    Attributes:
        picture: the content of the plot.
        png: the bytes.
    """

    picture: Picture
    png: bytes


def page_of_run(run: Run, figures: Sequence[Figure]) -> str:
    """Return the page of one run."""
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        f"<p>{_status(run)} {escape(run.stop_reason)}</p>",
        f'<p class="faint">{escape(_origin(run))}</p>',
        _section("Result", _table([], [(name, [value]) for name, value in _results(run).items()])),
        _section("Curves", _figures(figures)),
        _section("Events", _table(["Step", "Time", "Kind", "Details"], _event_rows(run))),
        _section("Attempts", _table(_ATTEMPT_HEADS, _attempt_rows(run))),
        _section("Ranks", _table(_RANK_HEADS, _rank_rows(run))),
        _section("Environment", _table([], [(name, [value]) for name, value in run.environment.items()])),
        _section("Configuration", f"<pre>{escape(run.config)}</pre>" if run.config.strip() else ""),
    ]
    return _page(f"{run.name}: report", parts)


def page_of_runs(runs: Sequence[Run], labels: Sequence[str], figures: Sequence[Figure]) -> str:
    """Return the page that compares several runs."""
    heads = [
        (f'<span class="chip" style="background:{PALETTE[i]}"></span>' if i < MAX_LINES else "") + escape(label)
        for i, label in enumerate(labels)
    ]
    finals = [{"status": _status_words(run), "stopped": run.stop_reason or None, **_results(run)} for run in runs]
    names = dict.fromkeys(name for final in finals for name in final)
    left_out = f"The plots show the first {MAX_LINES} of the {len(runs)} runs." if len(runs) > MAX_LINES else ""
    differences = config_differences([run.config for run in runs])
    surroundings = mapping_differences([run.environment for run in runs])
    same = '<p class="faint">None: the configurations are the same.</p>'
    parts = [
        f"<h1>{len(runs)} runs compared</h1>",
        f'<p class="faint">{escape(", ".join(labels))}</p>',
        _section("Result", _run_table(heads, [(name, [final.get(name) for final in finals]) for name in names])),
        _section("Curves", (f'<p class="faint">{left_out}</p>' if left_out else "") + _figures(figures)),
        _section("Settings that differ", _run_table(heads, differences) if differences else same),
        _section("Environment that differs", _run_table(heads, surroundings) if surroundings else ""),
        _section("Folders", _run_table(heads, [("folder", [str(run.folder) for run in runs])])),
    ]
    return _page(f"{len(runs)} runs compared", parts)


def format_number(value: float) -> str:
    """Format a table value: whole numbers in full, others to six significant digits."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.6g}"


def format_duration(seconds: float) -> str:
    """Format a duration in its two largest units: ``1 d 2 h``, ``2 h 5 min``, ``3 min 20 s``, ``4.2 s``."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def format_time(seconds: float | None) -> str | None:
    """Format a timestamp in UTC; None if it is missing or invalid."""
    if seconds is None:
        return None
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return None


def _results(run: Run) -> dict[str, str]:
    """Return the rows of the result table that are known."""
    rows = {name: format_number(value) for name, value in run.result.items()}
    if run.best is not None:
        rows[f"best {run.best.monitor}"] = f"{format_number(run.best.value)} at step {run.best.step:,}"
    if run.last_step is not None:
        rows["steps"] = f"{run.last_step:,}"
    if run.num_epochs is not None:
        rows["epochs started"] = f"{run.num_epochs:,}"
    if run.attempts:
        rows["attempts"] = str(len(run.attempts) + run.attempts_left_out)
    if run.wall_seconds is not None:
        rows["wall time"] = format_duration(run.wall_seconds)
    bad = run.series.get("train/bad_samples")
    if bad:
        rows["bad samples skipped"] = f"{bad[-1][1]:,.0f}"
    if run.left_out:
        rows["updates skipped"] = f"{len(run.left_out):,}"
    if run.rollbacks:
        rows["rollbacks"] = f"{len(run.rollbacks):,}"
    speed, wait = run.mean_rate("samples_per_second"), run.mean("data_wait")
    if speed is not None:
        rows["samples/s, mean"] = f"{speed:,.1f}" if speed < 100 else f"{speed:,.0f}"
    if wait is not None:
        rows["waiting for data, mean"] = f"{wait:.1%}"
    return rows


def _status(run: Run) -> str:
    kind = "status completed" if run.status == "completed" else "status"
    return f'<span class="{kind}">{escape(_status_words(run))}</span>'


def _status_words(run: Run) -> str:
    open_ended = run.status == "running" and run.ended is None
    return "no end recorded: still running, or killed" if open_ended else run.status


def _origin(run: Run) -> str:
    times = [("created", format_time(run.created)), ("ended", format_time(run.ended))]
    said = [f"{word} {moment}" for word, moment in times if moment]
    return ", ".join([*([f"disttrain {run.command}"] if run.command else []), *said, f"in {run.folder}"])


_ATTEMPT_HEADS: Final = (
    "Attempt",
    "Started",
    "Ended",
    "From step",
    "To step",
    "Ranks",
    "Strategy",
    "Precision",
    "Reason",
)


def _attempt_rows(run: Run) -> list[Row]:
    return [
        (
            str(i + 1 + (run.attempts_left_out if i else 0)),
            [
                format_time(attempt.started),
                format_time(attempt.ended) or "not recorded",
                _count(attempt.from_step),
                _count(attempt.to_step),
                _count(attempt.world_size),
                attempt.strategy,
                attempt.precision,
                attempt.stop_reason or None,
            ],
        )
        # The record may have dropped attempts after the first one.
        for i, attempt in enumerate(run.attempts)
    ]


_RANK_PARTS: Final = {
    "step": "Step",
    "wait": "Data wait",
    "forward": "Forward pass",
    "backward": "Backward pass",
    "communication": "Communication",
    "rest": "Rest",
}
_RANK_HEADS: Final = ("Rank", "Node", *(f"{part}, median (95th percentile) in ms" for part in _RANK_PARTS.values()))


def _rank_rows(run: Run) -> list[Row]:
    """Return each rank's step times; communication and rest include waiting for other ranks."""
    rows: list[Row] = []
    for told in run.ranks:
        cells = [_milliseconds(told.get(f"{part}_p50"), told.get(f"{part}_p95")) for part in _RANK_PARTS]
        rows.append((str(told.get("rank", "")), [str(told.get("host", "")), *cells]))
    return rows


def _milliseconds(median: object, most: object) -> str | None:
    if not (isinstance(median, (int, float)) and isinstance(most, (int, float))):
        return None
    return f"{median * 1000:,.3g} ({most * 1000:,.3g})"


def _event_rows(run: Run) -> list[Row]:
    return [
        (_count(event.step) or "", [format_time(event.time_seconds), event.kind, event.text]) for event in run.events
    ]


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _figures(figures: Sequence[Figure]) -> str:
    if not figures:
        return '<p class="faint">No metrics were logged.</p>'
    parts = []
    shaded = any(is_averaged(figure.picture) for figure in figures)
    note = f'<p class="faint">{_SHADE_NOTE}</p>' if shaded else ""
    for figure in figures:
        data = base64.b64encode(figure.png).decode("ascii")
        names = ", ".join(line.label for line in figure.picture.lines)
        words = f"{figure.picture.title} by optimizer step: {names}"
        lost = caption(figure.picture)
        below = f"<figcaption>{escape(lost)}</figcaption>" if lost else ""
        parts.append(f'<figure><img alt="{escape(words)}" src="data:image/png;base64,{data}">{below}</figure>')
    return f'{note}<div class="pictures">{"".join(parts)}</div>'


def _section(title: str, body: str) -> str:
    """Return a section, or nothing if its body is empty."""
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>" if body else ""


def _table(heads: Sequence[str], rows: Iterable[Row]) -> str:
    """Return a table, or nothing if it has no rows."""
    return _markup_table([escape(head) for head in heads], rows)


def _run_table(heads: Sequence[str], rows: Iterable[Row]) -> str:
    """Return a table with one column per run; the headers are already markup."""
    return _markup_table(["", *heads], rows)


def _markup_table(heads: Sequence[str], rows: Iterable[Row]) -> str:
    lines = []
    for head, cells in rows:
        shown = "".join(f"<td>{'-' if cell is None else escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(head)}</th>{shown}</tr>')
    if not lines:
        return ""
    head = "".join(f'<th scope="col">{head}</th>' for head in heads)
    top = f"<thead><tr>{head}</tr></thead>\n" if heads else ""
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n{top}<tbody>\n{body}\n</tbody></table></div>'


def _page(title: str, parts: Iterable[str]) -> str:
    body = "\n".join(part for part in parts if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""
