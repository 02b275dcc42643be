"""Print the findings as a table: one line per subject, most severe last, each with its fix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from disttrain.doctor.examine import Report
from disttrain.doctor.finding import Finding, by_weight, worst
from disttrain.system.terminal import cell, printable

_WORDS: Final = {"ok": "OK", "warning": "warning", "failure": "FAILURE"}
_STYLES: Final = {"ok": "green", "warning": "yellow", "failure": "bold red"}
_SHOWN: Final = 3


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the table."""
    world = report.world
    ranks = f"rank {world.rank} of {world.size}" if world.size > 1 else "one rank"
    table = Table(title=f"disttrain doctor: {ranks}, {world.launcher}", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("found")
    for finding in merge(report.findings):
        text = Text(printable(finding.said, lines=True))
        if finding.hint:
            text.append(f"\nhint: {printable(finding.hint)}", style="italic")
        table.add_row(cell(finding.check), Text(_WORDS[finding.status], style=_STYLES[finding.status]), text)
    (console or Console()).print(table)
    (console or Console()).print(f"disttrain doctor: {summary(report.findings)}")


def summary(findings: Iterable[Finding]) -> str:
    """Summarize the findings in one line."""
    findings = list(findings)
    counts = {status: sum(each.status == status for each in merge(findings)) for status in ("failure", "warning")}
    said = [f"{number} {status}{'' if number == 1 else 's'}" for status, number in counts.items() if number]
    return ", ".join(said) if worst(findings) != "ok" else "no problems found"


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """Merge equal findings of several nodes or ranks, and all findings of a subject that are ok."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        same = (finding.check, finding.status) if finding.status == "ok" else (finding.check, finding.said)
        groups.setdefault(same, []).append(finding)
    several = len({finding.host for group in groups.values() for finding in group if finding.host}) > 1
    merged = []
    for group in groups.values():
        first, said = group[0], list(dict.fromkeys(each.said for each in group))
        text = "\n".join(said[:_SHOWN]) + (f"\nand {len(said) - _SHOWN} more" if len(said) > _SHOWN else "")
        hosts = list(dict.fromkeys(each.host for each in group if each.host))
        if first.status != "ok" and several and hosts:
            text = f"{', '.join(hosts[:4])}{f' and {len(hosts) - 4} more' if len(hosts) > 4 else ''}: {text}"
        merged.append(Finding(first.check, first.status, text, first.hint, first.ranks, first.host))
    return sorted(merged, key=by_weight)
