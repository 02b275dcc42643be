"""Reading: disttrain against webdataset, MosaicML Streaming, litdata, torchdata and grain, on the same content.

Claim: the goals, which stand with what is reached in the first table of ``benchmarks/results/peers.md``.

Method: four data sets, (a) small records, (b) raw JPEGs, (c) the same decoded and resized, (d) token blocks, are
written once in the format of each contender, uncompressed, and lie in the page cache. Each contender reads them
shuffled, through the loader that its documentation recommends and with that loader's own collation: in the main process
(0) and with two workers (2), which are threads in disttrain and processes elsewhere; "2p" is disttrain with two
processes. Where a peer has a documented setting that is much faster than its default here, it has it: litdata decodes
records by whole chunks, grain batches before it reads in threads (16 by default, with 0 workers too). "memmap" is
torchdata over one mapped array: no format for samples, but what there is to gain where all have one size. Images are
decoded and resized by Pillow, as the peers' examples do it (disttrain resizes by torch), and in those that do best also
by simplejpeg and torch, the same for all.

A repeat runs every contender once, in a process of its own; the order rotates. After its imports a process measures
the time to the first batch (index, order, workers), warms up, and times batches over as many epochs as it takes.
Then it opens the loader again at the middle of the epoch, by the contender's own state (webdataset has none and reads
on to there) and times the first batch. The first repeat also checks that a whole epoch delivers every sample, and each
process checks the content of a batch. Memory is the peak of anonymous and shared memory of the process and its
workers, above what the imports take; the page cache is left out. Figures are medians over the repeats.

How to read it: ratios within one run mean more than rates. The consumer does nothing, so what a loader could do while a
model computes does not show. A contender that is not installed, fails or takes too long is left out, with a note.

Needs about 5 GB in ``--data`` and as much memory for the page cache; takes about 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .cases import cases
from .contender import FORMATS, MODULES, Contender, open_contender
from .report import chart, machine, page

ROOT: Final = Path(__file__).parents[2]
TIMEOUT_SECONDS: Final = 120
WRITE_TIMEOUT_SECONDS: Final = 300


@dataclass(frozen=True)
class Run:
    """One process: what it measures."""

    contender: str
    letter: str
    mode: str
    backend: str


class Runner:
    """Starts the processes, one at a time, and collects what they find.

    Args:
        folder: where the data sets lie.
        scratch: where answers and positions go.
        quick: small data sets.
    """

    def __init__(self, folder: Path, scratch: Path, quick: bool) -> None:
        self.folder, self.scratch, self.quick = folder, scratch, quick

    def ask(self, task: str, run: Run, *, data: Path, repeat: int = 0) -> dict[str, Any]:
        """Run a process to its end; whatever it has started ends with it."""
        answer = self.scratch / "answer.json"
        answer.unlink(missing_ok=True)
        position = self.scratch / f"{run.contender}-{run.letter}-{run.mode}-{run.backend}.state"
        job = {
            "task": task,
            "contender": run.contender,
            "letter": run.letter,
            "mode": run.mode,
            "backend": run.backend,
            "quick": self.quick,
            "repeat": repeat,
            "data": str(data),
            "answer": str(answer),
            "position": str(position),
        }
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.child", json.dumps(job)]
        environment = {
            **os.environ,
            "LITDATA_DISABLE_VERSION_CHECK": "1",  # it would ask the network at each start
            "TMPDIR": tempfile.mkdtemp(dir=self.scratch),  # Streaming's locks there make the next start slower
        }
        with (self.scratch / "log.txt").open("a+") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                process.wait(WRITE_TIMEOUT_SECONDS if task == "write" else TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                return {"error": "took too long"}
            finally:
                end_group(process)
        if not answer.exists():
            return {"error": f"ended with {process.returncode} and no answer"}
        found: dict[str, Any] = json.loads(answer.read_text())
        return found

    def data_of(self, contender: str, letter: str) -> Path:
        return self.folder / contender / f"{letter}-{cases(quick=self.quick)[letter].num_samples}"

    def write(self, contender: str, letter: str) -> str:
        """Write a data set unless it is there; the error where it cannot be written."""
        target = self.data_of(contender, letter)
        if target.exists():
            return ""
        partial = target.with_name(f"{target.name}.part")
        subprocess.run(["rm", "-rf", str(partial)], check=True)
        started = time.perf_counter()
        error = self.ask("write", Run(contender, letter, "0", "pillow"), data=partial).get("error", "")
        if not error:
            partial.rename(target)
            print(f"wrote {contender} {letter} in {time.perf_counter() - started:.0f} s", flush=True)
        return str(error)

    def warm(self, letter: str) -> None:
        """Read a data set of all contenders once, so that it lies in the page cache."""
        folders = [str(path) for name in FORMATS if (path := self.data_of(name, letter)).exists()]
        command = ["find", *folders, "-type", "f", "-exec", "cat", "{}", "+"]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started; those that clean up after one that has ended get a second to do so."""
    until = time.perf_counter() + 1
    with suppress(ProcessLookupError):
        while process.poll() is not None and time.perf_counter() < until:
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def installed() -> tuple[dict[str, type[Contender]], dict[str, str]]:
    """The contenders whose libraries are there, and why the others are left out."""
    found, missing = {}, {}
    for name in MODULES:
        try:
            if name != "limits":
                found[name] = open_contender(name)
        except Exception as error:  # a library that does not fit the others may raise anything when it is imported
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def runs_of(letter: str, contenders: dict[str, type[Contender]]) -> list[Run]:
    """Everything that a repeat runs over one data set."""
    is_image = cases(quick=True)[letter].kind == "image"
    runs = [Run("limits", letter, "0", "pillow")]
    for name, contender in contenders.items():
        if letter in contender.letters:
            backends = contender.backends if is_image else ("pillow",)
            runs += [Run(name, letter, mode, backend) for backend in backends for mode in contender.modes]
    return runs


