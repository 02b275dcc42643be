"""One result of a check: subject, status, what was found, and how to fix it."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

Status = Literal["ok", "warning", "failure"]
_WEIGHT: Final = {"ok": 0, "warning": 1, "failure": 2}


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        check: the subject, such as ``shared memory``.
        status: ``ok``; ``warning`` (works, but not well); ``failure`` (training would fail or hang).
        said: what was found, with figures and units.
        hint: how to fix it; empty if there is nothing to fix.
        ranks: the ranks concerned; empty for the whole job.
        host: the node concerned; empty for the whole job.
    """

    check: str
    status: Status
    said: str
    hint: str = ""
    ranks: tuple[int, ...] = ()
    host: str = field(default_factory=socket.gethostname)


def ok(check: str, said: str) -> Finding:
    """Create a finding with nothing to fix."""
    return Finding(check, "ok", said)


def warning(check: str, said: str, hint: str) -> Finding:
    """Create a finding for something that works, but not well."""
    return Finding(check, "warning", said, hint)


def failure(check: str, said: str, hint: str) -> Finding:
    """Create a finding for something that would make training fail or hang."""
    return Finding(check, "failure", said, hint)


def worst(findings: Iterable[Finding]) -> Status:
    """Return the most severe status."""
    statuses = {finding.status for finding in findings}
    return next((status for status in ("failure", "warning") if status in statuses), "ok")


def by_weight(finding: Finding) -> int:
    """Sort key that puts the most severe findings last, nearest to the prompt."""
    return _WEIGHT[finding.status]


def size(num_bytes: float) -> str:
    """Format a number of bytes."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
