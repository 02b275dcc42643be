"""Read a run from its folder.

Reads ``run.json``, ``config.yaml`` and ``metrics.csv`` into one frozen :class:`Run`. Only ``run.json`` is required, and
only to be a JSON object: a run may be killed before it wrote the rest, which is when its report matters most. Cost: one
pass over the files, held in memory.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from disttrain.errors import DataError
from disttrain.run.metrics_file import FILE_NAME, Series, read_rows
from disttrain.system.reading import CONFIG_BYTES, RUN_FILE, ReadError, conform_run, open_regular, parse_yaml, read_json
from disttrain.system.terminal import redacted

RUN_FORMAT: Final = 1
_MOST_STEPS: Final = 100_000  # that one event may cover, so that a damaged record cannot exhaust memory


@dataclass(frozen=True)
class Best:
    """The best value of the monitored metric.

    Attributes:
        monitor: the metric's name.
        mode: ``min`` or ``max``.
        value: its best value.
        step: the step at which it was reached.
    """

    monitor: str
    mode: str
    value: float
    step: int


@dataclass(frozen=True)
class Attempt:
    """One life of the run's processes, until they ended or died; None marks what was not recorded.

    Attributes:
        started: Unix seconds.
        ended: Unix seconds.
        from_step: the step that it resumed from.
        to_step: the step at which it ended.
        world_size: number of ranks.
        strategy: such as ``ddp``.
        precision: such as ``32-true``.
        stop_reason: why it ended; empty if not recorded.
        preempted: whether it was preempted, to resume in another attempt.
        seconds: its duration, by a monotonic clock.
    """

    started: float | None
    ended: float | None
    from_step: int | None
    to_step: int | None
    world_size: int | None
    strategy: str
    precision: str
    stop_reason: str = ""
    preempted: bool = False
    seconds: float | None = None


@dataclass(frozen=True)
class Event:
    """A notable event: a resume, an early stop, a skipped checkpoint.

    Attributes:
        step: the step at which it happened.
        time_seconds: Unix seconds.
        kind: such as ``resume``.
        text: one sentence.
        to_step: for a rollback, the step that the run rolled back to.
        skipped: for a rollback, the first and last step that are skipped.
    """

    step: int | None
    time_seconds: float | None
    kind: str
    text: str
    to_step: int | None = None
    skipped: tuple[int, int] | None = None


@dataclass(frozen=True)
class Run:
    """A run, as read from its folder.

    Attributes:
        folder: the run folder.
        name: its name; the folder's name if it has none.
        status: ``completed`` or ``running``; a killed run also reads ``running``.
        command: ``fit`` or another.
        created: Unix seconds.
        ended: Unix seconds.
        stop_reason: why it stopped; empty if not recorded.
        best: the best value of the monitored metric.
        result: the final metrics by name, including those logged as ``test/...``.
        environment: versions, device, host and the like.
        attempts: its attempts, in order.
        events: its events, in order.
        config: the text of ``config.yaml``.
        series: every logged metric, by name.
        last_step: the last step of which anything was recorded.
        num_epochs: epochs started, as far as metrics were logged.
        ranks: each rank's step times at the last comparison.
        wall_seconds: time from start to end, summed over the attempts. An attempt without an end counts up to the last
            metric logged in it.
        attempts_left_out: number of attempts after the first that the record no longer holds.
    """

    folder: Path
    name: str
    status: str
    command: str
    created: float | None
    ended: float | None
    stop_reason: str
    best: Best | None
    result: dict[str, float]
    environment: dict[str, str]
    attempts: tuple[Attempt, ...]
    events: tuple[Event, ...]
    config: str
    series: dict[str, Series]
    last_step: int | None
    num_epochs: int | None
    wall_seconds: float | None
    ranks: tuple[dict[str, Any], ...] = ()
    attempts_left_out: int = 0

    @property
    def rollbacks(self) -> list[tuple[int, int]]:
        """The rollbacks in order, as pairs of steps, from and to."""
        steps = [(event.step, event.to_step) for event in self.events if event.kind == "rollback"]
        return [(step, to_step) for step, to_step in steps if step is not None and to_step is not None]

    @property
    def left_out(self) -> list[int]:
        """The steps without an update, as far as events recorded them."""
        steps = {event.step for event in self.events if event.kind == "skip" and event.step is not None}
        for event in self.events:
            if event.skipped is not None:
                steps.update(range(event.skipped[0], event.skipped[1] + 1))
        return sorted(steps)

    def mean_rate(self, name: str) -> float | None:
        """Return the harmonic mean of a rate. Over equal numbers of steps this is all samples over all time."""
        values = [value for _, value in self.series.get(name, []) if math.isfinite(value) and value >= 0]
        return statistics.harmonic_mean(values) if values else None

    def mean(self, name: str) -> float | None:
        """Return the mean of a metric's finite values."""
        values = [value for _, value in self.series.get(name, []) if math.isfinite(value)]
        return statistics.fmean(values) if values else None


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: it is not a run folder, or its ``run.json`` or ``metrics.csv`` is invalid.
    """
    content = _read_run_json(folder)
    series, num_epochs, times = _read_series(folder / FILE_NAME)
    attempts = tuple(_attempt(entry) for entry in content.get("attempts", []))
    events = tuple(_event(entry) for entry in content.get("events", []))
    result: dict[str, float] = content.get("result", {})
    for name, values in series.items():
        if name.startswith("test/") and values:  # a run killed after its test has no result in run.json
            result.setdefault(name, values[-1][1])
    steps = [values[-1][0] for values in series.values() if values]
    steps += [attempt.to_step for attempt in attempts if attempt.to_step is not None]
    return Run(
        folder=folder,
        name=content.get("name") or folder.resolve().name,
        status=content.get("status") or "running",
        command=content.get("command", ""),
        created=content.get("created"),
        ended=content.get("ended"),
        stop_reason=content.get("stop_reason", ""),
        best=_best(content.get("best", {})),
        result=result,
        environment=content.get("environment", {}),
        attempts=attempts,
        events=events,
        config=redacted(_read_text(folder / "config.yaml")),  # older versions did not redact the file
        series=series,
        last_step=max(steps) if steps else None,
        num_epochs=num_epochs,
        wall_seconds=_wall_seconds(attempts, times, content.get("seconds_left_out") or 0.0),
        ranks=tuple(content.get("ranks", [])),
        attempts_left_out=content.get("attempts_left_out") or 0,
    )


def config_differences(texts: Sequence[str]) -> list[tuple[str, list[str | None]]]:
    """Return the settings in which configurations differ.

    Comments, layout and the order of lines are ignored. If one of the texts is not valid YAML, they are compared line
    by line.

    Returns:
        The setting's path (``optimizer.lr``) and its value in each configuration, None where it is missing.
    """
    try:
        flat = [dict(_leaves(parse_yaml(text))) for text in texts]
    except ReadError:
        lines = zip_longest(*(text.splitlines() for text in texts))
        return [(f"line {i}", list(row)) for i, row in enumerate(lines, 1) if len(set(row)) > 1]
    return mapping_differences(flat)


def mapping_differences(mappings: Sequence[dict[str, str]]) -> list[tuple[str, list[str | None]]]:
    """Return keys whose values differ, in order of first occurrence, with the value of each mapping."""
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    rows = [(key, [mapping.get(key) for mapping in mappings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _leaves(value: object, place: str = "") -> list[tuple[str, str]]:
    """Return the scalars of a parsed configuration with their paths; an empty list or mapping counts as a scalar."""
    if isinstance(value, dict) and value:
        parts = [(f"{place}.{key}" if place else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        parts = [(f"{place}[{i}]", item) for i, item in enumerate(value)]
    else:
        return [(place, json.dumps(value, default=str) if not isinstance(value, str) else value)] if place else []
    return [leaf for where, item in parts for leaf in _leaves(item, where)]


def _read_run_json(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILE
    hint = "give a run folder, which contains run.json, config.yaml and metrics.csv"
    if not folder.is_dir():
        raise DataError(f"run folder {folder} does not exist", hint=hint)
    if not os.path.lexists(path):
        raise DataError(f"{folder} is not a run folder: run.json is missing", hint=hint)
    try:
        content = read_json(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint="restore it") from None
    except ValueError as error:
        raise DataError(f"{path} {error}", hint='restore it; {"format": 1} is enough for a report') from None
    if not isinstance(content, dict):
        raise DataError(f"{path} contains a {type(content).__name__}, not an object", hint="restore it")
    version = content.get("format", RUN_FORMAT)
    if version != RUN_FORMAT:
        raise DataError(
            f"{path} has format {version!r}, but this disttrain reads format {RUN_FORMAT}",
            hint="use the disttrain version that wrote the run, or a newer one",
        )
    return conform_run(content)


def _read_text(path: Path) -> str:
    """Return the text of a run's file; empty if the file is missing or not text."""
    try:
        with open_regular(path, limit=CONFIG_BYTES) as file:
            return file.read().decode("utf-8", errors="replace")
    except (OSError, ReadError):
        return ""