def measure(runner: Runner, contenders: dict[str, type[Contender]], letters: str, repeats: int) -> list[dict[str, Any]]:
    """What every process found, in the order in which they ran."""
    broken: dict[tuple[str, str], str] = {}
    for letter in letters:
        for name in FORMATS:
            # disttrain's tars are for the limits too.
            if name == "disttrain" or (name in contenders and letter in contenders[name].letters):
                broken[name, letter] = runner.write(name, letter)
        runner.warm(letter)
    results, failed = [], set()
    for repeat in range(repeats):
        for letter in letters:
            runs = runs_of(letter, contenders)
            shift = repeat * len(runs) // repeats
            for run in runs[shift:] + runs[:shift]:
                source = "disttrain" if run.contender == "limits" else contenders[run.contender].data or run.contender
                if run in failed:
                    continue
                error = broken.get((source, letter), "")
                data = runner.data_of(source, letter)
                found = {"error": error} if error else runner.ask("measure", run, data=data, repeat=repeat)
                if "error" in found:
                    failed.add(run)
                results.append({**vars(run), "repeat": repeat, **found})
                said = found.get("error") or (f"{found['rate']:,.0f} samples/s" if "rate" in found else "")
                print(f"{repeat + 1}/{repeats} {letter} {run.contender} {run.mode} {run.backend}: {said}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="a,b,c,d", help="the data sets, by letter")
    parser.add_argument("--contenders", default="", help="some of the contenders, by name (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="times that everything is measured")
    parser.add_argument("--quick", action="store_true", help="small data sets, for a first look")
    parser.add_argument("--data", type=Path, help="folder to keep the data sets in (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that what runs is ended too
    letters = options.only.replace(",", "")
    contenders, missing = installed()
    if options.contenders:
        contenders = {name: contenders[name] for name in options.contenders.split(",") if name in contenders}
    for name, why in missing.items():
        print(f"left out: {name} ({why})", flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        runner = Runner(options.data or scratch / "data", scratch, options.quick)
        results = measure(runner, contenders, letters, options.repeats)
    minutes = (time.perf_counter() - started) / 60
    given = [f"--only {options.only}" * (letters != "abcd"), "--quick" * options.quick, f"--repeats {options.repeats}"]
    facts = {
        "command": " ".join(["python -m benchmarks.peers", *filter(None, given)]),
        "machine": machine([package for contender in contenders.values() for package in contender.packages]),
        "minutes": round(minutes, 1),
        "quick": options.quick,
        "missing": missing,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "peers.json").write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    (options.out / "peers.md").write_text(page(facts, results))
    chart(facts, results).savefig(options.out / "peers.png", dpi=110)
    print(f"{minutes:.1f} minutes; see {options.out / 'peers.md'}", flush=True)


if __name__ == "__main__":
    main()
