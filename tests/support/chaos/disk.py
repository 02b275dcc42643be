"""Disks that fill up, folders that turn read-only, and files that are damaged."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

BALLAST: Final = "ballast"


@contextmanager
def small_disk(folder: Path, *, megabytes: int = 4) -> Iterator[None]:
    """Have a folder on a file system of its own, in memory, inside."""
    folder.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))
    try:
        yield
    finally:
        make_sound(folder)
        _run("umount", "--lazy", str(folder))


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


def fill(folder: Path) -> Path:
    """Leave no byte of a folder's file system; returns the file that takes them."""
    path = folder / BALLAST
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            while True:
                try:
                    file.write(bytes(size))
                except OSError:
                    break
    return path


def make_read_only(folder: Path) -> None:
    """A folder's files can be read only, by root too; those that are open already are not concerned."""
    _run("mount", "--bind", str(folder), str(folder))
    _run("mount", "-o", "remount,bind,ro", str(folder))


def make_sound(folder: Path) -> None:
    """Undo what :func:`fill` and :func:`make_read_only` did to a small disk."""
    while _mounts(folder) > 1:
        _run("umount", "--lazy", str(folder))
    (folder / BALLAST).unlink(missing_ok=True)


def truncate(path: Path) -> None:
    """Cut off the end of a file."""
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path: Path, bit: int) -> None:
    """Turn one bit over."""
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def _mounts(folder: Path) -> int:
    return [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()].count(str(folder))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
