"""What has to hold after a campaign: bits, samples, files, processes."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil
import torch

from disttrain.callbacks.ledger import read_ledger
from disttrain.checkpoint.marker import LATEST, committed
from disttrain.checkpoint.store import groups, read_group
from disttrain.runs import read_run
from tests.support.chaos.plan import STEPS
from tests.support.weights import differing

MARK: Final = "DISTTRAIN_CHAOS_CAMPAIGN"
"""In the environment of whatever a campaign starts."""
_STEP: Final = r"step-\d{8}(\.\d+)?"
_EXPECTED: Final = re.compile(
    r"config\.yaml|events\.jsonl|metrics\.csv|run\.json|tensorboard/(events\.out\.tfevents\.[^/]+|hparams\.yaml)"
    r"|ledger/rank-\d{5}\.jsonl|report/[a-z0-9-]+\.(html|png)|hangs/[0-9-]+/(rank-\d{5}\.json|report\.txt)"
    rf"|checkpoints/(ATTEMPT|LATEST|{_STEP}/(\.metadata|__\d+_0\.distcp|meta\.pt|COMMITTED))"
)


def state_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint: weights, averages and the optimizer's state."""
    found, passed_over = committed(run_dir / "checkpoints")
    assert found, f"{run_dir} has no committed checkpoint; passed over: {passed_over}"
    assert found[-1].global_step == STEPS, f"the newest checkpoint is of step {found[-1].global_step}"
    path = found[-1].path
    return {f"{group}.{name}": value for group in groups(path) for name, value in read_group(path, group).items()}


def assert_same(whole: Path, run_dir: Path, *, result: bool = True) -> None:
    """The state, the samples and the results of a run that nothing stopped."""
    names = differing(state_of(whole), state_of(run_dir))
    assert not names, f"not equal bit by bit: {names}"
    ledger = read_ledger(run_dir / "ledger")
    assert list(ledger) == list(range(STEPS)), f"the ledger has steps {list(ledger)}"
    assert ledger == read_ledger(whole / "ledger"), "other samples"
    epoch = [key for step in range(19) for key in ledger[step]]
    assert len(epoch) == len(set(epoch)) == 19 * 64, "a sample was delivered twice in an epoch"
    one, other = read_run(whole), read_run(run_dir)
    assert other["status"] == "completed", other["status"]
    if result:
        assert (other["result"], other["best"]) == (one["result"], one["best"])
    # A validation that a stop had left is made up for at every start from there, and its row then stands again.
    logged, due = set(_logged(run_dir)), set(_logged(whole))
    assert logged == due, f"metrics.csv has too much {logged - due} or too little {due - logged}"


def _logged(run_dir: Path) -> list[tuple[str, ...]]:
    """The steps at which something was logged, and what of it does not depend on time."""
    with open(run_dir / "metrics.csv", newline="") as file:
        return [
            tuple(row[name] for name in ("step", "epoch", "val/loss") if name in row) for row in csv.DictReader(file)
        ]


def strays(run_dir: Path, damaged: Iterable[str] = ()) -> list[str]:
    """Files that have no business in a run's folder; those of damaged checkpoints are left for people to look at."""
    ignored = tuple(f"checkpoints/{name}/" for name in damaged)
    found = [str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if not path.is_dir()]
    found += [
        f"{path.relative_to(run_dir)}/" for path in run_dir.rglob("*") if path.is_dir() and not any(path.iterdir())
    ]
    return sorted(name for name in found if not _EXPECTED.fullmatch(name) and not name.startswith(ignored))


def sound(directory: Path, damaged: Iterable[str] = ()) -> list[str]:
    """Names of the checkpoints that count, oldest first."""
    return [entry.path.name for entry in committed(directory)[0] if entry.path.name not in set(damaged)]


def assert_latest(directory: Path, damaged: Iterable[str] = ()) -> None:
    """``LATEST`` names the newest checkpoint."""
    newest = sound(directory, damaged)[-1]
    latest = (directory / LATEST).read_text().strip()
    assert latest == newest, f"LATEST says {latest}, the newest is {newest}"


def left_running(sessions: Iterable[int], mark: str) -> list[str]:
    """Processes of a campaign that are still there: of its ranks' sessions, or with its mark in their environment."""
    wanted, found = set(sessions), []
    for process in psutil.process_iter():
        try:
            session = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[3])
            marked = f"{MARK}={mark}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if (session in wanted or marked) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid}: {' '.join(process.cmdline())}")
        except (OSError, psutil.Error):
            continue  # it is gone, or not ours to look at
    return found


def wait_until_gone(sessions: Iterable[int], mark: str, *, timeout: float = 30) -> list[str]:
    """What is still there of a campaign's processes once they had the time to end."""
    deadline = time.monotonic() + timeout
    while (left := left_running(sessions, mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def kill_all(mark: str) -> None:
    """End what is left of a campaign."""
    for line in left_running([], mark):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(line.partition(":")[0])).kill()


def assert_end(run_dir: Path, damaged: Iterable[str], keep_last: int, keep_best: int) -> None:
    """A run that has come to its end has the files that it should have, and no more."""
    directory = run_dir / "checkpoints"
    there, left = sound(directory), strays(run_dir, damaged)  # a flipped bit is not looked for in old ones
    assert not left, f"stray files: {left}"
    assert keep_last <= len(there) <= keep_last + keep_best, f"not what is to be kept: {there}"
    names = {path.name for path in directory.iterdir() if path.is_dir()} - set(there) - set(damaged)
    assert not names, f"not checkpoints: {sorted(names)}"
    assert_latest(directory, damaged)
