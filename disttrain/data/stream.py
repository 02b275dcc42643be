"""Reading a shard once, from front to end, for all who want to see it: the header scan, decoders and a hash.

A :class:`Stream` is a :class:`~disttrain.data.tar.ByteSource` over another one. It reads large pieces one after
the other, keeps what lies ahead of the last request, and hashes every byte once if asked to; without a hash,
what nobody asks for is jumped over. Memory: a piece, and the largest member that is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from disttrain.data.remote import RemoteFile, is_remote
from disttrain.data.tar import ByteSource, LocalFile
from disttrain.data.tar_header import BLOCK

_PIECE_BYTES: Final = 4 * 2**20


@contextmanager
def opened(place: str) -> Iterator[ByteSource]:
    """A shard by its path or URL.

    Raises:
        ShardError: it cannot be opened; RemoteError, where it is remote.
    """
    if is_remote(place):
        yield RemoteFile(place)
        return
    with LocalFile(place) as file:
        yield file


class Stream:
    """A source whose requests should come in the order of its bytes.

    Args:
        source: what is read.
        is_hashed: whether :meth:`md5` will be asked for.
        piece_bytes: what is read at once.
    """

    window_bytes = BLOCK  # requests are served from memory: no need to ask for more

    def __init__(self, source: ByteSource, *, is_hashed: bool, piece_bytes: int = _PIECE_BYTES) -> None:
        self._source, self._piece_bytes = source, piece_bytes
        self.name, self.size = source.name, source.size
        self._buffer, self._at = bytearray(), 0
        self._hash = hashlib.md5(usedforsecurity=False) if is_hashed else None

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from an offset on; what lies before the last request is read from the source once more."""
        if offset < self._at:
            return self._source.read(offset, length)
        stop = min(offset + length, self.size)
        self._forget(offset)
        while self._at + len(self._buffer) < stop and self._advance(offset):
            pass
        return bytes(self._buffer[offset - self._at : stop - self._at])

    def md5(self) -> str:
        """The hash of all bytes, hexadecimal; reads those that are left."""
        assert self._hash is not None, "a stream without a hash"
        while self._advance(self.size):
            pass
        return self._hash.hexdigest()

    def _advance(self, wanted: int) -> bool:
        """Take the next piece, and keep of all what lies at or after ``wanted``; False at the end."""
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
