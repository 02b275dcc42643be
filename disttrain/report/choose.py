"""Choose the plots of a report.

There is one plot per quantity: ``train/loss`` and ``val/loss`` share one, as do ``val/accuracy`` and
``val/accuracy/cat``. Every logged metric appears in some plot, except test metrics: they are single values and are
listed in the table. Pure functions of the data read; drawing is separate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from disttrain.report.draw import MAX_LINES, Line, Picture
from disttrain.report.read import Run
from disttrain.run.metrics_file import Series

_SPLIT: Final = re.compile(r"(train|val)[/_](.+)")
_TEST: Final = re.compile(r"test[/_]")
_RATE: Final = re.compile(r"lr(?:[-/_].*)?|learning_rate")
_GRAD_NORM: Final = re.compile(r"(?:train[/_])?grad(?:ient)?_norm")


@dataclass(frozen=True)
class _Kind:
    """Title, unit and scale of a plot."""

    title: str
    unit: str
    from_zero: bool = False
    percent: bool = False


_RATE_KIND: Final = _Kind("Learning rate", "learning rate")
_GRAD_KIND: Final = _Kind("Gradient norm", "gradient norm")
_SPEED_KIND: Final = _Kind("Throughput", "samples/s", from_zero=True)
_WAIT_KIND: Final = _Kind("Waiting for data", "share of time", from_zero=True, percent=True)


def pictures_of_run(run: Run) -> list[Picture]:
    """Choose the plots of one run: losses first, then other metrics, then throughput, timing and the like."""
    groups: dict[_Kind, list[str]] = {}
    for name in sorted(run.series, key=_rank):
        if not _TEST.match(name):
            groups.setdefault(_kind(name), []).append(name)
    pictures = [picture for kind, names in groups.items() for picture in _share(kind, names, run.series)]
    resumes = tuple(attempt.from_step for attempt in run.attempts[1:] if attempt.from_step is not None)
    return _name_apart([_mark(replace(picture, resumes=resumes), run) for picture in pictures])


def pictures_of_runs(runs: Sequence[Run], labels: Sequence[str]) -> list[Picture]:
    """Choose one plot per metric, with a line for each of the first eight runs."""
    names = {name for run in runs for name in run.series if not _TEST.match(name)}
    pictures = []
    for name in sorted(names, key=lambda name: (not name.startswith("val"), _rank(name))):
        kind = _kind(name)
        lines = tuple(
            Line(label, run.series.get(name, []), color)
            for color, (run, label) in enumerate(zip(runs[:MAX_LINES], labels, strict=False))
            if run.series.get(name)
        )
        title = name if _SPLIT.fullmatch(name) else kind.title
        pictures.append(Picture(_slug(name), title, kind.unit, lines, from_zero=kind.from_zero, percent=kind.percent))
    return _name_apart([picture for picture in pictures if picture.lines])


def caption(picture: Picture) -> str:
    """Describe what the lines cannot show: how many values are not finite, and from which step on."""
    notes = []
    for line in picture.lines:
        steps = [step for step, value in line.series if not math.isfinite(value)]
        if steps:
            count = "1 value of {} is" if len(steps) == 1 else f"{len(steps):,} values of {{}} are"
            notes.append(f"{count.format(line.label)} nan or inf, the first at step {min(steps):,}.")
    return " ".join(notes)


def _mark(picture: Picture, run: Run) -> Picture:
    """Mark the best step in the monitored metric's plot, and resumes, stops and rollbacks in the loss plot."""
    best = run.best
    if best is not None and best.monitor in [line.label for line in picture.lines]:
        words = f"best {best.monitor}: {best.value:.4g} at step {best.step:,}"
        picture = replace(picture, best=(best.step, best.value, words))
    if "loss" in picture.title.lower() and run.last_step is not None:
        verb = "stopped" if run.status == "completed" else "last logged"
        preempted = tuple(a.to_step for a in run.attempts if a.preempted and a.to_step is not None)
        picture = replace(
            picture,
            stop=(run.last_step, f"{verb} at step {run.last_step:,}"),
            preempted=preempted,
            left_out=tuple(run.left_out),
            rollbacks=tuple(run.rollbacks),
        )
    return picture


def _kind(name: str) -> _Kind:
    if _RATE.fullmatch(name):
        return _RATE_KIND
    if _GRAD_NORM.fullmatch(name):
        return _GRAD_KIND
    if name == "samples_per_second":
        return _SPEED_KIND
    if name == "data_wait":
        return _WAIT_KIND
    match = _SPLIT.fullmatch(name)
    quantity = match.group(2).split("/")[0] if match else name
    return _Kind(quantity[:1].upper() + quantity[1:], quantity)


def _rank(name: str) -> tuple[int, str, bool, int, str]:
    """Sort key: losses, other quality metrics, training itself, the rest; training before validation."""
    kind = _kind(name)
    training = (_RATE_KIND, _GRAD_KIND, _SPEED_KIND, _WAIT_KIND)
    if kind in training:
        return 2, str(training.index(kind)), False, 0, name
    match = _SPLIT.fullmatch(name)
    if match is None:
        return 3, name, False, 0, name
    quantity, split = match.group(2), match.group(1)
    return int(kind.unit != "loss"), kind.unit, "/" in quantity, int(split == "val"), name


def _share(kind: _Kind, names: Sequence[str], series: dict[str, Series]) -> list[Picture]:
    """Group metrics of one kind into plots of at most eight lines."""
    pictures = []
    # Validation keeps its color in every plot, whether or not training logs the same quantity.
    first = 1 if names[0].startswith("val") else 0
    for low in range(0, len(names), MAX_LINES):
        part = names[low : low + MAX_LINES]
        lines = tuple(Line(name, series[name], first + i) for i, name in enumerate(part))
        title = kind.title if len(names) <= MAX_LINES else f"{kind.title} ({low // MAX_LINES + 1})"
        pictures.append(Picture(_slug(title), title, kind.unit, lines, from_zero=kind.from_zero, percent=kind.percent))
    return pictures


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-") or "metric"


def _name_apart(pictures: Sequence[Picture]) -> list[Picture]:
    """Make the plots' file names unique."""
    taken: set[str] = set()
    named = []
    for picture in pictures:
        name, count = picture.name, 1
        while name in taken:
            count += 1
            name = f"{picture.name}-{count}"
        taken.add(name)
        named.append(replace(picture, name=name))
    return named
