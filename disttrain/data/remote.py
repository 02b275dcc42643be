"""Ranged reads of remote files (http, https, s3, gs and whatever else fsspec opens), with retries.

:class:`RemoteFile` gives a file's size and any range of its bytes. What it returns is what was asked for: the
length is checked, and over HTTP also the status, the ``Content-Range`` and the ``ETag``, so that a short body,
a server that ignores ranges and a file replaced halfway are errors, never data. Server errors, time-outs
and cut connections are tried again with jittered exponential waits inside a budget; what will not change by
waiting (not found, forbidden) is not. Cost: one request a read, and one for the size.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit, urlunsplit

from disttrain.errors import ConfigError, ShardError

T = TypeVar("T")

WINDOW_BYTES: Final = 2**20
"""What a header scan reads at once: a request costs about as long as a megabyte."""

_URL: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_HTTP: Final = ("http", "https")
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_WAITING_HELPS: Final = frozenset({408, 425, 429})
_NO_CREDENTIALS: Final = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
_MENDS: Final = {
    0: "check the server and the network, then run again: it will resume",
    401: "give credentials that may read it",
    403: "give credentials that may read it (some servers also say so of a file that is not there)",
    404: "correct the URL, or upload the file",
}


@dataclass(frozen=True)
class RetryConfig:
    """How long a read is tried. None of it changes what is read.

    Attributes:
        attempts: requests for one range, the first included.
        base_seconds: wait before the second attempt; it doubles with each, and the half of it is random.
        max_seconds: longest wait between two attempts.
        budget_seconds: no attempt is begun later than this after the first.
        timeout_seconds: a connection that is silent for so long counts as cut.
    """

    attempts: int = 8
    base_seconds: float = 0.5
    max_seconds: float = 20.0
    budget_seconds: float = 300.0
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigError(f"retry.attempts is {self.attempts}", mend="use at least 1 (1 tries once)")
        for name in ("base_seconds", "max_seconds", "budget_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"retry.{name} is {getattr(self, name)}", mend="use 0 or more seconds")
        if self.timeout_seconds <= 0:
            raise ConfigError(f"retry.timeout_seconds is {self.timeout_seconds}", mend="use more than 0 seconds")

    def wait_seconds(self, failed: int, chance: float) -> float:
        """The wait after that many failed attempts; ``chance`` in [0, 1) is the jitter."""
        longest = min(self.max_seconds, self.base_seconds * 2.0 ** (failed - 1))
        return longest * (0.5 + 0.5 * chance)


class RemoteError(ShardError):
    """A remote file that cannot be read; ``status`` is the last HTTP status, where one is known."""

    def __init__(self, what: str, *, mend: str = "", status: int | None = None) -> None:
        super().__init__(what, mend=mend)
        self.status = status


class _AttemptError(Exception):
    """One attempt that failed, in words; ``again`` where another may succeed."""

    def __init__(self, what: str, *, again: bool, status: int | None = None) -> None:
        super().__init__(what)
        self.again, self.status = again, status


@dataclass(eq=False)
class RemoteFile:
    """A remote file of known size, read by ranges. Safe to use from several threads.

    Args:
        url: where it is.
        retry: how long to try.
        size: its size in bytes; asked of the server where it is not given.
        version: what the server says identifies its contents (the ``ETag``); likewise.
        sleep: waits between attempts.

    Raises:
        RemoteError: it cannot be read; names URL, status, attempts and where credentials came from.
        ConfigError: the library for this kind of URL is not installed.
    """

    url: str
    retry: RetryConfig = field(default_factory=RetryConfig)
    size: int = -1
    version: str = ""
    sleep: Callable[[float], None] = time.sleep
    window_bytes: int = WINDOW_BYTES

    def __post_init__(self) -> None:
        # Its own generator: the global one belongs to the run, whose numbers must not depend on the network.
        self._random = random.Random()
        if self.size < 0:
            self.size, self.version = self._try(self._describe)

    @property
    def name(self) -> str:
        """What error messages call it: the URL without passwords and signatures."""
        return shown(self.url)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes ``[offset, offset + length)``, fewer only where the file ends before.

        Raises:
            RemoteError: they cannot be read.
        """
        stop = min(offset + length, self.size)
        return self._try(lambda: self._read(offset, stop)) if stop > offset else b""

    def _try(self, attempt: Callable[[], T]) -> T:
        started = time.monotonic()
        for number in range(1, self.retry.attempts + 1):
            try:
                return attempt()
            except _AttemptError as failed:
                wait = self.retry.wait_seconds(number, self._random.random())
                spent = time.monotonic() - started
                over = number == self.retry.attempts or spent + wait > self.retry.budget_seconds
                if over or not failed.again:
                    raise self._error(failed, number, spent) from None
            self.sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _error(self, failed: _AttemptError, attempts: int, seconds: float) -> RemoteError:
        tries = "1 attempt" if attempts == 1 else f"{attempts} attempts in {seconds:.1f} s"
        status = f"HTTP {failed.status}: " if failed.status is not None else ""
        mend = _MENDS.get(failed.status or 0, _MENDS[0])
        if str(failed).startswith(_NO_CREDENTIALS):
            mend = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket"
        return RemoteError(
            f"{self.name}: {status}{failed} ({tries}; credentials: {credential_source(self.url)})",
            mend=mend,
            status=failed.status,
        )

    def _describe(self) -> tuple[int, str]:
        if _is_http(self.url):
            # Not HEAD: a signed URL allows one method only, and this also proves that ranges work.
            answer = _http_get(self.url, 0, 1, self.retry.timeout_seconds)
            return answer.total, answer.version
        info = _call(self.url, "info", self.retry.timeout_seconds)
        return int(info["size"]), str(info.get("ETag") or info.get("etag") or "").strip('"')

    def _read(self, start: int, stop: int) -> bytes:
        if _is_http(self.url):
            answer = _http_get(self.url, start, stop, self.retry.timeout_seconds)
            if answer.total != self.size or (self.version and answer.version and answer.version != self.version):
                raise _AttemptError(
                    f"the file was replaced while it was read ({answer.total} bytes, was {self.size})", again=False
                )
            self.version = self.version or answer.version  # all reads are of one state
            body = answer.body
        else:
            body = _call(self.url, "cat_file", self.retry.timeout_seconds, start=start, end=stop)
        if len(body) != stop - start:
            raise _AttemptError(f"{len(body)} bytes came for bytes {start}-{stop - 1}", again=True)
        return body


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return _URL.match(path) is not None