def _read_series(path: Path) -> tuple[dict[str, Series], int | None, list[float]]:
    """Return series by name, the number of epochs started, and the times at which rows were logged."""
    series: dict[str, Series] = {}
    last_epoch: int | None = None
    times: list[float] = []
    for row in read_rows(path):
        for name, value in row.values.items():
            series.setdefault(name, []).append((row.step, value))
        if row.time_seconds is not None and math.isfinite(row.time_seconds):
            times.append(row.time_seconds)
        # A test after the last epoch is logged under the next epoch, which never started.
        if row.epoch is not None and not all(name.startswith("test/") for name in row.values):
            last_epoch = max(row.epoch, last_epoch or 0)
    return series, None if last_epoch is None else last_epoch + 1, times


def _wall_seconds(attempts: Sequence[Attempt], times: Sequence[float], left_out: float) -> float | None:
    starts = [attempt.started for attempt in attempts if attempt.started is not None]
    if not starts:
        return max(times) - min(times) if times else None
    total = left_out
    for attempt in attempts:
        start = attempt.started
        if start is None:
            continue
        end = attempt.ended
        if attempt.seconds is not None and attempt.seconds >= 0:
            total += attempt.seconds
            continue
        if end is None:
            until = min((other for other in starts if other > start), default=math.inf)
            end = max((moment for moment in times if start <= moment < until), default=start)
        total += max(0.0, end - start)
    return total


def _best(entry: dict[str, Any]) -> Best | None:
    value, step = entry.get("value"), entry.get("step")
    if value is None or step is None:
        return None
    return Best(entry.get("monitor", ""), entry.get("mode", ""), value, step)


def _attempt(entry: dict[str, Any]) -> Attempt:
    return Attempt(
        started=entry.get("started"),
        ended=entry.get("ended"),
        from_step=entry.get("from_step"),
        to_step=entry.get("to_step"),
        world_size=entry.get("world_size"),
        strategy=entry.get("strategy", ""),
        precision=entry.get("precision", ""),
        stop_reason=entry.get("stop_reason", ""),
        preempted=entry.get("status") == "preempted",
        seconds=entry.get("seconds"),
    )


def _event(entry: dict[str, Any]) -> Event:
    first, last = entry.get("first_skipped"), entry.get("last_skipped")
    return Event(
        entry.get("step"),
        entry.get("time"),
        entry.get("kind", ""),
        entry.get("text", ""),
        entry.get("to_step"),
        (first, last) if first is not None and last is not None and last - first < _MOST_STEPS else None,
    )
