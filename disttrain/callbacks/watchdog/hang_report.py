"""Combine the files written by the ranks of a hung run into one report.

A SLURM job that is set to requeue is also requeued after a hang, just as torchrun restarts the ranks; but only if the
run has progressed further than at any earlier hang, so a run that always hangs at the same step does so only twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from disttrain.run.folder import write_run
from disttrain.slurm.requeue import have_script_requeue, is_to_be_requeued, job_of
from disttrain.system.files import write_atomically
from disttrain.system.reading import read_json, read_run

FOLDER: Final = "hangs"
REPORT: Final = "report.txt"
MICRO_BATCH: Final = "micro batch"
"""The stage of a run that is training; the report names any other stage."""


def make_report(run_dir: Path, folder: Path, size: int, timeout: float) -> str:
    """Write the report, record it in ``run.json``, and return its first paragraph.

    Args:
        run_dir: the run folder.
        folder: the folder with the ranks' files.
        size: the number of ranks.
        timeout: seconds without a step that count as a hang.
    """
    ranks: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("rank-*.json")):
        told = read_json(path)
        ranks[int(told["rank"])] = told
    step = max(told["step"] for told in ranks.values())
    summary = summarize(ranks, size)
    stages = {told["doing"] for told in ranks.values()}
    stage = f" ({stages.pop()})" if len(stages) == 1 and not any(MICRO_BATCH in each for each in stages) else ""
    head = (
        f"the run hangs at step {step}{stage}: no step or batch for {timeout:g} s. {summary};"
        f" {folder / REPORT} has the stacks{_go_on(run_dir, step)}"
    )
    parts = [head]
    for rank, told in ranks.items():
        parts.append(
            f"rank {rank} on {told['host']} (process {told['pid']}), {told['doing']}, step {told['step']}:"
            f" {told['place']}"
        )
        if told["collectives"]:
            parts.append("\n".join(["its last collectives:", *told["collectives"]]))
        parts.append(told["stacks"])
    _note(run_dir, step, summary)
    write_atomically(folder / REPORT, "\n\n".join(parts) + "\n")
    return head


def summarize(ranks: dict[int, dict[str, Any]], size: int) -> str:
    """Say in one sentence which ranks are where, starting with those that do not wait for others."""
    places: dict[str, list[int]] = {}
    for rank, told in ranks.items():
        places.setdefault(told["place"], []).append(rank)
    silent = [rank for rank in range(size) if rank not in ranks]
    if silent:
        places["told nothing: dead, stopped, or in code that holds Python's lock (then see standard error)"] = silent
    suspects = sorted(places.items(), key=lambda item: (_waits(item[0]), len(item[1])))
    hosts = {rank: told["host"] for rank, told in ranks.items()}
    several = len(set(hosts.values())) > 1
    return "; ".join(f"{_named(members, hosts if several else {})} {place}" for place, members in suspects)


def _waits(place: str) -> int:
    """Rank how surely a place waits for others: a collective in user code may have no counterpart on other ranks."""
    if "waits for the other ranks" not in place and "gradients are reduced" not in place:
        return 0
    return 1 if "called by user code" in place else 2


def _named(ranks: list[int], hosts: dict[int, str]) -> str:
    where = {hosts[rank] for rank in ranks if rank in hosts}
    on = f" on {', '.join(sorted(where))}" if 0 < len(where) <= 2 else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {_spans(ranks)}{on}"


def _spans(ranks: Iterable[int]) -> str:
    """Return ``0-2, 5`` for 0, 1, 2 and 5."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def _go_on(run_dir: Path, step: int) -> str:
    """Requeue the SLURM job if it should continue; return what was done, as part of a sentence."""
    if not is_to_be_requeued():
        return ""
    before = [event for event in read_run(run_dir).get("events", []) if event.get("kind") == "hang"]
    if any((event.get("step") or 0) >= step for event in before):
        return f"; job {job_of()['slurm_job']} is not requeued: the run has come no further than when it hung before"
    return f"; {have_script_requeue(run_dir)}"


def _note(run_dir: Path, step: int, summary: str) -> None:
    record = read_run(run_dir)
    if not record:
        return
    now = time.time()
    event = {"step": step, "time": now, "kind": "hang", "text": summary}
    record.setdefault("events", []).append(event)
    if record.get("attempts"):
        record["attempts"][-1] |= {"ended": now, "to_step": step, "stop_reason": "hung"}
    write_run(run_dir, record)
