"""A run on a real SLURM that is preempted again and again, and how long it is from ``disttrain submit`` to step 1.

One job of 2 nodes x 1 rank, the second rank half a second late in every step, is preempted ``--tries`` times by a job
of a higher priority; weights and samples are compared with those of a run that nothing stopped. Then jobs of both
styles are submitted by the command itself, and timed. ``python -m benchmarks.slurm`` from the repository, as root, on
a machine with SLURM's programs (:mod:`tests.support.slurm` starts them); writes ``benchmarks/results/slurm.md`` and
``slurm.json``, the transcript ``slurm.txt`` and the loss over all attempts, ``slurm.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.checkpoint.format.reader import committed
from disttrain.commands import shards
from disttrain.report import write_report
from disttrain.run.metrics_file import read_rows
from disttrain.system.reading import read_run
from tests.support.ranks import run_cli
from tests.support.slurm import Cluster, missing, wait_until
from tests.support.slurm_jobs import arguments, callbacks, log_of, settings, slowly
from tests.support.weights import differing, final_weights

OUT = Path(__file__).parent / "results"
URGENT = ("sbatch", "--parsable", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null")


class Transcript:
    """Commands on the cluster's login node and what they printed."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.lines = cluster, folder, [""]

    def run(self, *words: str, show: str = "") -> str:
        """Run a command in the folder; only what came is kept."""
        done = self.cluster.run(words, folder=self.folder)
        self.lines += [f"$ {show or ' '.join(words)}", *done.stdout.rstrip().splitlines(), ""]
        return done.stdout

    def disttrain(self, *words: str, show: str = "") -> str:
        """Run one of disttrain's."""
        done = self.cluster.disttrain(*words, folder=self.folder)
        self.lines += [f"$ disttrain {show or ' '.join(words)}", *done.stdout.rstrip().splitlines(), ""]
        return done.stdout


def preempted(cluster: Cluster, folder: Path, data: Path, *, tries: int, steps: int) -> dict[str, Any]:
    """One run, preempted some times."""
    more = {"trainer.max_steps": str(steps)}
    words = [f"--{name}={value}" for name, value in settings(folder / "whole", data, more).items()]
    run_cli(2, ["fit", "--config", "recipes/digits.yaml", *words], folder=folder / "logs").ok()
    run_dir, spoken = folder / "preempted", Transcript(cluster, folder)
    options = ("--nodes", "2", "--tasks-per-node", "1", "--partition", "low", "--requeue")
    short = f"submit --config recipes/digits.yaml {' '.join(options)} --time 10m --set trainer.run_dir=preempted ..."
    given = arguments(run_dir, data, *options, more={**more, **callbacks(slowly(0.5, rank=1))})
    job = spoken.disttrain("submit", *given, show=short).split("submitted job ")[1].split(":")[0]
    log, rows = log_of(run_dir, job), []
    for number in range(tries):
        from_step = read_run(run_dir)["attempts"][-1]["to_step"] if number else 0

        def under_way(number: int = number, from_step: int = from_step) -> bool:
            attempts = read_run(run_dir).get("attempts", [])
            logged = [row.step for row in read_rows(run_dir / "metrics.csv")] if attempts else []
            return len(attempts) == number + 1 and max(logged, default=0) > from_step + 3

        wait_until(under_way, 180, lambda: log.read_text() + cluster.logs())
        if number == 0:
            spoken.disttrain("jobs", "preempted")
        began = time.time()
        urgent = (
            spoken.run(*URGENT, "--wrap=sleep 1") if number == 0 else cluster.run([*URGENT, "--wrap=sleep 1"]).stdout
        )
        wait_until(lambda: read_run(run_dir)["status"] == "preempted", 60, lambda: log.read_text() + cluster.logs())
        record = read_run(run_dir)
        last = record["attempts"][-1]
        if number == 0:
            wait_until(lambda: cluster.job(job).state == "PENDING", 60, cluster.logs)
            spoken.disttrain("jobs", "preempted")
        cluster.wait_done(urgent.strip())
        saved = committed(run_dir / "checkpoints")[0][-1].global_step
        rows.append(
            {
                "stopped_at": last["to_step"],
                "saved_at": saved,
                "seconds_to_stop": last["ended"] - began,
                "why": last["stop_reason"],
            }
        )
        print(rows[-1], flush=True)
    cluster.wait_done(job, timeout=300, log=log)
    record = read_run(run_dir)
    attempts = record["attempts"]
    asked = [event["step"] for event in record["events"] if event["kind"] == "requeue"]
    assert asked == [row["stopped_at"] for row in rows], f"requeued at {asked}, not at {rows}"
    for row, following in zip(rows, attempts[1:], strict=True):
        row["resumed_at"] = following["from_step"]
    spoken.run("grep", "-v", "socket.cpp", str(log), show=f"cat preempted/submit/{job}.log")
    spoken.disttrain("jobs", "preempted")
    text = "\n".join(spoken.lines).replace(f"{folder}/", "")
    (OUT / "slurm.txt").write_text(text.strip() + "\n")
    write_report([run_dir])
    shutil.copy(run_dir / "report" / "loss.png", OUT / "slurm.png")
    same = not differing(final_weights(folder / "whole"), final_weights(run_dir))
    ledgers = read_ledger(folder / "whole" / "ledger") == read_ledger(run_dir / "ledger")
    return {"steps": steps, "attempts": len(attempts), "same_bits": same, "same_samples": ledgers, "preemptions": rows}


