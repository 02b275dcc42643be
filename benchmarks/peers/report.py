"""The tables and the picture, from what the processes found: ``python -m benchmarks.peers.report`` writes them anew."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from matplotlib.figure import Figure

from .cases import Case, cases

Facts = dict[str, Any]
Result = dict[str, Any]

OURS: Final = "disttrain"
NO_FORMAT: Final = "memmap"  # not among the peers of the goals: it holds only samples of one size
TITLES: Final = {
    "webdataset": "webdataset",
    "streaming": "Streaming",
    "litdata": "litdata",
    "torchdata": "torchdata, files",
    "memmap": "torchdata, memmap",
    "grain": "grain",
}
COLORS: Final = {OURS: "#1f6fb4", "limits": "#b5b5b5", NO_FORMAT: "#d8c9a8"}
PEER_COLOR: Final = "#d9822b"


class Goal(NamedTuple):
    """At least ``factor`` times the rate of ``peer``, or of the best with that decoder, with so many workers."""

    letter: str
    workers: str
    factor: float | None  # None: only said
    peer: str = ""
    backend: str = "pillow"


GOALS: Final = (
    Goal("a", "0", 10),
    Goal("a", "2", 10),
    Goal("a", "0", 50, "webdataset"),
    Goal("a", "2", 50, "webdataset"),
    Goal("b", "0", 1.2),
    Goal("b", "2", 3),
    Goal("c", "0", 2),
    Goal("c", "2", 2),
    Goal("c", "0", 2, backend="simplejpeg"),
    Goal("c", "2", 2, backend="simplejpeg"),
    Goal("d", "0", 2),
    Goal("d", "2", 10),
    Goal("a", "0", None, NO_FORMAT),
    Goal("a", "2", None, NO_FORMAT),
    Goal("d", "0", None, NO_FORMAT),
    Goal("d", "2", None, NO_FORMAT),
)


class Key(NamedTuple):
    """Who read what, and how."""

    letter: str
    contender: str
    mode: str
    backend: str


class Figures:
    """What was found, by :class:`Key`.

    Args:
        results: the answers of the processes.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        self._found: dict[Key, list[Result]] = {}
        self.limits: dict[str, dict[str, list[float]]] = {}
        for result in results:
            if "limits" in result:
                for name, rate in result["limits"].items():
                    self.limits.setdefault(result["letter"], {}).setdefault(name, []).append(rate)
                continue
            key = Key(result["letter"], result["contender"], result["mode"], result["backend"])
            self._found.setdefault(key, []).append(result)

    def keys(self, letter: str) -> list[Key]:
        """Those of one data set that were measured, by backend, contender and mode."""
        order = [OURS, *TITLES]
        found = [key for key in self._found if key.letter == letter and self.values(key, "rate")]
        return sorted(found, key=lambda key: (key.backend, order.index(key.contender), key.mode))

    def values(self, key: Key, name: str) -> list[Any]:
        return [result[name] for result in self._found.get(key, []) if name in result]

    def middle(self, key: Key, name: str) -> float | None:
        values = self.values(key, name)
        return median(values) if values else None

    def best(self, letter: str, workers: str, contenders: Iterable[str], backend: str = "") -> Key | None:
        """The fastest of some contenders with so many workers, with one backend or with any."""
        found = [
            key
            for key in self.keys(letter)
            if key.contender in contenders and key.mode[0] == workers and backend in ("", key.backend)
        ]
        return max(found, key=lambda key: self.middle(key, "rate") or 0, default=None)

    def errors(self) -> list[str]:
        return [
            f"{name_of(key)}, ({key.letter}), {key.mode} workers: {error}"
            for key in self._found
            for error in self.values(key, "error")
        ]


def name_of(key: Key) -> str:
    """Who, with how it works where that is not its only way."""
    name = TITLES.get(key.contender, key.contender)
    if key.contender == OURS and key.mode != "0":
        name += ", processes" if key.mode == "2p" else ", threads"
    return name + (", simplejpeg" if key.backend != "pillow" else "")


