"""The members of a tar file, read from its headers alone.

Reads ustar, v7, GNU long names and PAX headers by their 512-byte blocks: in windows of 64 KiB (1 MiB from a
remote server) where members are small, a page a member where they are large, so contents are skipped.
Any :class:`ByteSource` will do: a local file, or ranges of a remote one. It guarantees that every member
it yields lies whole inside the file and that the archive ends with its end block; anything else is a
:class:`TarError` with the offset.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol, Self

from disttrain.errors import ShardError

BLOCK: Final = 512
_WINDOW: Final = 64 * 1024
_PAGE: Final = 4096
_ZEROS: Final = bytes(BLOCK)
_REGULAR: Final = (b"0", b"\0", b"7")
_EMPTY: Final = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories: no content, whatever the size says


class Member(NamedTuple):
    """A regular file in a tar: its name and where its contents lie (bytes)."""

    name: str
    offset: int
    size: int


class TarError(ShardError):
    """A tar that is damaged or none, whatever it was read from."""


class ByteSource(Protocol):
    """What a tar can be read from: bytes at any place, of a known size."""

    @property
    def name(self) -> str:
        """What error messages call it."""

    @property
    def size(self) -> int:
        """Its bytes."""

    @property
    def window_bytes(self) -> int:
        """What is worth reading at once."""

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from an offset on; fewer than asked for only at the end."""


class LocalFile:
    """A local file as a :class:`ByteSource`, open until :meth:`close`; a context manager.

    Raises:
        ShardError: it cannot be opened.
    """

    window_bytes = _WINDOW

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(
                f"cannot open shard {path}: {error.strerror}", mend="check the path and its permissions"
            ) from None
        self.name = path
        self.size = os.fstat(self._fd).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from an offset on; fewer than asked for only at the end."""
        try:
            data = os.pread(self._fd, length, offset)
            while len(data) < length and (more := os.pread(self._fd, length - len(data), offset + len(data))):
                data += more  # a system call gives 2 GiB at most
        except OSError as error:
            raise ShardError(
                f"shard {self.name} at byte {offset}: {error.strerror}", mend="check the disk and the file"
            ) from None
        return data


def scan_members(path: str) -> Iterator[Member]:
    """The regular files of a local tar, in order.

    Raises:
        ShardError: the file cannot be opened; TarError, is not a tar, is truncated, or lacks its end block.
    """
    with LocalFile(path) as file:
        yield from scan_source(file)


def scan_source(source: ByteSource, *, start: int = 0, window_bytes: int = 0) -> Iterator[Member]:
    """The regular files of a tar that is read from anywhere, in order.

    Args:
        source: where its bytes come from.
        start: where to begin: the end of a member's last block.
        window_bytes: what to read at once; by default what the source finds worth while.

    Raises:
        TarError: it is not a tar, is truncated, or lacks its end block.
    """
    return _Scanner(source, window_bytes or source.window_bytes).members(start)


class _Scanner:
    def __init__(self, source: ByteSource, window_bytes: int) -> None:
        self._source, self._path, self._size = source, source.name, source.size
        self._buffer, self._at, self._window = b"", 0, window_bytes

    def _read(self, offset: int, length: int) -> bytes:
        end = self._at + len(self._buffer)
        if not (self._at <= offset and offset + length <= end):
            # After a large member another one is likely, and what a window would hold of it is of no use.
            is_far = end > 0 and offset - end > self._window // 4
            window = min(_PAGE, self._window) if is_far else self._window
            self._buffer, self._at = self._source.read(offset, max(length, window)), offset
        return self._buffer[offset - self._at : offset - self._at + length]

    def _fail(self, what: str, offset: int, mend: str = "pack or copy the shard again") -> TarError:
        return TarError(f"shard {self._path} at byte {offset}: {what}", mend=mend)

    def members(self, position: int) -> Iterator[Member]:
        overrides: dict[str, str] = {}  # what a GNU long name or PAX header says of the next member
        globals_: dict[str, str] = {}
        while True:
            header = self._read(position, BLOCK)
            if header == _ZEROS:
                return
            if len(header) < BLOCK:
                what = "the end block is missing" if not header else "a header is cut off"
                if position == 0:
                    what = "the file is empty" if not header else "not a tar file"
                raise self._fail(what if not self._size else f"{what}; the file ends at byte {self._size}", position)
            if not _checksum_holds(header):
                what = "not a tar file (a compressed one must be unpacked)" if position == 0 else "a damaged header"
                raise self._fail(what, position)
            kind = header[156:157]
            size = 0 if kind in _EMPTY else self._size_of(header, overrides, position)
            content = position + BLOCK
            following = content + -(-size // BLOCK) * BLOCK
            if content + size > self._size:
                name = overrides.get("path") or _name(header)
                raise self._fail(
                    f"member {name!r} of {size} bytes is cut off; the file ends at byte {self._size}", position
                )
            if kind == b"L":
                overrides["path"] = self._read(content, size).rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"K":
                pass  # a long link target: links carry no content of their own
            elif kind in (b"x", b"X"):  # X is how Solaris writes it
                overrides.update(self._pax(content, size))
            elif kind == b"g":
                globals_.update(self._pax(content, size))
            else:
                if kind == b"S" or any(key.startswith("GNU.sparse.") for key in overrides):
                    raise self._fail("sparse members are not supported", position, mend="pack it without --sparse")
                if kind in _REGULAR:
                    name = overrides.get("path") or globals_.get("path") or _name(header)
                    if not name.endswith("/"):  # an old way to write a directory
                        yield Member(name, content, size)
                overrides = {}
            position = following

    def _size_of(self, header: bytes, overrides: dict[str, str], position: int) -> int:
        if "size" not in overrides:
            return self._number(header[124:136], position)
        if not overrides["size"].isdecimal():
            raise self._fail(f"size {overrides['size']!r} in a PAX header is not a number", position)
        return int(overrides["size"])

    def _number(self, field: bytes, position: int) -> int:
        if field[0] & 0x80:  # GNU base-256, for sizes of 8 GiB and more
            return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        digits = field.strip(b" \0") or b"0"
        if not digits.isdigit() or max(digits) > ord("7"):  # int() would also take a sign or a prefix
            raise self._fail(f"size field {field!r} is not a number", position)
        return int(digits, 8)

    def _pax(self, offset: int, size: int) -> dict[str, str]:
        records: dict[str, str] = {}
        data = self._read(offset, size)
        while data.strip(b"\0"):
            length_text, _, rest = data.partition(b" ")
            if not length_text.isdigit() or not 0 < int(length_text) <= len(data):
                raise self._fail("a damaged PAX header", offset)
            record = rest[: int(length_text) - len(length_text) - 2]
            key, _, value = record.partition(b"=")
            records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
            data = data[int(length_text) :]
        return records


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:262] == b"ustar" and header[263:265] == b"00":  # POSIX: the prefix field holds path
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")


def _checksum_holds(header: bytes) -> bool:
    try:
        stored = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return False
    # The sum is taken with the checksum field itself as eight spaces.
    return sum(header) - sum(header[148:156]) + 8 * 0x20 == stored
