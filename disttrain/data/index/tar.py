"""Read the members of a tar file from its headers alone.

Reads ustar, v7, GNU long names and PAX headers in 512-byte blocks: through windows of 64 KiB (1 MiB from a remote
server) if members are small, or one page per member if they are large, so that contents are skipped. Any
:class:`ByteSource` works: a local file, or ranges of a remote one. Guarantees that every member it yields lies
entirely inside the file, that each archive ends with its end block, and that all bytes of the file are accounted for;
anything else is a :class:`TarError` with the offset. A hard link is read as the member it names. Concatenated archives
are read as one, although some tools stop after the first. Unread members (symbolic links, devices) are reported to
the caller. Cost: linear in the headers, and one more pass over them for a tar with hard links; a header is at most
4 MiB.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, Protocol, Self

from disttrain.data.index.tar_header import (
    BLOCK,
    BadHeaderError,
    Described,
    checksum_holds,
    link_target,
    name_of,
    pax_records,
    size_of,
    text,
)
from disttrain.errors import ShardError

_WINDOW: Final = 64 * 1024
_PAGE: Final = 4096
_ZEROS: Final = bytes(BLOCK)
_REGULAR: Final = (b"0", b"\0", b"7")
_EMPTY: Final = (b"2", b"3", b"4", b"5", b"6")  # links, devices, directories: no content, whatever the size field holds
_EXTENDED: Final = (b"L", b"K", b"x", b"X", b"g")  # headers that describe the next member; Solaris writes X for x
_HEADER_LIMIT: Final = 4 * 2**20
"""Most bytes of a name or PAX header. GNU tar and libarchive write far less; libarchive reads up to 1 MiB."""
_KINDS: Final = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"M": "a file continued from another volume",
}
_SILENT: Final = (b"5", b"D", b"V", b"N")  # directories, GNU's directory and name lists, volume labels: not data


class Member(NamedTuple):
    """A regular file in a tar: its name, and offset and size of its contents in bytes."""

    name: str
    offset: int
    size: int


class Unread(NamedTuple):
    """A member that is not read: its name, its kind, and the byte offset of its header."""

    name: str
    kind: str
    offset: int


class TarError(ShardError):
    """Raised for a damaged tar or a file that is not a tar, local or remote."""


def open_hint(error: OSError, otherwise: str) -> str:
    """Return the hint for a file that cannot be opened; running out of descriptors has its own."""
    if error.errno == errno.EMFILE:
        return "raise the limit of open files (`ulimit -n 65536`), or lower data.loader.workers"
    if error.errno == errno.ENFILE:
        return "the whole machine has too many open files: close some, or raise fs.file-max"
    return otherwise


class ByteSource(Protocol):
    """Random-access bytes of known size, such as a tar."""

    @property
    def name(self) -> str:
        """Its name in error messages."""

    @property
    def size(self) -> int:
        """Its size in bytes."""

    @property
    def window_bytes(self) -> int:
        """Preferred size of a read."""

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset; fewer than requested only at the end."""


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
                f"cannot open shard {path}: {error.strerror}",
                hint=open_hint(error, "check the path and its permissions"),
            ) from None
        self.name = path
        self.size = os.fstat(self._fd).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset; fewer than requested only at the end."""
        try:
            data = os.pread(self._fd, length, offset)
            while len(data) < length and (more := os.pread(self._fd, length - len(data), offset + len(data))):
                data += more  # a system call returns at most 2 GiB
        except OSError as error:
            raise ShardError(
                f"shard {self.name} at byte {offset}: {error.strerror}", hint="check the disk and the file"
            ) from None
        return data


def scan_source(
    source: ByteSource, *, start: int = 0, window_bytes: int = 0, unread: Callable[[Unread], None] | None = None
) -> Iterator[Member]:
    """Yield the regular files and hard links of a tar, in order.

    Args:
        source: the bytes of the tar.
        start: where to begin: the end of a member's last block.
        window_bytes: bytes to read at once; the source's preferred size by default.
        unread: called with each member that is not read, except directories.

    Raises:
        TarError: it is not a tar, is truncated, lacks its end block, or holds a sparse member or a hard link whose
            target it does not hold.
    """
    return _Scanner(source, window_bytes or source.window_bytes, unread).members(start)


class _Scanner:
    def __init__(self, source: ByteSource, window_bytes: int, unread: Callable[[Unread], None] | None = None) -> None:
        self._source, self._path, self._size = source, source.name, source.size
        self._buffer, self._at, self._window = b"", 0, window_bytes
        self._unread = unread
        # Members by name, None for unread ones; collected from the first hard link on.
        self._targets: dict[str, Member | None] | None = None

    def _read(self, offset: int, length: int) -> bytes:
        end = self._at + len(self._buffer)
        if not (self._at <= offset and offset + length <= end):
            # A large member is likely followed by another, most of which would fill a window uselessly: read a page.
            is_far = end > 0 and offset - end > self._window // 4
            window = min(_PAGE, self._window) if is_far else self._window
            self._buffer, self._at = self._source.read(offset, max(length, window)), offset
        return self._buffer[offset - self._at : offset - self._at + length]

    def _fail(self, what: str, offset: int, hint: str = "pack or copy the shard again") -> TarError:
        return TarError(f"shard {self._path} at byte {offset}: {what}", hint=hint)

    def members(self, position: int, stop: int | None = None) -> Iterator[Member]:
        described, is_after_end = Described(), False
        while stop is None or position < stop:
            header = self._read(position, BLOCK)
            if header == _ZEROS:
                following = self._after_end(position + BLOCK)
                if following is None:
                    return
                # Another archive with its own global headers, as in `cat a.tar b.tar`.
                described, position, is_after_end = Described(), following, True
                continue
            if len(header) < BLOCK or not checksum_holds(header):
                raise self._no_header(header, position, is_after_end=is_after_end)
            is_after_end = False
            kind = header[156:157]
            size = 0 if kind in _EMPTY else self._size_of(header, kind, described, position)
            content = position + BLOCK
            if content + size > self._size:
                name = text(described.get(b"path") or name_of(header))
                raise self._fail(
                    f"member {name!r} of {size} bytes is cut off; the file ends at byte {self._size}", position
                )
            if kind in _EXTENDED:
                self._take(kind, content, size, described)
            else:
                member = self._member(kind, header, described, size, position)
                if member is not None:
                    yield member
                described.forget()
            position = content + -(-size // BLOCK) * BLOCK

    def _no_header(self, header: bytes, position: int, *, is_after_end: bool) -> TarError:
        """Return the error for a block that is not a header."""
        if is_after_end:
            return self._fail(
                f"{self._size - position} bytes after the end block are not a tar",
                position,
                "pack or copy the shard again, or truncate it there if those bytes are not needed",
            )
        if len(header) == BLOCK:
            what = "not a tar file (decompress it first if it is compressed)" if position == 0 else "a damaged header"
            return self._fail(what, position)
        what = "the end block is missing" if not header else "a header is cut off"
        if position == 0:
            what = "the file is empty" if not header else "not a tar file"
        return self._fail(what if not self._size else f"{what}; the file ends at byte {self._size}", position)

    def _after_end(self, position: int) -> int | None:
        """Return the offset of the first nonzero block after an end block; None if there is none."""
        while position < self._size:
            piece = self._read(position, min(max(self._window, _WINDOW), self._size - position))
            rest = piece.lstrip(b"\0")
            if rest:
                return position + (len(piece) - len(rest)) // BLOCK * BLOCK
            if not piece:
                return None
            position += len(piece)
        return None

    def _take(self, kind: bytes, content: int, size: int, described: Described) -> None:
        """Store a header that describes the next member, or all following ones."""
        if size > _HEADER_LIMIT:
            raise self._fail(f"a header of {size} bytes; at most {_HEADER_LIMIT} are read", content - BLOCK)
        data = self._read(content, size)
        if kind in (b"L", b"K"):
            described.long[b"path" if kind == b"L" else b"linkpath"] = data.split(b"\0", 1)[0]
            return
        try:
            (described.globals if kind == b"g" else described.pax).update(pax_records(data))
        except BadHeaderError as error:
            raise self._fail(str(error), content) from None

    def _member(self, kind: bytes, header: bytes, described: Described, size: int, position: int) -> Member | None:
        """Return a member that is read, or None."""
        name = text(described.get(b"path") or name_of(header))
        if kind == b"S" or described.is_sparse:
            name = text(described.pax.get(b"GNU.sparse.name", b"")) or name
            raise self._fail(
                f"member {name!r} is sparse: sparse members are not supported",
                position,
                "pack it again: GNU tar without --sparse, bsdtar with --no-read-sparse",
            )
        if "\0" in name:
            raise self._fail(f"member {name!r} has a NUL byte in its name", position)
        found: Member | None = None
        if kind in _REGULAR or (kind == b"1" and size):
            if name.endswith("/"):  # an old way to write a directory
                return None
            found = Member(name, position + BLOCK, size)
        elif kind == b"1":
            found = self._linked(name, link_target(header, described), position)
        if found is None and kind not in _SILENT and self._unread is not None:
            what = _KINDS.get(kind) or f"a member of type {kind.decode('latin-1')!r}"
            target = f" to {link_target(header, described)!r}" if kind in (b"1", b"2") else ""
            self._unread(Unread(name, f"{what}{target}", position))
        if self._targets is not None:
            self._targets[name] = found
        return found

    def _linked(self, name: str, target: str, position: int) -> Member | None:
        """Return the earlier member that a hard link names; None if that is not read either."""
        if self._targets is None:
            earlier = _Scanner(self._source, max(self._window, _WINDOW))
            earlier._targets = {}
            for _ in earlier.members(0, stop=position):
                pass
            self._targets = earlier._targets
        for spelling in (target, target.removeprefix("./"), f"./{target}"):
            if spelling in self._targets:
                found = self._targets[spelling]
                return None if found is None else found._replace(name=name)
        raise self._fail(
            f"{name!r} is a hard link to {target!r}, which does not come before it in the shard",
            position,
            "pack the files themselves (GNU tar: --hard-dereference), or both into one shard",
        )

    def _size_of(self, header: bytes, kind: bytes, described: Described, position: int) -> int:
        try:
            # A PAX size applies to the member, not to an extended header before it.
            size = size_of(header, b"" if kind in _EXTENDED else described.get(b"size"))
        except BadHeaderError as error:
            raise self._fail(str(error), position) from None
        if kind == b"1" and size:
            # POSIX lets a hard link have contents in PAX archives; others set a size although no contents follow.
            following = self._read(position + BLOCK, BLOCK)
            return 0 if len(following) < BLOCK or following == _ZEROS or checksum_holds(following) else size
        return size