def shown(url: str) -> str:
    """A URL as messages may show it: without a password, and without a query, which may hold a signature."""
    if not is_remote(url):
        return url
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(
        (parts.scheme, host, parts.path, "...", "") if parts.query else (parts.scheme, host, parts.path, "", "")
    )


def sibling(url: str, name: str) -> str:
    """The URL of a file in the same folder, with the same query."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def credential_source(url: str) -> str:
    """Where the credentials for a URL come from, in words; never what they are."""
    scheme, env = urlsplit(url).scheme.lower(), os.environ
    if scheme in _HTTP:
        return "user name in the URL" if "@" in urlsplit(url).netloc else "anonymous"
    if scheme in ("s3", "s3a"):
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
        if env.get("GOOGLE_APPLICATION_CREDENTIALS"):
            return "environment GOOGLE_APPLICATION_CREDENTIALS"
        usual = "~/.config/gcloud/application_default_credentials.json"
        return usual if Path(usual).expanduser().is_file() else "none found; the machine's own account, or anonymous"
    return "as fsspec is configured"


@dataclass(frozen=True)
class _Answer:
    """What a server said to a range request: the file's whole size, its version and the bytes."""

    total: int
    version: str
    body: bytes


_FILESYSTEMS: dict[tuple[int, str, float], Any] = {}
_LOCK: Final = Lock()


def _is_http(url: str) -> bool:
    return urlsplit(url).scheme.lower() in _HTTP


