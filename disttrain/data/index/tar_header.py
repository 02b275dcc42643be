"""Parse tar header fields (names, sizes, checksums, PAX records) as GNU tar and libarchive do.

No field is trusted: a number has a bounded count of digits, a name ends at its first zero byte, and a PAX header is
walked once, record by record. Cost: linear in the header.
"""

from __future__ import annotations

from typing import Final

BLOCK: Final = 512
_DIGITS_LIMIT: Final = 20  # of a length or size in a PAX header; no file is that large
_KEYS: Final = (b"path", b"linkpath", b"size")
_SPARSE: Final = b"GNU.sparse."
_LOW: Final = bytes(range(128))


class BadHeaderError(Exception):
    """Raised for a header field that violates the format."""


class Described:
    """Metadata from the extended headers before a member.

    Attributes:
        globals: records of global PAX headers, for all following members.
        pax: records of the next member's own PAX header.
        long: its name and link target from GNU's headers.
    """

    def __init__(self) -> None:
        self.globals: dict[bytes, bytes] = {}
        self.pax: dict[bytes, bytes] = {}
        self.long: dict[bytes, bytes] = {}

    def forget(self) -> None:
        """Drop everything that applied only to the last member."""
        if self.pax:
            self.pax = {}
        if self.long:
            self.long = {}

    def get(self, key: bytes) -> bytes:
        """Return a value, preferring the header closest to the member; empty if there is none."""
        if not (self.pax or self.long or self.globals):  # the common case
            return b""
        return self.pax.get(key) or self.long.get(key) or self.globals.get(key) or b""

    @property
    def is_sparse(self) -> bool:
        """Whether the next member's contents are stored without their holes."""
        if not (self.pax or self.globals):
            return False
        return any(key.startswith(_SPARSE) for key in (*self.pax, *self.globals))


def pax_records(data: bytes) -> dict[bytes, bytes]:
    """Return the relevant records of a PAX header: a sequence of ``LENGTH KEY=VALUE`` lines.

    Raises:
        BadHeaderError: the header is malformed.
    """
    records: dict[bytes, bytes] = {}
    at, end = 0, len(data.rstrip(b"\0"))
    while at < end:
        blank = data.find(b" ", at, at + _DIGITS_LIMIT)
        length_text = data[at:blank] if blank > 0 else b""
        stop = at + int(length_text) if length_text.isdigit() else at
        equals = data.find(b"=", blank, stop)
        if not blank + 1 < equals < stop <= end or data[stop - 1 : stop] != b"\n":
            raise BadHeaderError(f"a damaged PAX header, at its byte {at}")
        key = data[blank + 1 : equals]
        if key in _KEYS or key.startswith(_SPARSE):
            records[key] = data[equals + 1 : stop - 1]
        at = stop
    return records


def size_of(header: bytes, pax_size: bytes) -> int:
    """Return the size of a member's contents in bytes.

    Args:
        header: its header.
        pax_size: the size in its PAX header; empty if there is none.

    Raises:
        BadHeaderError: the size is not a number, or negative.
    """
    if pax_size:
        if not pax_size.isdigit() or len(pax_size) > _DIGITS_LIMIT:
            brief = repr(pax_size[:_DIGITS_LIMIT]) + ("..." if len(pax_size) > _DIGITS_LIMIT else "")
            raise BadHeaderError(f"size {brief} in a PAX header is not a number")
        return int(pax_size)
    field = header[124:136]
    if field[0] & 0x80:  # GNU base-256, for sizes of 8 GiB and more; the next bit is the sign
        if field[0] & 0x40:
            raise BadHeaderError(f"size field {field!r} is negative")
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    number = _octal(field)
    if number is None:
        raise BadHeaderError(f"size field {field!r} is not a number")
    return number


def name_of(header: bytes) -> bytes:
    """Return the name in the header itself."""
    name = _field(header, 0, 100)
    # POSIX: the prefix field holds folders, whatever the version field holds; GNU's format stores times there.
    if header[345] and header[257:262] == b"ustar" and header[257:264] != b"ustar  ":
        return _field(header, 345, 500) + b"/" + name
    return name


def link_target(header: bytes, described: Described) -> str:
    """Return the target of a link."""
    return text(described.get(b"linkpath") or _field(header, 157, 257))


def checksum_holds(header: bytes) -> bool:
    """Return whether a block is a header, by its checksum."""
    field = header[148:156]
    stored = _octal(field)
    # The sum counts the checksum field itself as eight spaces.
    total = sum(header) - sum(field) + 8 * 0x20
    if stored == total:
        return True
    # SunOS and others sum signed bytes.
    high = len(header.translate(None, _LOW)) - len(field.translate(None, _LOW))
    return high > 0 and stored == total - 256 * high


def text(name: bytes) -> str:
    """Decode a name; works for any bytes."""
    return name.decode("utf-8", "surrogateescape")


def _field(header: bytes, start: int, stop: int) -> bytes:
    return header[start:stop].split(b"\0", 1)[0]


def _octal(field: bytes) -> int | None:
    """Parse a number field up to its first zero byte; return None if it is not a number."""
    digits = field.split(b"\0", 1)[0].strip(b" ") or b"0"
    # int() alone would also accept a sign, a prefix or an underscore.
    return int(digits, 8) if digits.isdigit() and max(digits) <= ord("7") else None
