"""Hostile input for the command line: wrong commands and damaged files, made from a seed, each run in a fork.

``python -m tests.support.hostile commands|files --seed 1 --number 517`` runs a campaign and prints what went wrong. A
case is a mutation of a sound command, or of a sound file that a sound command reads. Each one runs in a copy of a
small folder, in a process forked from this one with a limit on time and memory. It fails with a traceback, a hang, a
death by a signal or of memory, an exit code or an error message outside of the convention, or a control character
that reaches the terminal.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support import hostile_values
from tests.support.faults import Scene
from tests.support.shards import npy

_MEMORY_BYTES = 12 * 2**30  # of addresses; what torch maps counts too
_CPU_SECONDS = 60
_SECONDS = 400  # of the clock, on a machine that others use
_RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")


@dataclass(frozen=True)
class Case:
    """One command in a folder that was prepared for it."""

    name: str
    argv: tuple[str, ...]
    prepare: Callable[[Path], object] = lambda folder: None


@dataclass(frozen=True)
class Verdict:
    """How a case ended."""

    case: Case
    code: int
    text: str
    seconds: float

    @property
    def fault(self) -> str:
        """What is wrong with that; empty where nothing is."""
        if self.code < 0:
            hung = self.code == -signal.SIGXCPU or self.seconds >= _SECONDS
            return "hung" if hung else f"died of signal {-self.code}"
        if "Traceback (most recent call last)" in self.text or "error: unexpected" in self.text:
            last = [line for line in self.text.splitlines() if line and not line.startswith(" ")]
            return f"traceback: {last[-1][:200] if last else ''}"
        if raw := _RAW.search(self.text):
            return f"prints {raw.group()!r} raw: {self.text[max(0, raw.start() - 60) : raw.end() + 20]!r}"
        if self.code not in (0, 1, 2) or (self.code == 2 and "error" not in self.text):
            return f"exit code {self.code} with {self.text[-200:]!r}"
        if self.code == 1 and self.case.argv[0] not in ("shards", "checkpoints", "parity", "doctor"):
            return f"exit code 1 with {self.text[-200:]!r}"
        if len(self.text) > 50_000:
            return f"prints {len(self.text):,} characters"
        return ""


def command_lines(seed: int, number: int) -> list[Case]:
    """Wrong command lines: a sound one with one or two words replaced, added, doubled or taken away."""
    draw, cases = random.Random(seed), []
    settings = hostile_values.settings()
    while len(cases) < number:
        words = list(draw.choice(hostile_values.COMMANDS if draw.random() < 0.55 else hostile_values.FITS))
        for _ in range(draw.choice((1, 1, 1, 2))):
            value, at = draw.choice(hostile_values.VALUES), draw.randrange(len(words))
            how = draw.random()
            if words[0] in hostile_values.TRAINING and how < 0.75:
                words.append(f"--{draw.choice(settings)}={value}")
            elif how < 0.8:
                at = max(at, 1) if draw.random() < 0.9 else at
                flag, equals, _ = words[at].partition("=") if at < len(words) else ("", "", "")
                words[min(at, len(words) - 1)] = f"{flag}={value}" if equals else value
            elif how < 0.9:
                words.insert(at + 1, value)
            else:
                words = words[:at] + words[at + 1 :] if len(words) > 1 else [value]
        argv = tuple(word.replace("\0", "") for word in words)  # exec knows no other words
        cases.append(Case(f"{len(cases)}: {' '.join(argv)[:150]!r}", argv))
    return cases


def hostile_files(seed: int, number: int) -> list[Case]:
    """Damaged files: each kind of file that disttrain reads, with each kind of damage, read by each command."""
    draw, cases = random.Random(seed), []
    readers = [(file, argv) for file, commands in hostile_values.READERS.items() for argv in commands]
    damages = hostile_values.DAMAGES
    while len(cases) < number:
        file, argv = readers[len(cases) % len(readers)]
        name, damage = draw.choice(damages)
        number_of = draw.random()

        def spoil(
            folder: Path, file: str = file, damage: hostile_values.Damage = damage, at: float = number_of
        ) -> None:
            damage(folder / file, random.Random(at))
            if "/step-" in file and at < 0.7:
                _sign(folder / file)

        cases.append(Case(f"{len(cases)}: {file}, {name}: {' '.join(argv)}", argv, spoil))
    return cases


def _sign(path: Path) -> None:
    """Have a checkpoint's marker fit its files, and itself, as somebody would who means to deceive."""
    from disttrain.checkpoint.format.checksum import sum_of
    from disttrain.checkpoint.format.marker import MARKER, _own_sum

    with suppress(Exception):
        marker = path.parent / MARKER
        if path.name == MARKER and path.is_file() and not path.is_symlink():
            content = json.loads(path.read_text())
            content.pop("crc32")
            path.write_text(json.dumps({**content, "crc32": _own_sum(content)}))
        elif path.is_file() and not path.is_symlink():
            sizes = json.loads(marker.read_text())
            sums = {name: sum_of(path.parent / name) for name in sizes["files"]}
            sizes["files"] = {name: [one.num_bytes, one.crc32] for name, one in sums.items()}
            sizes.pop("crc32")
            marker.write_text(json.dumps({**sizes, "crc32": _own_sum(sizes)}))


