"""What an examination finds: a subject, a status, what was found, and how to mend it."""

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
        status: ``ok``; ``warning``, it works but not well; ``failure``, a training would fail or hang.
        said: what was found, with figures and units.
        mend: how to mend it; empty where nothing is to be mended.
        ranks: whom it concerns; empty for the whole job.
        host: on which node; empty for the whole job.
    """

    check: str
    status: Status
    said: str
    mend: str = ""
    ranks: tuple[int, ...] = ()
    host: str = field(default_factory=socket.gethostname)


def ok(check: str, said: str) -> Finding:
    """Nothing to mend."""
    return Finding(check, "ok", said)


def warning(check: str, said: str, mend: str) -> Finding:
    """It works, but not well."""
    return Finding(check, "warning", said, mend)


def failure(check: str, said: str, mend: str) -> Finding:
    """A training would fail or hang."""
    return Finding(check, "failure", said, mend)


def worst(findings: Iterable[Finding]) -> Status:
    """The gravest status."""
    statuses = {finding.status for finding in findings}
    return next((status for status in ("failure", "warning") if status in statuses), "ok")


def by_weight(finding: Finding) -> int:
    """Sorts the gravest last, where a terminal ends."""
    return _WEIGHT[finding.status]


def size(num_bytes: float) -> str:
    """A number of bytes in words."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
