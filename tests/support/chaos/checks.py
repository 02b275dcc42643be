"""What has to hold after a campaign: bits, samples, files, processes."""

from __future__ import annotations

import csv
import json
import math
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil
import torch
import yaml

from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.checkpoint.format.marker import LATEST, Committed, committed
from disttrain.checkpoint.format.reader import groups, read_group, read_meta
from disttrain.system.reading import read_run
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
    logged, due = _logged(run_dir), _logged(whole)
    much, little = logged.keys() - due.keys(), due.keys() - logged.keys()
    assert not much | little, f"metrics.csv has too much {much} or too little {little}"
    for place, values in logged.items():
        near = all(math.isclose(own, value, rel_tol=1e-5) for own, value in zip(due[place], values, strict=True))
        assert near, f"metrics.csv: {place} has {values}, not {due[place]}"
    assert_same_records(one, other)
    assert_same_files(whole, run_dir)


VOLATILE_METRICS: Final = ("time", "samples_per_second", "data_wait", "seconds_per_step", "gpu_")
"""Columns of metrics.csv, by how they begin, that hold times and loads."""
VOLATILE_FIELDS: Final = {
    *("id", "name", "created", "ended", "attempts", "events", "environment", "ranks", "dropped_output"),
    *("attempts_left_out", "events_left_out", "seconds_left_out"),
}
"""Fields of run.json that tell when, where and in how many attempts."""
VOLATILE_SETTINGS: Final = (
    *("trainer.run_dir", "trainer.hang_timeout", "trainer.callbacks", "trainer.parallel.", "checkpoint.on_save_error"),
    *("data.train", "data.val", "data.test"),
)
"""Settings in which the attempts of a campaign differ."""


def assert_same_records(one: dict[str, Any], other: dict[str, Any]) -> None:
    """``run.json`` agrees in all that does not tell of the attempts; and these fit to each other."""
    names = (set(one) | set(other)) - VOLATILE_FIELDS
    differ = {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}
    assert not differ, f"run.json differs: {differ}"
    attempts = other["attempts"]
    assert attempts[-1]["to_step"] == STEPS, attempts[-1]
    assert all(attempt["started"] is not None and 0 <= attempt["from_step"] <= STEPS for attempt in attempts), attempts
    ended = [attempt for attempt in attempts if attempt["to_step"] is not None]
    assert all(attempt["seconds"] >= 0 and attempt["to_step"] >= attempt["from_step"] for attempt in ended), ended
    assert set(other["environment"]) == set(one["environment"])


def assert_same_files(whole: Path, run_dir: Path) -> None:
    """Every other file of the run's folder is there, whole, and says the same."""
    own, others = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (whole, run_dir))
    differ = [name for name in changed(own, others) if not f"{name}.".startswith(VOLATILE_SETTINGS)]
    assert not differ, f"config.yaml differs: {differ}"
    lines = (run_dir / "events.jsonl").read_text().split("\n")
    assert lines[-1] == "", "the last line of events.jsonl is torn"
    events = [json.loads(line) for line in lines[:-1]]
    kinds = {event["kind"] for event in events}
    wanted = {json.loads(line)["kind"] for line in (whole / "events.jsonl").read_text().splitlines()}
    assert kinds >= wanted, f"events.jsonl lacks {wanted - kinds}"
    attempts = [event for event in events if event["kind"] == "attempt"]
    # One that was killed before it wrote run.json has its line all the same.
    assert len(attempts) >= len(read_run(run_dir)["attempts"]), "events.jsonl lacks attempts"
    names = sorted(path.name for path in (run_dir / "report").iterdir())
    # A report shows lines for resumes and stops besides; its pictures are those of the same metrics.
    assert names == sorted(path.name for path in (whole / "report").iterdir()), names
    for path in (run_dir / "report").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<!"), path
        assert path.suffix == ".png" or path.read_text().rstrip().endswith("</html>"), path
    first, second = (
        [(entry.global_step, entry.about.metric) for entry in _kept(folder)] for folder in (whole, run_dir)
    )
    assert first[-1] == second[-1], f"the last checkpoint stands for {second[-1]}, not for {first[-1]}"
    metas = [flat(read_meta(_kept(folder)[-1].path)) for folder in (whole, run_dir)]
    differ = [
        name
        for name in sorted(metas[0].keys() | metas[1].keys())
        if not VOLATILE_META.search(name) and not _equal(metas[0].get(name), metas[1].get(name))
    ]
    assert not differ, f"meta.pt of the last checkpoint differs: {differ}"


VOLATILE_META: Final = re.compile(r"(seconds|time|Preemption|world_size|batch_progress|rng|Stragglers|usual)")
"""What a checkpoint holds besides tensors that tells of times, of this layout, or of counts of micro batches."""


def _kept(run_dir: Path) -> list[Committed]:
    return committed(run_dir / "checkpoints")[0]


def changed(one: Any, other: Any) -> list[str]:
    """Dotted names in which two nested values differ."""
    first, second = flat(one), flat(other)
    return sorted(name for name in first.keys() | second.keys() if not _equal(first.get(name), second.get(name)))


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries and lists, by dotted name."""
    if isinstance(content, dict):
        pairs: Any = content.items()
    elif isinstance(content, list | tuple):
        pairs = enumerate(content)
    else:
        return {prefix: content}
    return {
        name: leaf
        for key, value in pairs
        for name, leaf in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    return bool(one == other) or repr(one) == repr(other)  # two NaNs


def _logged(run_dir: Path) -> dict[tuple[str, ...], list[float]]:
    """Every row of metrics.csv, by step, epoch, val/loss and its other columns, but for those that depend on time."""
    found = {}
    with open(run_dir / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            values = {name: value for name, value in row.items() if value and not name.startswith(VOLATILE_METRICS)}
            place = (values.pop("step"), values.pop("epoch", ""), values.get("val/loss", ""), *sorted(values))
            found[place] = [float(values[name]) for name in sorted(values)]
    return found


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
