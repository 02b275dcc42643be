"""A closed, full or broken standard output ends no training, and no command with a traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from disttrain.system import output
from disttrain.system.reading import read_run
from tests.support.ranks import run_ranks


class Broken(io.StringIO):
    """A stream that fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error: Exception | None = error

    def write(self, text: str) -> int:
        """Fail while there is an error."""
        if self.error is not None:
            raise self.error
        return super().write(text)


def test_what_cannot_be_printed_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_dropped", {})
    stream = Broken(OSError(28, "No space left on device"))
    monkeypatch.setattr(sys, "stdout", stream)
    with output.lossy_output("stdout"):
        print("lost")
        stream.error = None
        print("kept")
        stream.error = ValueError("I/O operation on closed file")
        print("lost")
        stream.error = None
    assert stream.getvalue() == "kept\n"
    assert output.dropped_output()["stdout"]["error"] == "No space left on device"
    assert sys.stdout is stream, "the stream was not given back"
    monkeypatch.setattr(sys, "stdout", narrow := io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    with output.lossy_output("stdout"):
        print("größer")
    assert narrow.buffer.getvalue() == b"gr\\xf6\\xdfer\n"  # type: ignore[attr-defined]


@contextmanager
def at(number: int, target: str) -> Iterator[None]:
    """Standard output or error somewhere else, or closed."""
    kept = os.dup(number)
    if target == "closed":
        os.close(number)
    else:
        if target == "pipe":
            near, far = os.pipe()
            os.close(near)
        else:
            far = os.open(target, os.O_WRONLY)
        os.dup2(far, number)
        os.close(far)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)


def stream_of(number: int) -> io.TextIOWrapper | None:
    """A stream as Python makes it at its start: none for a descriptor that is closed."""
    try:
        return io.TextIOWrapper(io.FileIO(number, "w", closefd=False))
    except OSError:
        return None


def train_all_the_same(folder: Path, data: Path) -> None:
    from disttrain.cli import main

    for target in ("pipe", "/dev/full", "closed"):
        for numbers in ((1,), (1, 2)):
            run_dir = folder / f"{target.rpartition('/')[2]}{len(numbers)}"
            with at(1, target), at(2, target if len(numbers) == 2 else "/dev/null"):
                # Streams of their own, buffered as those of a process whose output is no terminal.
                streams = [stream_of(number) for number in (1, 2)]
                former = sys.stdout, sys.stderr
                sys.stdout, sys.stderr = streams  # type: ignore[assignment]
                output._dropped.clear()
                try:
                    code = main(
                        [
                            *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
                            *(f"--data.{split}={data}/{split}.json" for split in ("train", "val", "test")),
                            *("--trainer.max_steps", "4", "--model.schedule.name", "constant"),
                            *("--trainer.validate_every_steps", "2"),
                        ]
                    )
                finally:
                    sys.stdout, sys.stderr = former
            record = read_run(run_dir)
            assert (code, record["status"]) == (0, "completed"), (target, code, record.get("status"))
            told = {"pipe": "Broken pipe", "/dev/full": "No space left on device"}
            if target in told:  # what is closed is replaced by the null device, before anything is printed
                assert record["dropped_output"]["stdout"]["error"] == told[target], record["dropped_output"]
                assert record["dropped_output"]["stdout"]["writes"] >= 1


@pytest.mark.slow
def test_a_training_goes_on_whatever_becomes_of_its_output(digits: Path, tmp_path: Path) -> None:
    run_ranks(1, train_all_the_same, tmp_path, digits, folder=tmp_path / "logs", timeout=300).ok()


@pytest.mark.parametrize(
    "words",
    [
        ["shards", "ls"],
        pytest.param(["shards", "verify"], marks=pytest.mark.slow),
        ["checkpoints", "ls"],
        ["jobs"],
        ["--help"],
    ],
)
def test_other_commands_end_without_a_traceback(digits: Path, tmp_path: Path, words: list[str]) -> None:
    """A reader that has gone is no error; a full disk is an error, told on standard error."""
    place = {"shards": [f"{digits}/train.json"], "checkpoints": [str(tmp_path)], "jobs": [str(tmp_path)]}
    command = [sys.executable, "-m", "disttrain", *words, *place.get(words[0], [])]
    near, far = os.pipe()
    os.close(near)
    for target, code in ((far, 0), (os.open("/dev/full", os.O_WRONLY), 2)):
        done = subprocess.run(command, stdout=target, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
        os.close(target)
        assert "Traceback" not in done.stderr, done.stderr
        assert "Exception ignored" not in done.stderr, done.stderr
        assert done.returncode == code, (done.returncode, done.stderr)
    assert "disttrain: error" in done.stderr, done.stderr
    whole = " ".join(f"'{word}'" for word in command)
    for closing in (">&-", ">/dev/full 2>&1", ">&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f"{whole} {closing}"], stderr=subprocess.PIPE, text=True, check=False, timeout=120
        )
        assert "Traceback" not in done.stderr, done.stderr
