"""One contender over one data set, measured in a process of its own: ``python -m benchmarks.peers.child JOB``.

``JOB`` is the JSON that :mod:`benchmarks.peers.__main__` writes; the answer goes into the file that it names. The first
repeat also sees to it that an epoch holds what it should, measures memory and leaves the position in the middle
of the epoch, from which every repeat resumes.
"""

from __future__ import annotations

import cProfile
import json
import os
import pickle
import pstats
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from .cases import Case, cases
from .contender import Contender, check, open_contender
from .memory import held

WARM_SECONDS = 0.3
TIMED_SECONDS = 0.8


def stream(contender: Contender) -> Iterator[Any]:
    """The batches of one epoch after another."""
    while True:
        yield from contender


def numbers_of(contender: Contender, batch: Any) -> list[int]:
    return np.asarray(contender.unpack(batch)[1]).tolist()  # type: ignore[no-any-return]


def short(name: tuple[str, int, str]) -> str:
    """A function as the profiler names it, in brief."""
    file, line, function = name
    if line:
        return f"{Path(file).name}:{function}"
    built_in = re.fullmatch(r"<(?:built-in )?method '?([^' ]+)'?(?: of '(.+)' objects)?>", function)
    return f"{built_in[2]}.{built_in[1]}" if built_in and built_in[2] else built_in[1] if built_in else function


class Measurement:
    """A contender on its way through its measures.

    Args:
        job: what to measure.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.case: Case = cases(quick=job["quick"])[job["letter"]]
        self.type = open_contender(job["contender"])
        self.mode, self.backend, self.is_first = job["mode"], job["backend"], job["repeat"] == 0
        self.folder, self.position = Path(job["data"]), Path(job["position"])
        self.seconds = TIMED_SECONDS / (2 if job["quick"] else 1)
        self.found: dict[str, Any] = {}

    def open(self, state: Any = None) -> Contender:
        return self.type(self.case, self.folder, self.mode, self.backend, state)

    def run(self) -> dict[str, Any]:
        self.type.clean()
        before = held(os.getpid())
        started = time.perf_counter()
        contender = self.open()
        epoch = iter(contender)
        batch = next(epoch)
        self.found["first_seconds"] = time.perf_counter() - started
        check(self.case, *contender.unpack(batch))
        if self.is_first:
            self.verify(contender, epoch, batch)
        batches = chain(epoch, stream(contender))
        if self.is_first:
            self.memory(batches, before)
        self.rate(contender, batches)
        if self.is_first and self.type.name == "disttrain" and self.mode == "0":
            self.profile(batches)
        del epoch, batches, batch
        contender.close()
        del contender
        self.resume()
        return self.found

    def verify(self, contender: Contender, epoch: Iterator[Any], batch: Any) -> None:
        """Read the rest of the epoch, and note what was delivered and the position in its middle."""
        seen, at, state = numbers_of(contender, batch), 0, None
        for number, following in enumerate(epoch, start=2):
            seen += numbers_of(contender, following)
            if number == self.case.batches // 2:
                at, state = len(seen), contender.state()
        self.position.write_bytes(pickle.dumps((state, seen[:at], seen[at:])))
        self.found["delivered"], self.found["distinct"] = len(seen), len(set(seen))
        if len(set(seen)) < self.case.batches * self.case.batch:
            raise RuntimeError(f"{len(set(seen))} of {self.case.num_samples} samples in an epoch")

    def memory(self, batches: Iterator[Any], before: int) -> None:
        command = [sys.executable, "-S", str(Path(__file__).with_name("memory.py")), str(os.getpid())]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sampler:
            assert sampler.stdin is not None
            assert sampler.stdout is not None
            sampler.stdout.readline()
            self.consume(batches, self.seconds)
            sampler.stdin.close()
            self.found["memory_bytes"] = int(sampler.stdout.readline()) - before

    def rate(self, contender: Contender, batches: Iterator[Any]) -> None:
        self.consume(islice(batches, 0 if self.is_first else self.type.ahead), 0)
        self.consume(batches, WARM_SECONDS)
        started = time.perf_counter()
        samples = 0
        for number, batch in enumerate(batches, start=1):
            samples += len(contender.unpack(batch)[0])
            if number >= self.case.timed_batches and time.perf_counter() > started + self.seconds:
                break
        self.found["rate"] = samples / (time.perf_counter() - started)

    def consume(self, batches: Iterator[Any], seconds: float) -> None:
        """Take batches for that long, or until they end."""
        until = time.perf_counter() + seconds
        for _ in batches:
            if seconds and time.perf_counter() > until:
                return

    def profile(self, batches: Iterator[Any]) -> None:
        """The functions in which most of an epoch is spent, and their shares of it."""
        profiler = cProfile.Profile()
        profiler.enable()
        self.consume(islice(batches, self.case.batches), 0)
        profiler.disable()
        spent = {name: values[2] for name, values in pstats.Stats(profiler).stats.items()}  # type: ignore[attr-defined]
        most = sorted(spent, key=lambda name: spent[name], reverse=True)[:8]
        self.found["profile"] = [(short(name), spent[name] / sum(spent.values())) for name in most]

    def resume(self) -> None:
        """From nothing to the batch in the middle of the epoch."""
        state, before, after = pickle.loads(self.position.read_bytes())
        started = time.perf_counter()
        contender = self.open(state)
        batches = stream(contender)
        if self.type.skips:
            self.consume(islice(batches, self.case.batches // 2), 0)
        batch = next(batches)
        self.found["resume_seconds"] = time.perf_counter() - started
        numbers = numbers_of(contender, batch)
        del batches, batch
        if not self.type.skips:
            self.found["resumed_exactly"] = numbers == after[: len(numbers)]
            self.found["repeated"] = len(set(numbers) & set(before))
        contender.close()


def main() -> None:
    job = json.loads(sys.argv[1])
    answer = Path(job["answer"])
    case = cases(quick=job["quick"])[job["letter"]]
    try:
        if job["task"] == "write":
            Path(job["data"]).mkdir(parents=True)
            open_contender(job["contender"]).write(case, Path(job["data"]))
            found: dict[str, Any] = {}
        elif job["contender"] == "limits":
            from .limits import measure

            found = {"limits": measure(case, Path(job["data"]), TIMED_SECONDS / 2)}
        else:
            found = Measurement(job).run()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    answer.with_suffix(".part").write_text(json.dumps(found))
    answer.with_suffix(".part").rename(answer)
    sys.stdout.flush()
    os._exit(0)  # some libraries take their time to leave, or fail at it; the parent ends their workers


if __name__ == "__main__":
    main()
