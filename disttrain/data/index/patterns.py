"""Expand a shard specification: brace patterns, globs, lists in text files, ``~`` and ``$VAR``.

A specification becomes a list of places, each the path or URL of a shard or of a manifest. Only lists are opened.
Local shards must exist; the error for a missing one says what was found instead. Cost: one stat per local shard, one
folder listing per glob on a server.
"""

from __future__ import annotations

import glob
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

import braceexpand

from disttrain.data.index.parallel_map import together
from disttrain.data.index.remote_index import read_remote_text
from disttrain.data.remote.objects import ObjectFolder
from disttrain.data.remote.ranges import DEFAULT_RETRY, RemoteError, RetryConfig, is_remote, shown, sibling
from disttrain.errors import DataError, nearest
from disttrain.system.reading import read_text

_MOST_NAMES: Final = 1_000_000
_MOST_BRACES: Final = 200
_LIST_SUFFIXES: Final = (".txt", ".list")
_VARIABLE: Final = re.compile(r"(?<!\\)\$(?:(\w+)|\{(\w+)\})", re.ASCII)
_RANGE: Final = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_SIGNS: Final = "*?["
_NAMED: Final = 5
_MOST_DIGITS: Final = 18
_USER_INFO: Final = "!$&'()*+,;=:"  # characters that RFC 3986 allows unquoted in user and password
_QUOTED: Final = 200  # characters of a pattern in a message


def places(spec: str, *, name: str = "data", retry: RetryConfig = DEFAULT_RETRY, ask_servers: bool = True) -> list[str]:
    """Return the manifests and shards that a specification names, in order, without checking that remote shards exist.

    Args:
        spec: a brace pattern, a glob, a manifest, or a text file (``.txt``, ``.list``) with one of these per line.
        name: name of the data set in error messages.
        retry: retry policy for servers.
        ask_servers: look up globs and lists on servers; if false, they expand to nothing.

    Raises:
        DataError: the specification names nothing, too many shards, a local shard that does not exist, a variable that
            is not set, or a list that cannot be read.
    """
    found: list[str] = []
    for place in _names(_expanded(spec, name=name), name=name, retry=retry, ask_servers=ask_servers):
        if not path_of(place).endswith(_LIST_SUFFIXES):
            found.append(place)
        elif ask_servers or not is_remote(place):
            for line in _lines(place, name=name, retry=retry):
                found += _names(line, name=name, retry=retry, ask_servers=ask_servers)
    _require_files([place for place in found if not is_remote(place) and not is_manifest(place)], name=name)
    return found


def is_manifest(place: str) -> bool:
    """Return whether a path or URL names a manifest."""
    return path_of(place).endswith(".json")


def path_of(place: str) -> str:
    """Return a path unchanged, or the path of a URL without its query.

    Raises:
        DataError: it starts like a URL but is not a valid one.
    """
    try:
        return urlsplit(place).path if is_remote(place) else place
    except ValueError as error:
        raise DataError(f"{place} is not a valid URL: {error}", hint="correct it") from None


def _expanded(spec: str, *, name: str) -> str:
    """Expand the home folder and variables in a specification; the query of a URL is not expanded."""
    query, secrets_end = "", 0
    if is_remote(spec):
        spec, sign, query = spec.partition("?")
        query = sign + query
        host = spec.index("://") + 3
        secrets_end = host + spec[host:].partition("/")[0].rfind("@")
    elif os.path.lexists(spec):  # an existing name that contains $ or ~
        return spec

    def value(found: re.Match[str]) -> str:
        variable = found[1] or found[2]
        if variable not in os.environ:
            raise DataError(
                f"{name}: {shown(spec)!r} has ${variable}, which is not set",
                hint=f"export {variable}, or write its value instead",
            )
        # A password may contain characters that would end the host part, or act as a glob or braces.
        in_secrets, text = found.start() < secrets_end, os.environ[variable]
        return quote(text, safe=_USER_INFO) if in_secrets else text

    return (_VARIABLE.sub(value, spec) if is_remote(spec) else os.path.expanduser(_VARIABLE.sub(value, spec))) + query


