"""Print text safely: control characters that a terminal would interpret are escaped.

All of disttrain's output goes through this module. Keys, extensions, paths and markers come from untrusted files: an
escape sequence in one could hide an error, rename the window or paste text. URLs are shown without passwords and
signatures. :func:`say` and :func:`tell` print, :func:`cell` is for rich's tables, and :class:`Parser` for the command
line. A test ensures that nothing else prints.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from disttrain.errors import ConfigError
from disttrain.system.files import expand_path

if TYPE_CHECKING:
    from rich.text import Text

_OBEYED: Final = re.compile(
    # C0 and C1 controls, bidirectional text controls, line separators, and lone surrogates.
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_MOST_LETTERS: Final = 2000
_NOT_IN_LINES: Final = re.compile(_OBEYED.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))

_SCHEME: Final = r"\b[a-zA-Z][a-zA-Z0-9+.-]{0,15}://"
_URL: Final = re.compile(rf"({_SCHEME})((?:(?!{_SCHEME})[^\s\"<>])*)")
_VARIABLE: Final = r"\$(?:\w+|\{\w+\})"
_BY_NAME: Final = re.compile(rf"(?:[^:]*:)?{_VARIABLE}|(?:[^=&]*={_VARIABLE}(?:&|$))+")


def printable(text: str, *, lines: bool = False) -> str:
    r"""Replace each character that a terminal interprets by its code, such as ``\x1b``.

    Args:
        text: untrusted text.
        lines: keep tabs and newlines.
    """
    return (_NOT_IN_LINES if lines else _OBEYED).sub(_code, text)


def say(text: object, *, lines: bool = False, err: bool = False, flush: bool = True) -> None:
    """Print a line to stdout, or to stderr with ``err``.

    Args:
        text: the line.
        lines: ``text`` has several lines.
        err: print to stderr.
        flush: flush immediately; disable when printing many lines.
    """
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = printable(str(text), lines=lines).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, flush=flush)


def tell(text: object) -> None:
    """Print a disttrain message to stderr. Further lines are indented, so that none can pose as another message."""
    lines = "disttrain: " + re.sub(r"\n(?! )", "\n  ", redacted(str(text)))
    say("\n".join(map(_short, lines.split("\n"))), lines=True, err=True)


def redacted(text: str) -> str:
    """Replace user names, passwords and query strings in a text's URLs by ``...``.

    A password or parameter that is just an environment variable reference, such as ``$TOKEN``, is kept.
    """

    return _URL.sub(_without_secrets, text)


def cell(text: str) -> Text:
    """Return a table cell or title with the text taken literally, not as rich markup."""
    from rich.text import Text

    return Text(printable(text))


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose error messages are escaped like :func:`printable`."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit, with a message that may quote any command line argument."""
        super().exit(status, message and _short(printable(redacted(message.rstrip("\n")))) + "\n")


def path_word(text: str) -> Path:
    """Parse a path argument (for ``type=``), expanding a ``~`` or ``$VAR`` that the shell left, as in ``--out=~/x``."""
    try:
        return expand_path(text, name="the path")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.what) from None


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning for users: replaces :func:`warnings.formatwarning`, and omits the source line."""
    return f"{filename}:{lineno}: {category.__name__}: {printable(redacted(str(message)), lines=True)}\n"


def _short(line: str) -> str:
    """Shorten a very long line by cutting its middle."""
    if len(line) <= _MOST_LETTERS:
        return line
    half = _MOST_LETTERS // 2
    return f"{line[:half]} ... {len(line) - 2 * half:,} more characters ... {line[-half:]}"


def _code(found: re.Match[str]) -> str:
    number = ord(found.group())
    if 0xDC80 <= number <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{number - 0xDC00:02x}"
    # JSON has no \x escape, and escapes all of these itself except for DEL.
    return f"\\x{number:02x}" if number < 0x100 and number != 0x7F else f"\\u{number:04x}"


def _without_secrets(found: re.Match[str]) -> str:
    scheme, rest = found.groups()
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    user, at, host = authority.rpartition("@")
    path, mark, query = rest[len(authority) :].partition("?")
    # Punctuation after the URL, in a list or in quotes, is not part of it.
    told = query.partition("'")[0].rstrip(".,;:)]}")
    user = user if _BY_NAME.fullmatch(user) else "..."
    shown = told if not told or _BY_NAME.fullmatch(told) else "..."
    return f"{scheme}{user if at else ''}{at}{host}{path}{mark}{shown}{query[len(told) :]}"
