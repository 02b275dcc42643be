"""Ranged reads of remote files (http, https, s3, gs and any other scheme fsspec opens), with retries.

:class:`RemoteFile` returns a file's size and any range of its bytes. Every answer is verified: the length always,
and over HTTP also the status, the ``Content-Range`` and the ``ETag``. A short body, a server that ignores ranges or a
file replaced between reads is an error and never becomes data. Server errors, time-outs and dropped connections are
retried with jittered exponential backoff within a budget. Permanent errors (not found, forbidden) are not retried.
Cost: one request per read, and one for the size.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit, urlunsplit

from disttrain.data.remote.http_range import HTTP, Answer, AttemptError
from disttrain.data.remote.requests import NoLibraryError, describe, fetch, tells_state
from disttrain.errors import ConfigError, ShardError
from disttrain.system.heartbeat import beat
from disttrain.system.terminal import redacted

T = TypeVar("T")

WINDOW_BYTES: Final = 2**20
"""Bytes that a header scan reads at once: a request costs about as much time as a megabyte."""

_URL: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_WAIT: Final = "check the server and the network, then run again: it will resume"


@dataclass(frozen=True)
class RetryConfig:
    """Retry policy for reads. It never affects what is read.

    Attributes:
        attempts: requests for one range, the first included.
        base_seconds: wait before the second attempt; it doubles with each further attempt, and half of it is random.
        max_seconds: longest wait between two attempts.
        budget_seconds: no attempt starts later than this after the first.
        timeout_seconds: a connection that is silent for this long counts as dropped.
    """

    attempts: int = 8
    base_seconds: float = 0.5
    max_seconds: float = 20.0
    budget_seconds: float = 300.0
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigError(f"retry.attempts is {self.attempts}", hint="use at least 1 (1 tries once)")
        for name in ("base_seconds", "max_seconds", "budget_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"retry.{name} is {getattr(self, name)}", hint="use 0 or more seconds")
        if self.timeout_seconds <= 0:
            raise ConfigError(f"retry.timeout_seconds is {self.timeout_seconds}", hint="use more than 0 seconds")

    def wait_seconds(self, failed: int, chance: float) -> float:
        """Return the wait after ``failed`` attempts; ``chance`` in [0, 1) is the jitter."""
        longest = min(self.max_seconds, self.base_seconds * 2.0 ** (failed - 1))
        return longest * (0.5 + 0.5 * chance)


DEFAULT_RETRY: Final = RetryConfig()


class RemoteError(ShardError):
    """Raised if a remote file cannot be accessed; ``status`` is the last HTTP status, if known."""

    def __init__(self, what: str, *, hint: str = "", status: int | None = None) -> None:
        super().__init__(what, hint=hint)
        self.status = status


@dataclass(eq=False)
class RemoteFile:
    """A remote file of known size, read by ranges. Thread-safe.

    Args:
        url: its URL.
        retry: retry policy.
        size: its size in bytes; requested from the server if not given.
        version: the server's identifier of its contents (the ``ETag``); requested with the size.
        checksum: algorithm and hexadecimal digest of its contents, if the server reports one; requested with the size.
        sleep: waits between attempts.

    Raises:
        RemoteError: it cannot be read; names URL, status, attempts and the source of the credentials.
        ConfigError: the library for this kind of URL is not installed, or the URL's secret was redacted.
    """

    url: str
    retry: RetryConfig = field(default_factory=RetryConfig)
    size: int = -1
    version: str = ""
    checksum: tuple[str, str] = ("", "")
    sleep: Callable[[float], None] = time.sleep
    window_bytes: int = WINDOW_BYTES

    def __post_init__(self) -> None:
        if "://...@" in self.url or self.url.endswith("?..."):
            raise ConfigError(
                f"{self.url} is a redacted URL, as shown in records of runs: its password or signature was removed",
                hint="use environment variables, https://$USER:$PASSWORD@host/..., or the full URL; for a signed URL,"
                " use the full URL",
            )
        # A private generator: jitter from the global one would make the run's random numbers depend on the network.
        self._random = random.Random()
        if self.size < 0:
            found = self._try(lambda: describe(self.url, self.retry.timeout_seconds))
            self.size, self.version, self.checksum = found.total or 0, found.version, found.checksum

    @property
    def name(self) -> str:
        """Its name in error messages: the URL without passwords and signatures."""
        return shown(self.url)

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes ``[offset, offset + length)``, fewer only at the end of the file.

        Raises:
            RemoteError: they cannot be read.
        """
        stop = min(offset + length, self.size)
        data = self._try(lambda: self._read(offset, stop)) if stop > offset else b""
        beat()
        return data

    def confirm(self) -> None:
        """Check that the file still has the known size and version.

        Over HTTP every read already checks this, so no request is sent.

        Raises:
            RemoteError: the file was replaced, or cannot be checked.
        """
        if not tells_state(self.url):
            self._try(lambda: self._same_state(describe(self.url, self.retry.timeout_seconds)))

    def _same_state(self, answer: Answer) -> None:
        size, version = answer.total or 0, answer.version
        if size != self.size or (self.version and version and version != self.version):
            what = (
                f"it has {size} bytes, not {self.size}"
                if size != self.size
                else "it is a different file of the same size"
            )
            raise AttemptError(
                f"the file was replaced: {what}",
                again=False,
                hint="rerun once its upload is done, to index it again; rewrite its manifest, if it has one",
            )

    def _read(self, start: int, stop: int) -> bytes:
        answer = fetch(self.url, start, stop, self.retry.timeout_seconds)
        if answer.total is not None:
            self._same_state(answer)
            self.version = self.version or answer.version  # pin the version: all later reads must match the first
        if len(answer.body) != stop - start:
            raise AttemptError(f"received {len(answer.body)} bytes for the range {start}-{stop - 1}", again=True)
        return answer.body

    def _try(self, attempt: Callable[[], T]) -> T:
        return try_again(attempt, self.url, self.retry, sleep=self.sleep, chance=self._random.random)


