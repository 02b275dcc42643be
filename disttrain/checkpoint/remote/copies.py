"""Copies of a run's checkpoints on remote storage: listing, fencing and pruning.

A copy is a folder of objects named after the checkpoint's directory and the attempt that made it, such as
``step-00000285.a2-b9f34c9a``, so two attempts never write the same object. Its marker is written last, with the same
bytes as the local one, including all checksums. A copy without a marker, or with an object of a different size, does
not count. The object ``ATTEMPT`` names the newest attempt, like the local file. A new attempt writes it first, then
deletes copies without a marker. An older process reads ``ATTEMPT`` before it writes a marker; if it had already passed
that check, the files that its marker lists are gone. So a late marker never makes a checkpoint. Needs no torch.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from disttrain.checkpoint.format.checksum import Sum
from disttrain.checkpoint.format.fence import FENCE, Attempt, FencedError, claim, run_of
from disttrain.checkpoint.format.marker import MARKER, Committed, parse
from disttrain.checkpoint.format.retention import Keep
from disttrain.data.remote.objects import ObjectFolder
from disttrain.data.remote.ranges import RemoteError, RetryConfig, is_remote, shown
from disttrain.errors import CheckpointError, ConfigError
from disttrain.system.reading import parse_json

_NAME: Final = re.compile(r"(step-\d{8,}(?:\.\d+)?)\.(a\d+-[0-9a-f]+)")
_READ_ONLY: Final = ("http", "https")
_MENDS: Final = {
    401: "give credentials that can read, write, list and delete there",
    403: "give credentials that can read, write, list and delete there",
    404: "create the bucket, or correct the URL",
}


@dataclass(frozen=True)
class MirrorConfig:
    """Where committed checkpoints are copied to.

    Attributes:
        url: a folder for this run alone, such as ``s3://bucket/runs/digits``; null for no copies.
        on_error: if a copy fails, ``continue`` keeps training and records an event; ``stop`` ends the run.
        retry: how long requests are retried.
    """

    url: str | None = None
    on_error: Literal["continue", "stop"] = "continue"
    retry: RetryConfig = field(default_factory=RetryConfig)

    def __post_init__(self) -> None:
        if self.url is None:
            return
        scheme, _, rest = self.url.partition("://")
        if not is_remote(self.url) or scheme.lower() in _READ_ONLY or not rest.strip("/"):
            raise ConfigError(
                f"checkpoints cannot be copied to {shown(self.url) if rest else self.url!r} (checkpoint.mirror.url)",
                hint="use a URL such as s3://bucket/folder, gs://bucket/folder or file:///folder",
            )


@dataclass(frozen=True)
class Stored:
    """A committed copy.

    Attributes:
        name: name of its folder of objects.
        entry: what its marker records; the path is the name of the directory it was copied from.
        marker: the marker's bytes.
    """

    name: str
    entry: Committed
    marker: bytes = field(repr=False)


class Mirror:
    """The copies under a URL. Every method except :attr:`url` contacts the server; call them from one process."""

    def __init__(self, config: MirrorConfig) -> None:
        assert config.url is not None
        self.config = config
        self._folder = ObjectFolder(config.url.rstrip("/"), config.retry)
        self._markers: dict[str, bytes] = {}  # a cache: markers never change

    @property
    def url(self) -> str:
        """Where the copies are, in a form safe for messages."""
        return shown(self._folder.url)

    def owner(self) -> dict[str, Any]:
        """Return the newest attempt as recorded in ``ATTEMPT``; empty if there is none.

        Raises:
            CheckpointError: the object cannot be read.
        """
        with self._speaking("cannot be read"):
            data = self._folder.read(FENCE)
        if data is None:
            return {}
        try:
            content = parse_json(data)
        except ValueError:
            content = None
        if not isinstance(content, dict) or not content.get("run"):
            raise CheckpointError(
                f"{self.url}/{FENCE} is damaged, so it is unknown which run owns these checkpoints",
                hint="delete that object, or use another checkpoint.mirror.url",
            )
        return content

    def claim(self, attempt: Attempt) -> list[str]:
        """Become the newest attempt, and delete and return what earlier ones left unfinished.

        Raises:
            CheckpointError: the folder cannot be written, listed or deleted from.
        """
        who = {"host": platform.node(), "pid": os.getpid(), "time": time.time()}
        with self._speaking("cannot be written"):
            self._folder.write(FENCE, (json.dumps({**asdict(attempt), **who}) + "\n").encode())
            unfinished = self._unfinished()
            self.guard(attempt)  # after listing, so none of these belong to a newer attempt
            self._folder.remove(unfinished)
        return [self._never(name) for name in sorted({path.partition("/")[0] for path in unfinished})]

    def guard(self, attempt: Attempt) -> None:
        """Raise unless this is the newest attempt.

        Raises:
            FencedError: a newer attempt has begun.
            CheckpointError: ``ATTEMPT`` is missing or cannot be read.
        """
        there = self.owner()
        if not there:
            raise CheckpointError(
                f"{self.url}/{FENCE} is gone, so the copies were moved or deleted", hint="restart the run"
            )
        if there.get("token") != attempt.token:
            who = f"attempt {there.get('number')} (host {there.get('host')}, process {there.get('pid')})"
            raise FencedError(
                f"this process is attempt {attempt.number} of run {attempt.run}, but {who} has taken over {self.url};"
                " it will not publish anything",
                hint="let the newer attempt run; this process is stale and exits",
            )

    def committed(self) -> tuple[list[Stored], list[str]]:
        """Return the committed copies, oldest first, and why others do not count.

        Raises:
            CheckpointError: the server cannot be reached.
        """
        found: list[Stored] = []
        passed_over: list[str] = []
        with self._speaking("cannot be listed"):
            for name, files in sorted(self._copies().items()):
                try:
                    found.append(self._check(name, files))
                except CheckpointError as error:
                    passed_over.append(error.what)
        return sorted(found, key=lambda one: (one.entry.global_step, one.entry.about.attempt)), passed_over

    def upload(self, name: str, path: Path) -> None:
        """Upload a file to a copy.

        Raises:
            CheckpointError: it cannot be written.
        """
        with self._speaking("cannot be written"):
            self._folder.upload(f"{name}/{path.name}", path)

    def commit(self, name: str, marker: bytes) -> None:
        """Write the marker of a copy whose files are all uploaded.

        Raises:
            CheckpointError: it cannot be written.
        """
        with self._speaking("cannot be written"):
            self._folder.write(f"{name}/{MARKER}", marker)

    def prune(
        self, keep: Keep, *, attempt: Attempt | None = None, after: str = "", dry_run: bool = False
    ) -> tuple[list[Stored], int]:
        """Delete superfluous copies, markers first.

        Args:
            keep: what to keep.
            attempt: the attempt of this process; its unfinished copies are deleted too.
            after: a copy that must be committed before any other is deleted; it stays.
            dry_run: delete nothing.

        Returns:
            The deleted copies, and how many there were.

        Raises:
            FencedError: a newer attempt has begun.
            CheckpointError: the copy ``after`` is incomplete, or copies cannot be listed or deleted.
        """
        found, passed_over = self.committed()
        superfluous = keep.superfluous([one.entry for one in found])
        gone = [one for one in found if one.name != after and any(one.entry is entry for entry in superfluous)]
        with self._speaking("cannot be deleted"):
            unfinished = self._unfinished(f".{attempt.label}") if attempt is not None else []
            if attempt is not None:
                self.guard(attempt)  # after listing, so none of these belong to a newer attempt
            if after and not any(one.name == after for one in found):
                why = next((reason for reason in passed_over if f"/{after} " in reason), self._never(after))
                raise CheckpointError(
                    f"{why}, though it was just uploaded", hint="check what else deletes objects there"
                )
            if not dry_run:
                self._remove(gone)
                self._folder.remove(unfinished)
        return gone, len(found)

    def forget_after(self, step: int, attempt: Attempt) -> list[str]:
        """Delete copies of later steps for a rollback, newest first and markers first; return their names.

        Raises:
            FencedError: a newer attempt has begun.
            CheckpointError: copies cannot be listed or deleted.
        """
        later = [one for one in self.committed()[0] if one.entry.global_step > step]
        with self._speaking("cannot be deleted"):
            self.guard(attempt)  # after listing, so none of these belong to a newer attempt
            for one in reversed(later):
                self._remove([one])
        return [one.name for one in later]

    def _remove(self, copies: Sequence[Stored]) -> None:
        self._folder.remove(f"{one.name}/{MARKER}" for one in copies)
        self._folder.remove(f"{one.name}/{file}" for one in copies for file in one.entry.files)

    def fault(self, stored: Stored, file: str, into: Path | None = None) -> str:
        """Compare a file of a copy with its checksum in the marker, and optionally download it.

        Args:
            stored: the copy.
            file: name of one of its files.
            into: a directory to write it to, synced.

        Returns:
            What is wrong with the file; empty if it is sound.

        Raises:
            CheckpointError: the server cannot be reached.
            OSError: the file cannot be written.
        """
        due, crc, size = stored.entry.files[file], 0, 0
        with self._speaking("cannot be read"), open(into / file if into else os.devnull, "wb") as out:
            for part in self._folder.parts(f"{stored.name}/{file}", due.num_bytes):
                crc, size = zlib.crc32(part, crc), size + len(part)
                if into:
                    out.write(part)
            if into:
                out.flush()
                os.fsync(out.fileno())
        there = Sum(size, f"{crc:08x}")
        if there == due:
            return ""
        return (
            f"checkpoint {self.url}/{stored.name} is damaged: {file} ({size:,} bytes) has checksum {there.crc32},"
            f" but its marker says {due.crc32}"
        )

    def _copies(self) -> dict[str, dict[str, int]]:
        """Return object sizes of each copy, complete or not."""
        found: dict[str, dict[str, int]] = defaultdict(dict)
        for path, size in self._folder.sizes().items():
            name, _, file = path.partition("/")
            if _NAME.fullmatch(name) and file:
                found[name][file] = size
        return dict(found)

    def _unfinished(self, suffix: str = "") -> list[str]:
        """Return the objects of copies without a marker, of all attempts or of one."""
        return [
            f"{name}/{file}"
            for name, files in self._copies().items()
            if name.endswith(suffix) and MARKER not in files
            for file in files
        ]

    def _check(self, name: str, files: dict[str, int]) -> Stored:
        if MARKER not in files:
            raise CheckpointError(self._never(name))
        if name not in self._markers:
            data = self._folder.read(f"{name}/{MARKER}")
            if data is None:  # deleted since the listing
                raise CheckpointError(self._never(name))
            self._markers[name] = data
        where, data = f"{self.url}/{name}", self._markers[name]
        entry = parse(data.decode(errors="replace"), Path(local_name(name)), shown=where)
        for file, due in entry.files.items():
            if files.get(file) != due.num_bytes:
                state = f"has {files[file]} bytes" if file in files else "is missing"
                raise CheckpointError(
                    f"checkpoint {where} is torn: {file} {state}, but its marker says {due.num_bytes}"
                )
        return Stored(name, entry, data)

    def _never(self, name: str) -> str:
        return f"checkpoint {self.url}/{name} was never committed"

    @contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        """Reraise a server error as a checkpoint error."""
        try:
            yield
        except RemoteError as error:
            raise CheckpointError(
                f"the checkpoint folder {self.url} {what}: {error.what}",
                hint=_MENDS.get(error.status or 0, error.hint),
            ) from None


def local_name(name: str) -> str:
    """Return the name of the directory a copy was made from."""
    found = _NAME.fullmatch(name)
    return found[1] if found else name


def copy_of(url: str) -> tuple[str, str]:
    """Split the URL of a folder of copies, or of one copy, into the folder's URL and the copy's name (or empty)."""
    folder, _, name = url.rstrip("/").rpartition("/")
    return (folder, name) if _NAME.fullmatch(name) else (url, "")


def begin(directory: Path, mirror: Mirror | None, *, run: str = "", adopt: bool = False) -> tuple[Attempt, list[str]]:
    """Begin an attempt in a checkpoint folder and in its mirror. Rank 0 only.

    Args:
        directory: the local folder.
        mirror: the copies, if any.
        run: run id to use if the folder has none.
        adopt: if the local folder has no run id, continue the run whose copies these are.

    Returns:
        The attempt, and which copies were deleted.

    Raises:
        CheckpointError: a folder cannot be written, or the copies belong to another run.
    """
    if mirror is None:
        return claim(directory, run=run), []
    owner = mirror.owner()
    ours, theirs = run_of(directory) or run, str(owner.get("run", ""))
    if theirs and (ours or not adopt) and ours != theirs:
        raise another_run(mirror, theirs, ours)
    number = owner.get("number", 0)
    attempt = claim(directory, run=ours or theirs, after=number if isinstance(number, int) else 0)
    return attempt, mirror.claim(attempt)


def another_run(mirror: Mirror, theirs: str, ours: str) -> CheckpointError:
    """Return the error for copies that belong to another run."""
    this = f"this folder belongs to run {ours}" if ours else "this is a new run"
    return CheckpointError(
        f"checkpoint.mirror.url {mirror.url} holds the checkpoints of run {theirs}, but {this}",
        hint="use another checkpoint.mirror.url for this run; or, to resume that one, a new run_dir with --resume auto",
    )