def timed(cluster: Cluster, folder: Path, data: Path, *, repeats: int) -> list[dict[str, Any]]:
    """Seconds from the command to the end of step 1, and where they go; the styles in turn."""
    rows = []
    for repeat in range(repeats):
        for style in ("srun", "torchrun"):
            run_dir = folder / f"timed-{style}-{repeat}"
            options = ("--nodes", "2", "--tasks-per-node", "1", "--style", style)
            began = time.time()
            said = cluster.disttrain(
                "submit", *arguments(run_dir, data, *options, more={"trainer.max_steps": "22"})
            ).stdout
            submitted = time.time()
            job = said.split("submitted job ")[1].split(":")[0]
            cluster.wait_done(job, log=log_of(run_dir, job))
            first = next(row.time_seconds for row in read_rows(run_dir / "metrics.csv") if row.step >= 1)
            assert first is not None
            attempt = read_run(run_dir)["attempts"][0]
            rows.append(
                {
                    "style": style,
                    "submit": submitted - began,
                    "until_training": attempt["started"] - submitted,
                    "first_step": first - attempt["started"],
                    "total": first - began,
                    "load": os.getloadavg()[0],
                }
            )
            print(rows[-1], flush=True)
    return rows


def page(result: dict[str, Any]) -> str:
    """The figures as a page."""
    rows = result["timed"]
    loads = [row["load"] for row in rows]
    lines = [
        "# On a real SLURM",
        "",
        f"SLURM 22.05, four slurmd on one machine of {result['cores']} cores (load"
        f" {min(loads):.0f} to {max(loads):.0f} at the end of a job, its own included); `python -m benchmarks.slurm`.",
        "",
        "## From `disttrain submit` to the end of step 1",
        "",
        f"2 nodes x 1 rank, digits; medians of {len(rows) // 2} submissions of each style in turn, least and greatest;"
        " seconds. Imports of PyTorch are most of the first two columns. The queue was empty.",
        "",
        "| style | `submit` itself | until training starts | step 1 | in all |",
        "|-|-|-|-|-|",
    ]
    for style in ("srun", "torchrun"):
        cells = []
        for name in ("submit", "until_training", "first_step", "total"):
            values = [row[name] for row in rows if row["style"] == style]
            cells.append(f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        lines.append(f"| {style} | {' | '.join(cells)} |")
    tries = result["preemptions"]
    same = "same bits of all weights, same samples in every step" if result["same_bits"] else "OTHER WEIGHTS"
    lines += [
        "",
        f"## One run, preempted {len(tries)} times",
        "",
        f"2 nodes x 1 rank, rank 1 half a second late in every step, {result['steps']} steps; a job of a higher"
        f" priority takes all nodes again and again. {result['attempts']} attempts of one job; no hang; against a run"
        f" that nothing stopped: {same if result['same_samples'] else 'OTHER SAMPLES'}.",
        "",
        "| preemption | seconds to the stop, saved | stopped and saved at step | resumed at step | cause |",
        "|-|-|-|-|-|",
    ]
    for number, row in enumerate(tries, 1):
        saved = row["stopped_at"] if row["stopped_at"] == row["saved_at"] else f"{row['stopped_at']}, {row['saved_at']}"
        lines.append(f"| {number} | {row['seconds_to_stop']:.1f} | {saved} | {row['resumed_at']} | {row['why']} |")
    lines += ["", "![loss](slurm.png)", "", "Submit, preempt, requeue, finish: [the transcript](slurm.txt).", ""]
    return "\n".join(lines)


def main() -> None:
    """Run both parts and write the figures."""
    parser = argparse.ArgumentParser(description="Preemptions and start times on a real SLURM.")
    parser.add_argument("--tries", type=int, default=10, help="preemptions of the run")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3, help="timed submissions of each style")
    given = parser.parse_args()
    assert not missing(), missing()
    cluster = Cluster()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            assert shards.main(["pack", "sklearn:digits", str(folder / "digits"), "--shards", "4"]) == 0
            cluster.start()
            found = {"machine": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
            result: dict[str, Any] = {
                **found,
                "timed": timed(cluster, folder, folder / "digits", repeats=given.repeats),
            }
            result |= preempted(cluster, folder, folder / "digits", tries=given.tries, steps=given.steps)
    finally:
        cluster.stop()
    for style in ("srun", "torchrun"):
        totals = [row["total"] for row in result["timed"] if row["style"] == style]
        print(
            f"{style}: {statistics.median(totals):.1f} s from submit to step 1 ({min(totals):.1f} to {max(totals):.1f})"
        )
    (OUT / "slurm.json").write_text(json.dumps(result, indent=2) + "\n")
    (OUT / "slurm.md").write_text(page(result))


if __name__ == "__main__":
    main()
