"""Hostile command lines and files: one message, no traceback, no hang, nothing that a terminal obeys.

The quick run takes a few of each; the slow one is a campaign, with more than a person would think of. Whole ones, of a
quarter of an hour: ``python -m tests.support.hostile commands --seed 7 --number 517`` and ``files --number 244``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import hostile
from tests.support.ranks import run_ranks

QUICK = [
    "shards",
    "checkpoints",
    "jobs",
    "report",
]
"""Commands that load no PyTorch in their fork."""


@pytest.mark.parametrize("what", ["command_lines", "hostile_files"])
def test_a_few(what: str, tmp_path: Path) -> None:
    run_ranks(1, run, what, 11, 120, True, str(tmp_path / "template"), folder=tmp_path / "logs", timeout=300).ok()


@pytest.mark.slow
@pytest.mark.parametrize(("what", "number"), [("command_lines", 140), ("hostile_files", 70)])
def test_a_campaign(what: str, number: int, tmp_path: Path) -> None:
    run_ranks(1, run, what, 3, number, False, str(tmp_path / "template"), folder=tmp_path / "logs", timeout=3000).ok()


def run(what: str, seed: int, number: int, quick: bool, template: str) -> None:
    """Run cases in a process of their own, from which each case is forked."""
    hostile.preload()
    Path(template).mkdir()
    cases: list[hostile.Case] = getattr(hostile, what)(seed, number)
    if quick:
        cases = [case for case in cases if case.argv and case.argv[0] in QUICK]
    faults: list[Any] = hostile.run_cases(cases, hostile.make_template(Path(template)))
    assert not faults, "\n".join(faults)
    assert len(cases) > number / 10
