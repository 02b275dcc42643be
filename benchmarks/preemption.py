"""The preemption table: signal, phase and skew against what was saved, the exit code and where the next attempt began.

Each row trains the digits on two real ranks, stops them, starts them again, and compares weights and sample ledger
with a run that nothing stopped. ``python -m benchmarks.preemption`` from the repository; 2 CPU cores take some
ten minutes. Writes ``benchmarks/results/preemption.md``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from disttrain.commands import shards
from tests.support.preemption import STEPS, Stop, fit, stop_and_resume

OUT = Path(__file__).parent / "results" / "preemption.md"
ROWS = [
    ("ddp", Stop("setup", ranks=(1,), skew=2.0)),
    ("ddp", Stop("sanity", signal="SIGINT")),
    ("fsdp", Stop("start", skew=2.0)),
    ("ddp", Stop("train", 5, ranks=(1,))),
    ("fsdp", Stop("train", 5, skew=2.0)),
    ("ddp", Stop("train", 5, "SIGUSR1", ranks=(0,))),
    ("ddp", Stop("train", 5, "SIGINT", skew=2.0)),
    ("ddp", Stop("train", 9)),
    ("fsdp", Stop("train", 18, "SIGUSR1", skew=2.0)),
    ("ddp", Stop("validation", 10, ranks=(1,))),
    ("fsdp", Stop("validation", 20, skew=2.0)),
    ("ddp", Stop("save", 8, ranks=(0,))),
    ("fsdp", Stop("save", 10, "SIGUSR1", skew=2.0)),
    ("fsdp", Stop("end", STEPS, ranks=(1,))),
]
PLACES = {
    "setup": "set-up",
    "sanity": "validation before step 1",
    "start": "before step 1",
    "train": "step {next}",
    "validation": "validation at {step}",
    "save": "save at {step}",
    "end": "after the last step, {step}",
}


def main() -> None:
    """Run all rows, and write each as it comes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert shards.main(["pack", "sklearn:digits", str(folder / "digits"), "--shards", "4"]) == 0
        for strategy in ("ddp", "fsdp"):
            fit(folder / f"whole-{strategy}", folder / "digits", strategy).ok()
        lines = [
            "| strategy | signal | to | while in | ranks apart | exit codes | saved at | resumed at | same bits |",
            "|-|-|-|-|-|-|-|-|-|",
        ]
        for number, (strategy, stop) in enumerate(ROWS):
            whole = folder / f"whole-{strategy}"
            found = stop_and_resume(folder / f"run-{number}", whole, folder / "digits", strategy, stop)
            place = PLACES[stop.phase].format(step=stop.step, next=stop.step + 1)
            to = "all ranks" if len(stop.ranks) == 2 else f"rank {stop.ranks[0]}"
            codes = ", ".join(str(code) for code in found.outcome.codes)
            saved = "-" if found.saved_at is None else str(found.saved_at)
            same = "yes" if not found.different and found.ledger_equal else f"NO: {found.different}"
            cells = (strategy, stop.signal, to, place, f"{stop.skew:.0f} s", codes, saved, found.resumed_at, same)
            lines.append(f"| {' | '.join(map(str, cells))} |")
            print(lines[-1], flush=True)
        OUT.write_text("\n".join(["# Stopped and resumed", "", *lines]) + "\n")


if __name__ == "__main__":
    main()