def _filesystem(url: str, timeout: float) -> Any:
    """fsspec's file system for a URL: one a process, since fsspec's own cache holds one for every thread."""
    scheme = urlsplit(url).scheme.lower()
    with _LOCK:
        key = (os.getpid(), scheme, timeout)
        if key not in _FILESYSTEMS:
            options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
            if scheme in ("s3", "s3a"):
                # Attempts are counted here, once.
                limits = {"connect_timeout": timeout, "read_timeout": timeout}
                options["config_kwargs"] = {"retries": {"max_attempts": 0}, **limits}
            try:
                import fsspec

                found = fsspec.filesystem(scheme, **options)
            except ImportError as error:
                raise ConfigError(
                    f"{shown(url)} cannot be read: {error}", mend="run `pip install 'disttrain[cloud]'`"
                ) from None
            except ValueError as error:
                raise ConfigError(f"{shown(url)} cannot be read: {error}", mend="use http, https, s3 or gs") from None
            if scheme in ("s3", "s3a"):
                found.retries = 1
            _FILESYSTEMS[key] = found
        return _FILESYSTEMS[key]


def _call(url: str, method: str, timeout: float, **arguments: Any) -> Any:
    """A method of fsspec's file system, its failures told apart."""
    system = _filesystem(url, timeout)
    try:
        if system.async_impl:
            from fsspec.asyn import sync

            return sync(system.loop, getattr(system, f"_{method}"), url, timeout=timeout, **arguments)
        return getattr(system, method)(url, **arguments)
    except Exception as error:  # each library raises its own kinds
        raise _failed(error) from None


def _failed(error: Exception) -> _AttemptError:
    """What one attempt's exception says, whichever library raised it."""
    status = _status_of(error)
    if status is None and isinstance(error, FileNotFoundError):
        status = 404
    if status is None and isinstance(error, PermissionError):
        status = 403
    kind = type(error).__name__
    text = str(error).strip()
    refused = kind in (*_NO_CREDENTIALS, "InvalidURL", "NonHttpUrlClientError")
    again = not refused and (status is None or status >= 500 or status in _WAITING_HELPS)
    return _AttemptError(f"{kind}: {text}" if text else kind, again=again, status=status)


def _status_of(error: BaseException | None) -> int | None:
    """The HTTP status in an exception or in what caused it."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif type(error).__module__ == "aiohttp.http_exceptions":
            found = None  # its code is made up: 400 for a connection that was cut
        else:
            found = getattr(error, "status", None) or getattr(error, "code", None)
        if isinstance(found, int) and 100 <= found < 600:
            return found
        error = error.__cause__ or error.__context__
    return None


def _http_get(url: str, start: int, stop: int, timeout: float) -> _Answer:
    system = _filesystem(url, timeout)
    from fsspec.asyn import sync

    try:
        status, headers, body = sync(system.loop, _http_request, system, url, start, stop, timeout)
    except Exception as error:  # aiohttp's, asyncio's and the operating system's
        raise _failed(error) from None
    version = headers.get("ETag", "").removeprefix("W/").strip('"')
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if status == 416 and found and int(found[3]) <= start:  # the file ends before
        return _Answer(int(found[3]), version, b"")
    if status == 200:
        raise _AttemptError("the server ignores range requests and sends the whole file", again=False, status=status)
    if status != 206:
        raise _AttemptError("the server refuses", again=status >= 500 or status in _WAITING_HELPS, status=status)
    if found is None or found[1] is None:
        raise _AttemptError(f"Content-Range {headers.get('Content-Range')!r} makes no sense", again=True, status=status)
    first, last, total = int(found[1]), int(found[2]), int(found[3])
    if first != start or last != min(stop, total) - 1:
        raise _AttemptError(f"bytes {first}-{last} came for bytes {start}-{stop - 1}", again=True, status=status)
    if len(body) != last - first + 1:
        raise _AttemptError(f"{len(body)} bytes came for bytes {start}-{stop - 1}", again=True, status=status)
    return _Answer(total, version, body)


async def _http_request(system: Any, url: str, start: int, stop: int, timeout: float) -> tuple[int, Any, bytes]:
    import aiohttp

    session = await system.set_session()
    # identity: a compressed body has no bytes at these places
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    async with session.get(system.encode_url(url), headers=headers, timeout=limits) as response:
        # The body of anything else is of no use, and may be a whole shard.
        body = await response.read() if response.status == 206 else b""
        return response.status, response.headers, body