def _names(pattern: str, *, name: str, retry: RetryConfig, ask_servers: bool) -> list[str]:
    """Return the names that a pattern expands to."""
    found: list[str] = []
    for part in _braces(pattern, name=name):
        if not any(sign in path_of(part) for sign in _SIGNS):
            found.append(part)
        elif is_remote(part):
            found += _on_server(part, name=name, retry=retry) if ask_servers else []
        elif os.path.isfile(part):
            found.append(part)
        else:
            matches = sorted(islice(glob.iglob(part, recursive=True), _MOST_NAMES + 1))
            if not matches:
                raise DataError(f"{name}: no file matches {part!r}", hint="check the pattern and the folder")
            found += matches
    return found


def _braces(pattern: str, *, name: str) -> list[str]:
    if pattern.count("{") > _MOST_BRACES or "\0" in pattern:
        raise DataError(
            f"{name}: {shown(pattern)[:_QUOTED]!r} has too many braces or a NUL byte",
            hint="name the shards in a manifest or in a text file, one per line",
        )
    if _count(pattern) > _MOST_NAMES:
        raise DataError(
            f"{name}: {shown(pattern)[:_QUOTED]!r} names more than {_MOST_NAMES:,} shards",
            hint="correct the range, or pack larger shards",
        )
    try:
        return list(braceexpand.braceexpand(pattern))
    except (ValueError, RecursionError):
        raise DataError(
            f"{name}: {shown(pattern)[:_QUOTED]!r} has an unmatched brace", hint="close or remove the brace"
        ) from None


def _count(pattern: str) -> int:
    """Return how many names the braces of a pattern expand to, without expanding them; a letter range counts as 52."""
    counts: list[int] = []

    def product(text: str) -> int:
        return math.prod(counts[int(number)] for number in re.findall(r"\0(\d+)\0", text))

    def replace(found: re.Match[str]) -> str:
        if span := _RANGE.fullmatch(found[0]):
            first, last, step = (int((text or "1")[:_MOST_DIGITS]) for text in span.groups())
            counts.append(abs(last - first) // max(1, step) + 1)
        elif re.fullmatch(r"\{[A-Za-z]\.\.[A-Za-z](\.\.-?\d+)?\}", found[0]):
            counts.append(52)
        else:
            counts.append(sum(map(product, found[0].split(","))))
        return f"\0{len(counts) - 1}\0"

    text, before = re.sub(r"\\.", "", pattern), ""
    while text != before:  # from the innermost braces outwards
        text, before = re.sub(r"\{[^{}]*\}", replace, text), text
    return product(text)


def _on_server(pattern: str, *, name: str, retry: RetryConfig) -> list[str]:
    """Return the objects of a bucket that match a glob, sorted."""
    scheme = pattern.partition("://")[0].lower()
    if scheme in ("http", "https"):
        raise DataError(
            f"{name}: {shown(pattern)} is a glob, which cannot be expanded over HTTP",
            hint="use braces, such as train-{000000..000007}.tar, or a manifest",
        )
    first = min(pattern.index(sign) for sign in _SIGNS if sign in pattern)
    folder = pattern[:first].rpartition("/")[0]
    if folder.count("/") < 2:  # a glob may not match the bucket name itself
        raise DataError(f"{name}: {shown(pattern)} does not name its bucket", hint="name the bucket without wildcards")
    try:
        names = sorted(ObjectFolder(folder, retry).sizes())
    except RemoteError as error:
        raise DataError(f"{name}: {shown(folder)} cannot be listed: {error.what}", hint=error.hint) from None
    found: list[str] = []
    with suppress(re.error):  # an empty range such as [9-0]
        matches = re.compile(_as_regex(pattern[len(folder) + 1 :])).fullmatch
        found = [f"{folder}/{one}" for one in names if matches(one)]
    if not found:
        raise DataError(
            f"{name}: no object matches {shown(pattern)!r}",
            hint=f"check the pattern; {shown(folder)} holds {len(names)} objects"
            + (f", such as {names[0]!r}" if names else ""),
        )
    return found


def _as_regex(pattern: str) -> str:
    """Translate a glob to a regular expression with :mod:`glob`'s rules: only ``**`` crosses folders."""
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    out = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL):
        if len(token) > 2 and token[0] == "[":
            inner = token[1:-1].replace("\\", "\\\\").replace("[", "\\[").replace("^", "\\^")
            out.append(f"[{'^' + inner[1:] if inner[0] == '!' else inner}]")
        else:
            out.append(words.get(token) or re.escape(token))
    return "".join(out)


