"""Runs that are brought down again and again lose nothing: which faults, how often, where, and what came of it.

Claim: kill -9 of one rank, of all, of the launcher, at any place of a step, a validation, a start or a save; SIGTERM
with the ranks apart; stopped and woken processes; full and read-only disks, I/O errors; damaged checkpoints and missing
shards: every run ends with the bits, the samples and the results of one that nothing disturbed, with no process and no
file too many.

Method: for each layout one run of 48 steps of the digits, on real ranks, with a checkpoint every 3 steps in the
background and averaged weights, is brought down by a schedule drawn from the seed (``tests/support/chaos``). After
every attempt its exit codes, its messages, the checkpoint it resumed from and the number of checkpoints are checked; at
the end all tensors of the last checkpoint, the ledger of samples, ``metrics.csv``, test metrics, files and processes.
Then one more run changes its layout at every attempt, with the tree's sums, and two run under torchrun, which is killed
too.

How to read it: a cell lists *step of the fault* → *step that the next attempt began at*. A fault in a save stands at
the save's step, ``start`` is before the first step, ``-`` between two attempts; without an arrow the attempt went on.

``python -m benchmarks.chaos`` from the repository; a quarter of an hour on 2 CPU cores. ``--seed``, ``--kills`` and
``--layouts`` repeat one campaign of it. Disks are filled where file systems can be mounted (root). Writes
``benchmarks/results/chaos.md``.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from disttrain.commands import shards
from tests.support.chaos import disk
from tests.support.chaos.campaign import TREE, Campaign, Row, whole_run
from tests.support.chaos.launcher import run_under_torchrun
from tests.support.chaos.plan import LAYOUTS, Attempt, Layout, schedule

OUT = Path(__file__).parent / "results" / "chaos.md"
CHANGING, LAUNCHED = "changing", "torchrun "


def main() -> int:
    """Run the campaigns, and write the table; 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [*map(str, LAYOUTS), CHANGING, *(f"{LAUNCHED}{layout}" for layout in LAYOUTS if layout.ranks == 2)]
    parser.add_argument("--kills", type=int, default=20, help="for each layout; torchrun's campaigns have their own")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layouts", nargs="+", default=names, choices=names, metavar="LAYOUT", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    done: dict[str, tuple[list[Row], str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="disttrain-chaos-") as folder:
        data = Path(folder) / "digits"
        assert shards.main(["pack", "sklearn:digits", str(data), "--shards", "4"]) == 0
        for name in options.layouts:
            print(f"-- {name}", flush=True)
            done[name] = _timed(
                partial(_run, name=name, folder=Path(folder), data=data, seed=options.seed, kills=options.kills)
            )
            _write(options.out, options.seed, done)
    return int(any(result != "same" for _, result, _ in done.values()))


def _timed(campaign: Callable[[list[Row]], None]) -> tuple[list[Row], str, float]:
    rows: list[Row] = []
    started, result = time.monotonic(), "same"
    try:
        campaign(rows)
    except Exception as error:
        traceback.print_exc()
        result = f"LOST: {str(error).splitlines()[0]}"
    return rows, result, time.monotonic() - started


def _run(rows: list[Row], *, name: str, folder: Path, data: Path, seed: int, kills: int) -> None:
    """One campaign; its rows are added as they come."""
    own = folder / name.replace(" ", "-")
    layouts = (
        LAYOUTS if name == CHANGING else [layout for layout in LAYOUTS if str(layout) == name.removeprefix(LAUNCHED)]
    )
    more = TREE if name == CHANGING else ()
    whole = whole_run(own / "whole", data, layouts[0], more)
    if name.startswith(LAUNCHED):
        rows += run_under_torchrun(own, data, whole, layouts[0])
        return
    small = disk.can_mount() and name != CHANGING
    Campaign(own, data, seed, _with_kills(seed, layouts, kills, small), whole, more, small, rows).run()


def _with_kills(seed: int, layouts: Sequence[Layout], kills: int, small_disk: bool) -> list[Attempt]:
    """The shortest schedule with that many kills."""
    for number in range(kills, 10 * kills + 10):
        made = schedule(seed, layouts, attempts=number, small_disk=small_disk, hangs=len(layouts) == 1)
        if sum(fault.act in ("kill", "kill-all") for attempt in made for fault in attempt.faults) >= kills:
            return made
    raise AssertionError(f"no schedule has {kills} kills")


def _write(out: Path, seed: int, done: dict[str, tuple[list[Row], str, float]]) -> None:
    faults = sorted({row.fault for rows, _, _ in done.values() for row in rows})
    lines = [
        "# Faults injected, and what came of them",
        "",
        "What was done, and how to read it, stands in [`benchmarks/chaos.py`](../chaos.py).",
        "",
        "| | faults | kills | of these in a save | seconds | end |",
        "|-|-:|-:|-:|-:|-|",
    ]
    everything = [row for rows, _, _ in done.values() for row in rows]
    for name, (rows, result, seconds) in [
        *done.items(),
        ("all", (everything, "", sum(s for _, _, s in done.values()))),
    ]:
        kills, in_save = sum(row.kill for row in rows), sum(row.in_save for row in rows)
        lines.append(f"| {name} | {len(rows)} | {kills} | {in_save} | {seconds:.0f} | {result} |")
    lines += ["", f"| fault | {' | '.join(done)} |", f"|-|{'-|' * len(done)}"]
    for fault in faults:
        cells = [", ".join(map(_cell, (row for row in rows if row.fault == fault))) for rows, _, _ in done.values()]
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    command = f"python -m benchmarks.chaos {' '.join(sys.argv[1:])}".strip()
    machine = f"{os.cpu_count()} cores; Python {platform.python_version()}, {versions}; seed {seed}; `{command}`."
    out.write_text("\n".join([*lines, "", machine, ""]))


def _cell(row: Row) -> str:
    at = "start" if row.at is None and row.kill else "-" if row.at is None else str(row.at)
    return at if row.survived or row.resumed_at is None else f"{at}→{row.resumed_at}"


if __name__ == "__main__":
    sys.exit(main())
