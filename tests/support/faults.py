"""Bad inputs and what they print: a folder to spoil, a command to run in it, and the page that holds the answers."""

from __future__ import annotations

import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np

from disttrain import cli
from disttrain.data.remote import requests
from disttrain.data.remote.ranges import RetryConfig
from tests.support.ranks import run_ranks
from tests.support.servers import RangeServer, range_server
from tests.support.shards import npy

CONFIG = """\
model:
  class_path: recipes.digits.DigitsTask
  init_args: {widths: [8], schedule: {name: constant}}
data:
  train: data/train-{000..001}.tar
  val: data/val-000.tar
  fields: {image: image.npy, label: cls}
  global_batch_size: 8
  micro_batch_size: 8
trainer: {run_dir: run, max_steps: 4}
early_stopping: {monitor: null}
"""
Fields = Mapping[str, bytes]
SMALL_DISK = "DISTTRAIN_TEST_SMALL_DISK"
"""Names a folder in whose place the command finds a full disk."""
READ_ONLY = "DISTTRAIN_TEST_READ_ONLY"
"""Whether that can only be read."""


@dataclass
class Scene:
    """A folder of sound data to spoil: two training shards of 16 samples and one for validation of 8."""

    folder: Path
    stack: ExitStack
    environment: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    """What differs from run to run, and what the page shows instead."""

    def __post_init__(self) -> None:
        (self.folder / "data").mkdir()
        (self.folder / "run.yaml").write_text(CONFIG)
        self.write_all()

    def path(self, name: str) -> Path:
        """A file in the folder of data."""
        return self.folder / "data" / name

    def write(self, name: str, num_samples: int, extra: Fields, bad: Mapping[int, Fields | None]) -> None:
        """A shard of small images; some samples get other fields, or lose the fields that are ``None``."""
        with tarfile.open(self.path(name), "w") as tar:
            for number in range(num_samples):
                image = npy(np.full((1, 8, 8), number, dtype=np.uint8))
                fields = {"image.npy": image, "cls": str(number % 10).encode(), **extra, **(bad.get(number) or {})}
                for extension, content in fields.items():
                    info = tarfile.TarInfo(f"{name.partition('.')[0]}/{number:02}.{extension}")
                    info.size = len(content)
                    if content != b"none":
                        tar.addfile(info, io.BytesIO(content))

    def write_all(self, extra: Fields | None = None, bad: Fields | None = None) -> None:
        """All shards anew, with more fields; sample 5 of the second one has other ones."""
        self.write("train-000.tar", 16, extra or {}, {})
        self.write("train-001.tar", 16, extra or {}, {5: bad or {}})
        self.write("val-000.tar", 8, extra or {}, {})

    def serve(self) -> RangeServer:
        """The data behind a web server."""
        server = self.stack.enter_context(range_server(self.folder / "data"))
        self.show(server.url, "http://127.0.0.1:8000")
        return server

    def show(self, what: str, instead: str) -> None:
        """Have the page show a fixed text in place of one that differs from run to run."""
        self.hidden[what] = instead

    def run(self, *arguments: str) -> None:
        """A command that the case needs done before, and that succeeds."""
        code, text = run(self, [*arguments, "--report=false"] if arguments[0] == "fit" else arguments)
        assert code == 0, text


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        what: what is wrong, in words.
        arguments: of the command, with the addresses that the page shows.
        prepare: spoils the folder.
        code: the exit code that is due.
        needs: whether it can be run here.
        slow: whether only slow runs of the tests run it.
    """

    what: str
    arguments: str
    prepare: Callable[[Scene], object] = lambda scene: None
    code: int = 2
    needs: bool = True
    slow: bool = False

    def block(self, text: str) -> str:
        """Its part of the page."""
        code = "" if self.code == 2 else f" Exit code {self.code}."
        return f"**{self.what}**{code}\n\n```console\n$ disttrain {self.arguments}\n{text}\n```\n"


@contextmanager
def scene() -> Iterator[Scene]:
    """A folder of sound data, gone afterwards, and with it all servers."""
    folder = Path(tempfile.mkdtemp(prefix="disttrain-faults-"))
    try:
        with ExitStack() as stack:
            yield Scene(folder, stack)
    finally:
        shutil.rmtree(folder)


def printed(case: Case) -> tuple[int, str]:
    """Exit code and output of a case."""
    with scene() as made:
        case.prepare(made)
        return run(made, shlex.split(case.arguments))


def run(made: Scene, arguments: Sequence[str]) -> tuple[int, str]:
    """Run a command in a scene; gives its exit code and what it printed, with what differs hidden."""
    here = {instead: what for what, instead in made.hidden.items()}
    words = list(arguments)
    for instead, what in here.items():
        words = [word.replace(instead, what) for word in words]
    environment = {"DISTTRAIN_CACHE": "cache", "COLUMNS": "120", **made.environment}
    if words[0] in ("shards", "checkpoints"):
        code, text = _in_process(made.folder, words, environment)
    else:
        ended = run_ranks(1, _child, str(made.folder), words, environment, folder=made.folder / "logs")
        code, text = ended.codes[0] or 0, ended.text.partition("\n")[2]
    begin = text.find("disttrain: error")
    text = text[max(0, begin) :].strip()
    for what, instead in {**made.hidden, f"{made.folder}/": "", str(made.folder): "."}.items():
        text = text.replace(what, instead)
    for pattern, instead in _DIFFERS:
        text = re.sub(pattern, instead, text)
    return code, text


_DIFFERS = (
    (r"in \d+\.\d s\b", "in N s"),
    (r"\brun (?!f{12})[0-9a-f]{12}\b", "run 244ee6bdc4ab"),
    (r"\.a(\d+)-[0-9a-f]{8}\b", r".a\1-b9f34c9a"),
    # What a checkpoint's files hold is PyTorch's, and its versions'.
    (r"checksum [0-9a-f]{8}, but its marker says [0-9a-f]{8}", "checksum ca9932a4, but its marker says cc5682f1"),
    (r"\([\d,]+ bytes\) has checksum", "(N bytes) has checksum"),
    (r"its marker says \d+", "its marker says N"),
    (r"about [\d,]+ bytes, but only [\d,]+ are free", "about N bytes, but only M are free"),
)
"""What differs from machine to machine, and what the page shows instead."""


def _in_process(folder: Path, words: list[str], environment: dict[str, str]) -> tuple[int, str]:
    out = io.StringIO()
    with (
        chdir(folder),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(RetryConfig, "wait_seconds", _no_wait),
        mock.patch.object(requests, "_FILESYSTEMS", {}),
        redirect_stdout(out),
        redirect_stderr(out),
    ):
        code = cli.main(words)
    return code, out.getvalue()


def _no_wait(self: RetryConfig, failed: int, chance: float) -> float:
    return 0.0


def _child(folder: str, words: list[str], environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ |= environment
    RetryConfig.wait_seconds = _no_wait  # type: ignore[method-assign]
    if SMALL_DISK in environment:
        mount_small_disk(environment[SMALL_DISK], read_only=READ_ONLY in environment)
    sys.exit(cli.main(words))


def can_mount() -> bool:
    """Whether a process may have mounts of its own."""
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "--mount", "true"], capture_output=True).returncode == 0


CLONE_NEWNS = 0x00020000
MS_PRIVATE, MS_REC, MS_RDONLY = 1 << 18, 1 << 14, 1


def mount_small_disk(folder: str, *, read_only: bool = False) -> None:
    """Put a file system of 32 KiB in place of a folder, for this process alone; it is gone when that ends."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "cannot have mounts of its own")
    if libc.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_RDONLY if read_only else 0, b"size=32k"):
        raise OSError(ctypes.get_errno(), "cannot mount a tmpfs")


def blocks(page: str) -> dict[str, str]:
    """The parts of a page by their headings in bold."""
    parts = re.split(r"^(?=\*\*|## )", page, flags=re.MULTILINE)
    return {part[2:].partition("**")[0]: part.rstrip("\n") + "\n" for part in parts if part.startswith("**")}


def page_of(head: str, groups: Mapping[str, Sequence[Case]], texts: Mapping[str, str]) -> str:
    """The page of all cases."""
    parts = [head.rstrip("\n") + "\n"]
    for group, cases in groups.items():
        parts.append(f"## {group}\n")
        parts += [texts[case.what] for case in cases]
    return "\n".join(parts)


def all_cases(groups: Mapping[str, Sequence[Case]]) -> list[Case]:
    """The cases of all groups."""
    return list(itertools.chain.from_iterable(groups.values()))
