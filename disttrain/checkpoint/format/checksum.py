"""Checksums of checkpoint files: computed while writing, compared when reading.

CRC-32 via zlib, which releases the GIL: about 2 GB/s on one core. It detects every single-bit flip, every burst of
up to 32 bits, and all but one in four billion other errors. It does not protect against deliberate tampering. Data is
summed on its way to the file, so a file system that later returns different bytes is caught.
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

from disttrain.system.heartbeat import beat

KIND: Final = "crc32"
_CHUNK_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class Sum:
    """Size and checksum of a file as written.

    Attributes:
        num_bytes: file size.
        crc32: checksum as eight hexadecimal digits; empty if none was recorded.
    """

    num_bytes: int
    crc32: str = ""


def sum_of(path: Path) -> Sum:
    """Read a file and return its size and checksum.

    Raises:
        OSError: the file cannot be read.
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
    """Checksums of the files that this process writes for one checkpoint.

    Attributes:
        files: closed files by name.
        error: the first write error; libraries in between may report it as something else.
    """

    files: dict[str, Sum] = field(default_factory=dict)
    error: OSError | None = None

    @contextmanager
    def summed(self, path: Path, *, name: str | None = None) -> Iterator[SummedFile]:
        """Open a file for writing, and record its checksum under ``name`` (default: the file's name)."""
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
    """A write-only file, written sequentially, that checksums the data passing through it."""

    def __init__(self, file: io.BufferedWriter, sums: Sums) -> None:
        super().__init__()
        self._file, self._sums = file, sums
        self.crc = 0
        self.num_bytes = 0

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any, /) -> int:
        """Write all of ``data``."""
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
        """Return the number of bytes written."""
        return self.num_bytes

    def flush(self) -> None:
        """Flush buffered data to the OS."""
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        """Flush, then return the file descriptor (for ``fsync``)."""
        self._file.flush()
        return self._file.fileno()

    def sync(self) -> None:
        """Flush and fsync the file."""
        os.fsync(self.fileno())
