"""Read small untrusted files (JSON, YAML, lines) with limits.

Rejected before they cost time or memory: anything but a regular file (a FIFO would block, ``/dev/zero`` never ends),
files over a size limit, text that is not UTF-8, values nested too deep, YAML aliases that multiply or contain
themselves, duplicate names, and numbers over 20 digits. The reason is a :class:`ReadError`, a ``ValueError``; OS errors
remain ``OSError``. The ``as_...`` functions return a value if it has the expected type, and an empty result otherwise.
Cost: one pass in addition to the parser's own. Needs no torch, and yaml only for YAML.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import yaml

RUN_FILE: Final = "run.json"
MAX_BYTES: Final = 256 * 2**20
"""Default size limit of files that are read whole."""
CONFIG_BYTES: Final = 4 * 2**20
"""Size limit of a configuration file."""
MAX_DEPTH: Final = 100
MAX_NODES: Final = 200_000
"""Limit on the number of values in a YAML file, with every alias expanded."""
_MAX_DIGITS: Final = 20
_DIGITS: Final = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*(?::[0-5]?[0-9])*)")
"""A YAML integer, including base 60; a hash or an IPv6 address is a string."""


class ReadError(ValueError):
    """Why a file's content is rejected, as a phrase to follow its name, such as ``is not a regular file``."""


@contextmanager
def open_regular(path: Path | str, *, limit: int | None = None) -> Iterator[IO[bytes]]:
    """Open a file for reading without blocking; only regular files are accepted.

    Args:
        path: the file.
        limit: maximum size in bytes; None for no limit.

    Raises:
        ReadError: it is not a regular file, or is too large.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # else a FIFO blocks until it has a writer
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise ReadError("is not a regular file")
        if limit is not None and found.st_size > limit:
            raise ReadError(f"has {found.st_size:,} bytes, more than {limit:,}")
        yield file


def read_text(path: Path | str, *, limit: int = MAX_BYTES) -> str:
    """Read a regular UTF-8 file as text, without its byte order mark.

    Raises:
        ReadError: it is not such a file, or is too large.
        OSError: it cannot be read.
    """
    with open_regular(path, limit=limit) as file:
        return decode(file.read(limit))


def decode(data: bytes) -> str:
    """Decode UTF-8, without a byte order mark.

    Raises:
        ReadError: the data is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ReadError(f"is not UTF-8 text (byte {error.start})") from None