def _lines(place: str, *, name: str, retry: RetryConfig) -> Iterator[str]:
    """Yield the specifications in a text file, relative to its folder, skipping empty lines and comments."""
    try:
        text = read_remote_text(place, retry) if is_remote(place) else read_text(place)
    except RemoteError as error:
        raise DataError(f"{name}: the list cannot be read: {error.what}", hint=error.hint) from None
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else "") or f"it {error}"
        raise DataError(f"{name}: list {place} cannot be read: {why}", hint="write one shard per line") from None
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"{name}: list {shown(place)} names no shards", hint="write one shard or pattern per line")
    for line in lines:
        spec = _expanded(line, name=name)
        if path_of(spec).endswith(_LIST_SUFFIXES):
            raise DataError(
                f"{name}: list {shown(place)} names another list, {shown(spec)!r}", hint="copy its lines instead"
            )
        if is_remote(spec):
            yield spec
        elif is_remote(place):
            yield sibling(place, spec)
        else:
            yield os.path.join(os.path.dirname(place), spec)


def _require_files(paths: Sequence[str], *, name: str) -> None:
    """Raise a DataError if a local path is missing or is not a file."""
    there = together(os.path.isfile, paths, quick=True)
    missing = [path for path, is_there in zip(paths, there, strict=True) if not is_there]
    if missing:
        what, hint = why_missing(missing[0])
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{name}: {what}{more}", hint=hint)


def why_missing(path: str, listed: str = "") -> tuple[str, str]:
    """Return what is wrong with the path of a missing shard, and a hint; ``listed`` says where it is listed."""
    folder = Path(path).parent
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            return (
                f"shard {path}{listed} is a link to {os.readlink(path)!r}, which does not exist",
                "restore it, or the link",
            )
        return f"shard {path}{listed} does not exist", f"correct the pattern; {_others(folder, Path(path).name)}"
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else "") or str(error)
        shortened = path if len(path) <= _QUOTED else f"{path[:_QUOTED]}..."
        return (
            f"shard {shortened!r}{listed} cannot be read: {why}",
            "correct the pattern, or the permissions of its folders",
        )
    if stat.S_ISDIR(kind):
        tars = False
        with suppress(OSError):  # the folder may not be readable
            tars = any(name.endswith(".tar") for name in os.listdir(path))
        return f"shard {path}{listed} is a folder", f"name the shards in it: {path}/{'*.tar' if tars else 'NAME.tar'}"
    return f"shard {path}{listed} is not a regular file", "name a tar file"


def _others(folder: Path, name: str) -> str:
    """Describe what a folder contains instead of a missing name."""
    if not folder.is_dir():
        return f"folder {folder} does not exist"
    names = sorted(path.name for path in folder.glob("*.tar") if path.is_file())
    if not names:
        return f"folder {folder} holds no .tar files"
    if len(names) <= _NAMED or nearest(name, names).startswith("did"):
        return nearest(name, names)
    return f"folder {folder} holds {len(names)} .tar files, such as {names[0]}"