def machine(packages: Iterable[str]) -> str:
    """The computer and the versions, without its name."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    versions = ", ".join(f"{name} {version(name)}" for name in dict.fromkeys(packages))
    cpu = f"{model[1] if model else 'unknown CPU'}, {os.cpu_count()} cores, {platform.system()}"
    return f"{cpu}; Python {platform.python_version()}, {versions}"


def peers() -> list[str]:
    return [name for name in TITLES if name != NO_FORMAT]


def goal_rows(figures: Figures) -> list[str]:
    rows = []
    for goal in GOALS:
        ours = figures.best(goal.letter, goal.workers, [OURS])
        theirs = figures.best(goal.letter, goal.workers, [goal.peer] if goal.peer else peers(), goal.backend)
        if ours is None or theirs is None:
            continue
        reached = (figures.middle(ours, "rate") or 0) / (figures.middle(theirs, "rate") or 1)
        wanted, verdict = ("", "") if goal.factor is None else (f"{goal.factor:g}", "no")
        if goal.factor is not None and reached >= goal.factor:
            verdict = "yes"
        cells = [
            f"({goal.letter})",
            goal.workers,
            name_of(ours),
            "best peer: " * (not goal.peer) + name_of(theirs),
            wanted,
            f"{reached:.1f}" if reached >= 10 else f"{reached:.2f}",
            verdict,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def case_rows(figures: Figures, case: Case) -> list[str]:
    rows = []
    for name, values in figures.limits.get(case.letter, {}).items():
        rows.append(f"| limit: {name} | | {number(median(values))} | | | | | | |")
    for key in figures.keys(case.letter):
        rates = figures.values(key, "rate")
        best = figures.best(case.letter, key.mode[0], peers(), key.backend)
        ratio = median(rates) / (figures.middle(best, "rate") or 1) if best else None
        exact = figures.values(key, "resumed_exactly")
        cells = [
            name_of(key),
            key.mode[0],
            number(median(rates)),
            f"{number(min(rates))} to {number(max(rates))}",
            "" if ratio is None else f"{ratio:.2f}",
            milliseconds(figures.middle(key, "first_seconds")),
            milliseconds(figures.middle(key, "resume_seconds")),
            ("yes" if all(exact) else "no") if exact else "-",
            mebibytes(figures.middle(key, "memory_bytes")),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def number(value: float) -> str:
    return f"{value:,.0f}"


def milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1000:,.0f}"


def mebibytes(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f}"


def profile_rows(figures: Figures, letters: Iterable[str]) -> list[str]:
    rows = []
    for letter in letters:
        for key in figures.keys(letter):
            for spent in figures.values(key, "profile"):
                shares = ", ".join(f"`{name}` {share:.0%}" for name, share in spent)
                rows.append(f"- ({letter}){', simplejpeg' * (key.backend != 'pillow')}: {shares}")
    return rows


def page(facts: Facts, results: Sequence[Result]) -> str:
    """The results in Markdown."""
    figures = Figures(results)
    sets = [case for case in cases(quick=facts["quick"]).values() if figures.keys(case.letter)]
    repeats = 1 + max(result["repeat"] for result in results)
    lines = [
        "# Reading, against the loaders of other libraries\n",
        "Shuffled batches from the page cache, the same content for all, each through its recommended loader;"
        f" medians of {repeats} alternating repeats, each in a process of its own. What is measured, and how to read"
        " it, stands in [`benchmarks/peers`](../peers/__main__.py).\n",
        "![Rates, first batch and resuming](peers.png)\n",
        "## Goals\n",
        "Ratios of rates, disttrain and the peer each as they are fastest with so many workers; of decoded images"
        " against peers with Pillow, which is their default, and with simplejpeg. A mapped array, which holds only"
        " samples of one size, is not counted among the peers; what it reaches stands in the last rows.\n",
        "| data | workers | disttrain | against | wanted | reached | |\n|-|-:|-|-|-:|-:|-|",
        *goal_rows(figures),
    ]
    for case in sets:
        lines += [
            f"\n## ({case.letter}) {case.title}\n",
            f"{case.num_samples:,} samples. 'To best' compares with the best peer at as many workers and with the same"
            " decoder; 'exactly' says whether it resumed with the very batch that came next.\n",
            "| | workers | samples/s | min to max | to best | first batch, ms | resume, ms | exactly | memory, MiB |",
            "|-|-:|-:|-:|-:|-:|-:|-|-:|",
            *case_rows(figures, case),
        ]
    spent = profile_rows(figures, [case.letter for case in sets])
    if spent:
        lines += [
            "\n## Where disttrain's time goes\n",
            "Shares of an epoch with 0 threads, by the profiler, which makes short Python functions look longer:\n",
            *spent,
        ]
    notes = [f"left out: {name} ({why})" for name, why in facts["missing"].items()] + figures.errors()
    if notes:
        lines += ["\n## What did not run\n", *[f"- {note}" for note in notes]]
    lines += [f"\nMachine: {facts['machine']}.\n", f"Command: `{facts['command']}` ({facts['minutes']} minutes)\n"]
    return "\n".join(lines)


def chart(facts: Facts, results: Sequence[Result]) -> Figure:
    """A column a data set: rates above, waits below; both on logarithmic axes."""
    figures = Figures(results)
    sets = [case for case in cases(quick=facts["quick"]).values() if figures.keys(case.letter)]
    figure = Figure(figsize=(5.2 * len(sets), 11), layout="constrained")
    axes = figure.subplots(2, len(sets), squeeze=False)
    for case, (upper, lower) in zip(sets, axes.T, strict=True):
        keys = figures.keys(case.letter)
        bars = [
            (f"limit: {name}", "limits", "0", median(values))
            for name, values in figures.limits.get(case.letter, {}).items()
        ]
        bars += [(name_of(key), key.contender, key.mode, figures.middle(key, "rate") or 0) for key in keys]
        _bars(upper, bars, "{:,.0f}")
        upper.set_title(f"({case.letter}) {case.title}", fontsize=10)
        upper.set_xlabel("samples/s (more is better)")
        waits = []
        for key in keys:
            if key.backend == "pillow":
                for what, name in (("first batch", "first_seconds"), ("resume", "resume_seconds")):
                    value = 1000 * (figures.middle(key, name) or 0)
                    waits.append((f"{name_of(key)}, {what}", key.contender, key.mode, value))
        _bars(lower, waits, "{:,.0f}")
        lower.set_xlabel("milliseconds (less is better)")
    return figure


def _bars(axes: Any, bars: Sequence[tuple[str, str, str, float]], form: str) -> None:
    for place, (_, contender, mode, value) in enumerate(bars):
        color = COLORS.get(contender, PEER_COLOR)
        axes.barh(place, value, color=color, alpha=1 if mode == "0" else 0.6, height=0.75)
        axes.annotate(form.format(value), (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    names = [name if contender == "limits" else f"{name}, {mode[0]}" for name, contender, mode, _ in bars]
    axes.set_yticks(range(len(bars)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    folder = Path(__file__).parents[1] / "results"
    facts = json.loads((folder / "peers.json").read_text())
    results = facts.pop("results")
    (folder / "peers.md").write_text(page(facts, results))
    chart(facts, results).savefig(folder / "peers.png", dpi=110)


if __name__ == "__main__":
    main()
