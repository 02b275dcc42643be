"""A campaign under the real torchrun: ranks that are killed are started again by it, and it is killed itself.

The trap takes its faults from one schedule for all attempts. Where the launcher is killed, its ranks go on as orphans;
the next launch begins at once, and they have to find out that the run is no longer theirs.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from unittest import mock

from tests.support.chaos import checks
from tests.support.chaos.campaign import KEEP_BEST, KEEP_LAST, Row, fault_row, fit_arguments
from tests.support.chaos.plan import Fault, Layout
from tests.support.chaos.trap import RUN_DIR, SCHEDULE
from tests.support.torchrun import Launch

FAULTS = (
    Fault("kill", "writing", 4, rank=1),
    Fault("kill-launcher", "step", 8, rank=1),
    Fault("kill", "reading", 8, rank=1),
    Fault("kill", "marking", 14),
    Fault("kill-all", "step", 26),
    Fault("kill", "pruned", 30),
)


def run_under_torchrun(
    folder: Path, data: Path, whole: Path, layout: Layout, *, more: Sequence[str] = (), faults: Sequence[Fault] = FAULTS
) -> list[Row]:
    """Start a run as often as its launcher dies; checked as every campaign is.

    Args:
        folder: for everything that it writes; new.
        data: shards of the digits.
        whole: the folder of a run that nothing brings down.
        layout: what it runs on.
        more: arguments of the run.
        faults: what happens, in this order.
    """
    run_dir, control, mark = folder / "run", folder / "control", secrets.token_hex(8)
    (control / "spent").mkdir(parents=True)
    schedule = control / "schedule.json"
    schedule.write_text(json.dumps([asdict(fault) for fault in faults]))
    environ = {SCHEDULE: str(schedule), RUN_DIR: str(run_dir), checks.MARK: mark}
    arguments = [*fit_arguments(run_dir, data, layout, more), "--trainer.callbacks+=tests.support.chaos.trap.Trap"]
    options = ["--standalone", "--nproc-per-node", str(layout.ranks), "--max-restarts", str(len(faults))]
    launches: list[Launch] = []
    try:
        with mock.patch.dict(os.environ, environ):
            code = -9
            while code == -9 and len(launches) <= len(faults):
                launches.append(Launch(options, arguments, control / f"log-{len(launches)}"))
                code = launches[-1].wait(240)
        text = "\n".join(launch.log.read_text() for launch in launches)
        assert code == 0, text
        assert "Traceback (most recent call last)" not in text, text
        for orphaned in launches[:-1]:
            assert "it will not publish anything" in orphaned.log.read_text(), f"its ranks were not fenced off\n{text}"
        assert not (left := checks.wait_until_gone([], mark)), f"left running: {left}\n{text}"
    finally:
        for launch in launches:
            launch.kill()
        checks.kill_all(mark)
    assert len(launches) == 1 + sum(fault.act == "kill-launcher" for fault in faults), text
    rows = []
    for number, fault in enumerate(faults):
        spent = sorted((control / "spent").glob(f"{number}-*"))
        assert spent, f"{fault} did not happen\n{text}"
        rows.append(fault_row(layout, fault, json.loads(spent[0].read_text())["step"]))
    checks.assert_same(whole, run_dir)
    checks.assert_end(run_dir, (), KEEP_LAST, KEEP_BEST)
    return rows
