"""Read a shard once, front to back, for several consumers: the header scan, decoders and a hash.

A :class:`Stream` is a :class:`~disttrain.data.index.tar.ByteSource` over another one. It reads large pieces in
sequence, buffers everything from the last requested offset on, and optionally hashes every byte once. Without a hash,
bytes that are never requested are skipped. Memory: a piece, and the largest member requested.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from disttrain.data.index.tar import ByteSource, LocalFile
from disttrain.data.index.tar_header import BLOCK
from disttrain.data.remote.ranges import RemoteFile, is_remote

_PIECE_BYTES: Final = 4 * 2**20


@contextmanager
def opened(place: str) -> Iterator[ByteSource]:
    """Open a shard by path or URL.

    Raises:
        ShardError: it cannot be opened; RemoteError if it is remote.
    """
    if is_remote(place):
        yield RemoteFile(place)
        return
    with LocalFile(place) as file:
        yield file


class Stream:
    """A source for requests in ascending order of offset.

    Args:
        source: the source to read.
        is_hashed: whether :meth:`md5` will be called.
        piece_bytes: bytes to read at once.
    """

    window_bytes = BLOCK  # requests are served from memory, so larger ones gain nothing

    def __init__(self, source: ByteSource, *, is_hashed: bool, piece_bytes: int = _PIECE_BYTES) -> None:
        self._source, self._piece_bytes = source, piece_bytes
        self.name, self.size = source.name, source.size
        self._buffer, self._at = bytearray(), 0
        self._hash = hashlib.md5(usedforsecurity=False) if is_hashed else None

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset; offsets before the last request are read from the source again."""
        if offset < self._at:
            return self._source.read(offset, length)
        stop = min(offset + length, self.size)
        self._forget(offset)
        while self._at + len(self._buffer) < stop and self._advance(offset):
            pass
        return bytes(self._buffer[offset - self._at : stop - self._at])

    def md5(self) -> str:
        """Return the hash of all bytes, hexadecimal; reads the remaining ones."""
        assert self._hash is not None, "a stream without a hash"
        while self._advance(self.size):
            pass
        return self._hash.hexdigest()

    def _advance(self, wanted: int) -> bool:
        """Read the next piece and keep the bytes from ``wanted`` on; return False at the end."""
        end = self._at + len(self._buffer)
        if self._hash is None and wanted > end:
            self._buffer.clear()
            self._at = end = wanted
        piece = self._source.read(end, self._piece_bytes)
        if self._hash is not None:
            self._hash.update(piece)
        self._buffer += piece
        self._forget(wanted)
        return bool(piece)

    def _forget(self, before: int) -> None:
        count = min(max(0, before - self._at), len(self._buffer))
        del self._buffer[:count]
        self._at += count