def run_cases(
    cases: Sequence[Case], template: Path, *, told: Callable[[Verdict], object] = lambda v: None
) -> list[str]:
    """Run them one after the other; what went wrong, one text a case.

    Args:
        cases: what to run.
        template: a folder as :func:`make_template` leaves it; each case gets a copy.
        told: called with each case's outcome.
    """
    faults = []
    for case in cases:
        verdict = _run(case, template)
        told(verdict)
        if verdict.fault:
            faults.append(f"{case.name}\n    {verdict.fault}")
    return faults


def _run(case: Case, template: Path) -> Verdict:
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        scene = folder / "scene"
        subprocess.run(["cp", "-a", str(template), str(scene)], check=True)
        case.prepare(scene)
        out, start = folder / "out", time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(case.argv, scene, out)
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() - start < _SECONDS:
            time.sleep(0.01)
        if ended[0] == 0:
            os.killpg(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
        text = out.read_bytes().decode("utf-8", "surrogateescape").replace(str(folder), "") if out.exists() else ""
        return Verdict(case, os.waitstatus_to_exitcode(ended[1]), text, time.monotonic() - start)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _child(argv: Sequence[str], scene: Path, out: Path) -> None:
    """Run the command as the interpreter would, and end."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(scene)
        os.environ |= {"HOME": str(scene), "TMPDIR": str(scene), "COLUMNS": "120", "DISTTRAIN_CACHE": str(scene / "c")}
        tempfile.tempdir = None
        sys.stdin.close()
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDONLY) if stream == 0 else descriptor, stream)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from disttrain.cli import main

        code = main(list(argv))
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                code = 120
        os._exit(code)


def make_template(folder: Path) -> Path:
    """A folder with each kind of file that disttrain reads: shards, recipes, a run with its checkpoints, weights."""
    with ExitStack() as stack:
        scene = Scene(folder, stack)
    extra = {"meta.json": b'{"a": [1, 2]}', "txt": b"some text"}
    scene.write_all(extra)
    (folder / "site.yaml").write_text("account: me\nmodules: [cuda]\nenvironment: {A: b}\nsbatch: {nice: 5}\n")
    (folder / "other.yaml").write_text("trainer: {max_steps: 3}\n")
    table = folder / "table.csv"
    table.write_text("a,b,target\n" + "".join(f"{i},{i * 0.5},{i % 2}\n" for i in range(20)))
    for label in ("cat", "dog"):
        (folder / "images" / label).mkdir(parents=True)
    for label in ("fifo", "loop", "dangling"):
        place = folder / label
        os.mkfifo(place) if label == "fifo" else place.symlink_to(label if label == "loop" else "nowhere")
    (folder / "x.npy").write_bytes(npy([1, 2]))
    with tarfile.open(folder / "small.tar", "w") as tar:
        info = tarfile.TarInfo("a.cls")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"3"))
    for argv in hostile_values.MAKES:
        verdict = _run_in(argv, folder)
        assert verdict.code == 0, f"{argv}\n{verdict.text}"
    record = folder / "run/run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "running"}))
    return folder


def _run_in(argv: Sequence[str], folder: Path) -> Verdict:
    out = folder / "out"
    pid = os.fork()
    if pid == 0:
        _child(argv, folder, out)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Verdict(Case("", tuple(argv)), code, out.read_text(errors="replace"), 0)


def preload() -> None:
    """Import what all cases need, so that each fork has it."""
    import torch

    import disttrain.commands.training  # noqa: F401
    import recipes.digits  # noqa: F401

    torch.set_num_threads(1)


def _chosen(options: argparse.Namespace) -> Iterator[Case]:
    made = (command_lines if options.what == "commands" else hostile_files)(options.seed, options.number)
    part, parts = map(int, options.part.split("/"))
    for number, case in enumerate(made):
        if options.only in ("", f"{number}") and number % parts == part:
            yield case


def main() -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("commands", "files"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--only", default="", help="number of one case, whose output is printed")
    parser.add_argument("--part", default="0/1", help="of the cases, such as 1/4, for several at a time")
    options = parser.parse_args()
    preload()

    def tell(verdict: Verdict) -> None:
        if options.only:
            print(verdict.case.argv, verdict.code, f"{verdict.seconds:.1f} s\n{verdict.text}")
        elif verdict.fault:
            print(f"{verdict.case.name}\n    {verdict.fault}", flush=True)

    with tempfile.TemporaryDirectory(prefix="hostile-template-") as folder:
        start = time.monotonic()
        template = make_template(Path(folder))
        cases = list(_chosen(options))
        faults = run_cases(cases, template, told=tell)
    print(f"{options.what}, seed {options.seed}: {len(cases)} cases, {len(faults)} faults", end="")
    print(f" in {time.monotonic() - start:.0f} s")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