def try_again(
    attempt: Callable[[], T],
    url: str,
    retry: RetryConfig,
    *,
    sleep: Callable[[float], None] = time.sleep,
    chance: Callable[[], float] | None = None,
) -> T:
    """Retry an operation until it succeeds, fails permanently or exhausts its budget.

    Args:
        attempt: the operation; may raise an ``AttemptError``.
        url: the URL it accesses, for the message.
        retry: retry policy.
        sleep: waits between attempts.
        chance: source of jitter, numbers in [0, 1).

    Raises:
        RemoteError: the last attempt failed; names URL, status, attempts and the source of the credentials.
        ConfigError: the library for this kind of URL is not installed.
    """
    chance = chance or random.Random().random  # never the global generator, which belongs to the run
    started = time.monotonic()
    for number in range(1, retry.attempts + 1):
        try:
            return attempt()
        except AttemptError as failed:
            wait = max(retry.wait_seconds(number, chance()), failed.after_seconds)
            spent = time.monotonic() - started
            over = number == retry.attempts or spent + wait > retry.budget_seconds
            if over or not failed.again:
                raise _error(url, failed, number, spent) from None
        except NoLibraryError as error:
            raise ConfigError(f"{shown(url)} cannot be read: {error}", hint=error.hint) from None
        sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _error(url: str, failed: AttemptError, attempts: int, seconds: float) -> RemoteError:
    tries = "1 attempt" if attempts == 1 else f"{attempts} attempts in {seconds:.1f} s"
    status = f"HTTP {failed.status}: " if failed.status is not None else ""
    # A library's message may contain the unredacted URL.
    return RemoteError(
        f"{shown(url)}: {status}{redacted(str(failed))} ({tries}; credentials: {credential_source(url)})",
        hint=failed.hint or _WAIT,
        status=failed.status,
    )


def is_remote(path: str) -> bool:
    """Return whether a path is a URL."""
    return _URL.match(path) is not None


def shown(url: str) -> str:
    """Return a URL for messages: without the password and the query, which may hold a signature."""
    if not is_remote(url):
        return url
    try:
        parts = urlsplit(url)
    except ValueError:  # a host with unmatched brackets
        return f"{url.partition('://')[0]}://..."
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(
        (parts.scheme, host, parts.path, "...", "") if parts.query else (parts.scheme, host, parts.path, "", "")
    )


def sibling(url: str, name: str) -> str:
    """Return the URL of a file in the same folder, with the same query."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def credential_source(url: str) -> str:
    """Describe where the credentials for a URL come from, never their values."""
    parts, env = urlsplit(url), os.environ
    scheme = parts.scheme.lower()
    if scheme in HTTP:
        return "user name in the URL" if "@" in parts.netloc else "query of the URL" if parts.query else "anonymous"
    if scheme in ("s3", "s3a"):
        if env.get("FSSPEC_S3_ANON", "").lower() in ("true", "1"):
            return "anonymous (FSSPEC_S3_ANON)"
        for name in ("FSSPEC_S3_KEY", "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE"):
            if env.get(name):
                return f"environment {name}"
        profile = f", profile {env['AWS_PROFILE']}" if env.get("AWS_PROFILE") else ""
        for name, usual in (
            ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
            ("AWS_CONFIG_FILE", "~/.aws/config"),
        ):
            if Path(env.get(name, usual)).expanduser().is_file():
                return f"{env.get(name, usual)}{profile}"
        return "none found in the environment or ~/.aws; the machine's own role, if it has one"
    if scheme in ("gs", "gcs"):
        for name in ("FSSPEC_GS_TOKEN", "FSSPEC_GCS_TOKEN"):
            if env.get(name):
                return f"anonymous ({name})" if env[name] == "anon" else f"environment {name}"
        if env.get("GOOGLE_APPLICATION_CREDENTIALS"):
            return "environment GOOGLE_APPLICATION_CREDENTIALS"
        usual = "~/.config/gcloud/application_default_credentials.json"
        return usual if Path(usual).expanduser().is_file() else "none found; the machine's own account, or anonymous"
    return "as configured for fsspec"
