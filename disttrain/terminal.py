"""All text that disttrain prints goes through here, and what a terminal would obey in it is shown instead.

Keys, extensions, paths and markers are written by others: an escape sequence in one could hide an error, rename the
window or paste text. Messages show URLs without passwords and signatures. :func:`say` and :func:`tell` print,
:func:`cell` is for tables of rich, and :class:`Parser` for the command line. A test sees to it that nothing else
prints.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from disttrain.errors import ConfigError
from disttrain.files import expand_path

if TYPE_CHECKING:
    from rich.text import Text

_OBEYED: Final = re.compile(
    # C0 and C1 controls, marks that turn the direction of text, line separators, and halves of characters.
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_MOST_LETTERS: Final = 2000
_NOT_IN_LINES: Final = re.compile(_OBEYED.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))

_SCHEME: Final = r"\b[a-zA-Z][a-zA-Z0-9+.-]{0,15}://"
_URL: Final = re.compile(rf"({_SCHEME})((?:(?!{_SCHEME})[^\s\"<>])*)")
_VARIABLE: Final = r"\$(?:\w+|\{\w+\})"
_BY_NAME: Final = re.compile(rf"(?:[^:]*:)?{_VARIABLE}|(?:[^=&]*={_VARIABLE}(?:&|$))+")


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text in which each character that a terminal obeys is replaced by its code, such as ``\x1b``.

    Args:
        text: from anywhere.
        lines: keep tabs and line ends.
    """
    return (_NOT_IN_LINES if lines else _OBEYED).sub(_code, text)


def say(text: object, *, lines: bool = False, err: bool = False, flush: bool = True) -> None:
    """Print a line on standard output, or with ``err`` on standard error.

    Args:
        text: the line.
        lines: whether it is several.
        err: print on standard error.
        flush: at once; not for one of a million lines.
    """
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = printable(str(text), lines=lines).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, flush=flush)


def tell(text: object) -> None:
    """Print a message of disttrain's on standard error. Further lines are indented, so that none poses as another."""
    lines = "disttrain: " + re.sub(r"\n(?! )", "\n  ", redacted(str(text)))
    say("\n".join(map(_short, lines.split("\n"))), lines=True, err=True)


def redacted(text: str) -> str:
    """A text without the users, passwords and queries of its URLs: three dots stand in their place.

    A password or parameter that only names a variable of the environment, such as ``$TOKEN``, stays.
    """

    return _URL.sub(_without_secrets, text)


def cell(text: str) -> Text:
    """A cell of a table, or a title: the text as it is, no markup of rich's."""
    from rich.text import Text

    return Text(printable(text))


class Parser(argparse.ArgumentParser):
    """Argparse's own, whose complaints show words of the command line as :func:`printable` does."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End, with a message that may hold any word of the command line."""
        super().exit(status, message and _short(printable(redacted(message.rstrip("\n")))) + "\n")


def path_word(text: str) -> Path:
    """A path of the command line, for ``type=``, with ``~`` and ``$VAR`` that the shell left, as in ``--out=~/x``."""
    try:
        return expand_path(text, name="the path")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.what) from None


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning for people, in place of :func:`warnings.formatwarning`: without the line of source."""
    return f"{filename}:{lineno}: {category.__name__}: {printable(redacted(str(message)), lines=True)}\n"


def _short(line: str) -> str:
    """A line without the middle of what nobody reads to its end."""
    if len(line) <= _MOST_LETTERS:
        return line
    half = _MOST_LETTERS // 2
    return f"{line[:half]} ... {len(line) - 2 * half:,} letters more ... {line[-half:]}"


def _code(found: re.Match[str]) -> str:
    number = ord(found.group())
    if 0xDC80 <= number <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{number - 0xDC00:02x}"
    # JSON knows no \x, and escapes all of these itself but for one.
    return f"\\x{number:02x}" if number < 0x100 and number != 0x7F else f"\\u{number:04x}"


def _without_secrets(found: re.Match[str]) -> str:
    scheme, rest = found.groups()
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    user, at, host = authority.rpartition("@")
    path, mark, query = rest[len(authority) :].partition("?")
    # What stands behind the URL in a list or in quotes is not part of it.
    told = query.partition("'")[0].rstrip(".,;:)]}")
    user = user if _BY_NAME.fullmatch(user) else "..."
    shown = told if not told or _BY_NAME.fullmatch(told) else "..."
    return f"{scheme}{user if at else ''}{at}{host}{path}{mark}{shown}{query[len(told) :]}"
