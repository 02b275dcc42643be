"""Checksums of a checkpoint's files: made while they are written, compared when they are read.

CRC-32, as zlib computes it without holding Python's lock: about 2 GB/s on one core. It finds every flipped bit,
every burst of up to 32 bits and any other damage but for one in four billion; it is no protection against
somebody who wants to deceive. What is written is summed on its way to the file, so that a file system that
returns something else later is found out.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from disttrain.beats import beat

KIND: Final = "crc32"
_CHUNK_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class Sum:
    """What a file held when it was written.

    Attributes:
        num_bytes: its size.
        crc32: its checksum in eight hexadecimal digits; empty where none was recorded.
    """

    num_bytes: int
    crc32: str = ""


def sum_of(path: Path) -> Sum:
    """Read a file and sum it up.

    Raises:
        OSError: it cannot be read.
    """
    crc, size = 0, 0
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while count := file.readinto(buffer):
            crc, size = zlib.crc32(buffer[:count], crc), size + count
            beat()
    return Sum(size, f"{crc:08x}")


@dataclass
class Sums:
    """The files that this process writes for one checkpoint.

    Attributes:
        files: by name, once they are closed.
        error: the first error that writing met; libraries in between report it as something else.
    """

    files: dict[str, Sum] = field(default_factory=dict)
    error: OSError | None = None

    @contextmanager
    def summed(self, path: Path, *, name: str | None = None) -> Iterator[SummedFile]:
        """Open a file for writing; it is known by its own name or by a given one."""
        try:
            with open(path, "wb") as file:
                stream = SummedFile(file, self)
                yield stream
                file.flush()
        except OSError as error:
            self.error = self.error or error
            raise
        self.files[name or path.name] = Sum(stream.num_bytes, f"{stream.crc:08x}")


class SummedFile(io.RawIOBase):
    """A file to write to, from the first byte to the last, that sums what goes through."""

    def __init__(self, file: io.BufferedWriter, sums: Sums) -> None:
        super().__init__()
        self._file, self._sums = file, sums
        self.crc = 0
        self.num_bytes = 0

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any, /) -> int:
        """Write all of it."""
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self._sums.error = self._sums.error or error
            raise
        self.crc = zlib.crc32(view, self.crc)
        self.num_bytes += view.nbytes
        beat()
        return view.nbytes

    def tell(self) -> int:
        """Bytes written."""
        return self.num_bytes

    def flush(self) -> None:
        """Hand everything to the system."""
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        """The open file's, for fsync; what was written is handed to the system first."""
        self._file.flush()
        return self._file.fileno()

    def sync(self) -> None:
        """Have the system write everything to the disk."""
        os.fsync(self.fileno())