def read_json(path: Path | str, *, limit: int = MAX_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        ReadError: it is not JSON, or exceeds a limit.
        OSError: it cannot be read.
    """
    return parse_json(read_text(path, limit=limit))


def read_record(path: Path | str) -> dict[str, Any]:
    """Read a JSON object from a file; return an empty one if it is missing or damaged."""
    try:
        return as_dict(read_json(path))
    except (OSError, ValueError):
        return {}


def read_json_lines(path: Path | str) -> Iterator[dict[str, Any]]:
    """Yield the objects in a JSON Lines file; other lines, such as one truncated by a kill, are skipped.

    Raises:
        ReadError: it is not a regular file.
        OSError: it cannot be read.
    """
    for line in read_lines(path):
        with suppress(ReadError):
            found = parse_json(decode(line))
            if isinstance(found, dict):
                yield found


def read_lines(path: Path | str, *, limit: int = 4 * 2**20) -> Iterator[bytes]:
    """Yield the lines of a regular file with their line endings; the last one may have none.

    Raises:
        ReadError: it is not a regular file, or a line is longer than ``limit``.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        number = 0
        while line := file.readline(limit + 1):
            number += 1
            if len(line) > limit:
                raise ReadError(f"has more than {limit:,} bytes in line {number}")
            yield line


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ReadError: the text is not JSON, or exceeds a limit.
    """
    if isinstance(text, bytes):
        text = decode(text)
    try:
        value = json.loads(text, parse_int=_whole, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ReadError(f"nests values more than {MAX_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        raise ReadError(f"is not JSON: {error}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_tree(value)
    return value


def read_yaml(path: Path | str, *, limit: int = CONFIG_BYTES) -> Any:
    """Read a YAML file of plain values.

    Raises:
        ReadError: it is not YAML, or exceeds a limit.
        OSError: it cannot be read.
    """
    return parse_yaml(read_text(path, limit=limit))


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain types.

    Raises:
        ReadError: the text is not YAML, or exceeds a limit.
    """
    import yaml

    check_yaml(text)
    with _yaml_errors():
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def check_yaml(text: str) -> None:
    """Check YAML text against the limits before any object is built, using only the parser's events.

    Raises:
        ReadError: it is not YAML, nests too deep, has too many values, a recursive alias or a duplicate name.
    """
    import yaml

    sizes: dict[str, tuple[int, int]] = {}  # anchor: (number of values, depth)
    open_nodes: list[_Node] = [_Node("")]
    with _yaml_errors():
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                if any(node.anchor == event.anchor for node in open_nodes):
                    raise ReadError(f"has an alias {event.anchor!r} within its own anchor{_line(event.start_mark)}")
                _add(open_nodes, *sizes.get(event.anchor or "", (1, 0)))
            elif isinstance(event, yaml.ScalarEvent):
                if event.implicit[0] and len(event.value) > _MAX_DIGITS and _DIGITS.fullmatch(event.value):
                    raise ReadError(f"has a number of {len(event.value):,} digits{_line(event.start_mark)}")
                open_nodes[-1].key(event)
                sizes[event.anchor or ""] = (1, 0)
                _add(open_nodes, 1, 0)
            elif isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append(_Node(event.anchor or "", isinstance(event, yaml.MappingStartEvent)))
                if len(open_nodes) > MAX_DEPTH:
                    raise ReadError(f"nests values more than {MAX_DEPTH} deep{_line(event.start_mark)}")
            elif isinstance(event, yaml.CollectionEndEvent):
                node = open_nodes.pop()
                sizes[node.anchor] = (node.values, node.depth + 1)
                _add(open_nodes, node.values, node.depth + 1)


class _Node:
    """A YAML list or mapping that is still open."""

    def __init__(self, anchor: str, is_mapping: bool = False) -> None:
        self.anchor, self.values, self.depth, self.parts = anchor, 1, 0, 0
        self.names: set[str] | None = set() if is_mapping else None

    def key(self, event: yaml.ScalarEvent) -> None:
        """Record a mapping's key, and raise if it is a duplicate."""
        if self.names is not None and self.parts % 2 == 0:
            if event.value in self.names and event.value != "<<":
                raise ReadError(f"has {event.value[:100]!r} twice{_line(event.start_mark)}")
            self.names.add(event.value)


def _add(open_nodes: list[_Node], values: int, depth: int) -> None:
    node = open_nodes[-1]
    node.parts += 1
    node.values += values
    node.depth = max(node.depth, depth)
    if sum(one.values for one in open_nodes) > MAX_NODES:
        raise ReadError(f"holds more than {MAX_NODES:,} values, with aliases expanded")
    if len(open_nodes) + depth > MAX_DEPTH:
        raise ReadError(f"nests values more than {MAX_DEPTH} deep")


def _line(mark: Any) -> str:
    return f", line {mark.line + 1}" if mark is not None else ""


@contextmanager
def _yaml_errors() -> Iterator[None]:
    """Convert the errors that bad YAML causes in the parser and in Python's constructors to a ``ReadError``."""
    import yaml

    try:
        yield
    except ReadError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        why = " ".join(part for part in (getattr(error, "context", ""), getattr(error, "problem", "")) if part)
        raise ReadError(f"is not valid YAML{_line(mark)}: {why or str(error).splitlines()[0]}") from None
    except (ValueError, OverflowError, RecursionError, TypeError) as error:
        raise ReadError(f"is not valid YAML: {error}") from None


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ReadError(f"has a number of {len(digits):,} digits")
    return int(digits)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(double, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ReadError(f"has {double[:100]!r} twice")
    return found


def _check_tree(value: Any) -> None:
    """Raise if a value is nested too deep."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ReadError(f"nests values more than {MAX_DEPTH} deep")
        inner: list[Any] = []
        for one in level:
            inner += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        level, depth = inner, depth + 1


def as_dict(value: object) -> dict[str, Any]:
    """Return a dictionary as is; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def as_dicts(value: object) -> list[dict[str, Any]]:
    """Return the dictionaries in a list; none for anything else."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def as_text(value: object) -> str:
    """Return a string or number as text; an empty string for anything else."""
    return str(value) if isinstance(value, str | int | float) else ""


def as_number(value: object) -> float | None:
    """Return a number, including NaN and infinities as written by ``files.to_json``; None for anything else."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def as_whole(value: object) -> int | None:
    """Return a number truncated to a 64-bit integer; None for anything else."""
    number = as_number(value)
    if number is None or not math.isfinite(number) or abs(number) >= 2**63:
        return None
    return int(value) if isinstance(value, int) else int(number)


def conform(record: dict[str, Any], kinds: Mapping[str, Callable[[object], Any]]) -> dict[str, Any]:
    """Convert an object's known entries to their types; others are unchanged."""
    return {name: kinds[name](value) if name in kinds else value for name, value in record.items()}


def conform_run(record: object) -> dict[str, Any]:
    """Convert the known entries of a ``run.json`` to their types."""
    return conform(as_dict(record), _RUN)


def read_run(run_dir: Path) -> dict[str, Any]:
    """Read a run's record; empty if missing or damaged."""
    return conform_run(read_record(run_dir / RUN_FILE))


_ATTEMPT: Final[Mapping[str, Callable[[object], Any]]] = {
    **dict.fromkeys(("started", "ended", "seconds"), as_number),
    **dict.fromkeys(("from_step", "to_step", "world_size"), as_whole),
    **dict.fromkeys(("status", "stop_reason", "strategy", "precision", "launch", "slurm_job"), as_text),
}
_EVENT: Final[Mapping[str, Callable[[object], Any]]] = {
    **dict.fromkeys(("step", "to_step", "first_skipped", "last_skipped"), as_whole),
    **dict.fromkeys(("kind", "text"), as_text),
    "time": as_number,
}
_BEST: Final[Mapping[str, Callable[[object], Any]]] = {
    **dict.fromkeys(("monitor", "mode"), as_text),
    "value": as_number,
    "step": as_whole,
}
_SOURCE: Final[Mapping[str, Callable[[object], Any]]] = {"samples": as_whole, "epochs": as_number}
_RUN: Final[Mapping[str, Callable[[object], Any]]] = {
    **dict.fromkeys(("id", "name", "status", "command", "stop_reason"), as_text),
    **dict.fromkeys(("created", "ended", "seconds_left_out"), as_number),
    **dict.fromkeys(("attempts_left_out", "events_left_out", "bad_samples", "filtered_samples"), as_whole),
    "result": lambda value: {n: v for n, one in as_dict(value).items() if (v := as_number(one)) is not None},
    "environment": lambda value: {name: as_text(one) for name, one in as_dict(value).items()},
    "sources": lambda value: {name: conform(as_dict(one), _SOURCE) for name, one in as_dict(value).items()},
    "attempts": lambda value: [conform(one, _ATTEMPT) for one in as_dicts(value)],
    "events": lambda value: [conform(one, _EVENT) for one in as_dicts(value)],
    "best": lambda value: conform(as_dict(value), _BEST),
    "ranks": as_dicts,
}
