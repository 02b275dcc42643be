"""Single attempts to read from or write to a server, with errors classified as retryable or not.

:func:`describe` and :func:`fetch` use fsspec's file systems; HTTP requests are made by
:mod:`disttrain.data.remote.http_range`. Every failure becomes an :class:`AttemptError` with a description, the status
if known, and whether to retry. The libraries' own retries are disabled, so that attempts are counted in one place.
Cost: one request; two to describe a file on S3 or GCS.
"""

from __future__ import annotations

import importlib
import os
import re
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import Any, Final

from disttrain.data.remote.http_range import (
    HTTP,
    WAITING_HELPS,
    Answer,
    AttemptError,
    digest_of,
    get_range,
    md5_of_etag,
)
from disttrain.system.heartbeat import beat

_S3: Final = ("s3", "s3a")
_GCS: Final = ("gs", "gcs")
_LOCAL: Final = ("file", "local")
NO_BUCKET: Final = "bucket does not exist"
"""Part of the message with which stores report a missing bucket, as opposed to a missing object."""
_NO_CREDENTIALS: Final = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError")
_BAD_URLS: Final = ("InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError")
_BUGS: Final = (ImportError, AttributeError, NameError, TypeError)
_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE")
_IN_WORDS: Final = {
    "ClientPayloadError": "the connection was lost during the response",
    "IncompleteReadError": "the connection was lost during the response",
    "ResponseStreamingError": "the connection was lost during the response",
    "ServerDisconnectedError": "the connection was lost before the response",
    "ClientOSError": "the connection was lost before the response",
    "ClientConnectionResetError": "the connection was lost before the response",
    "ConnectionClosedError": "the connection was lost before the response",
    "ClientConnectorDNSError": "the host name cannot be resolved",
}


class NoLibraryError(Exception):
    """Raised if URLs of this kind cannot be opened here; ``hint`` is the hint."""

    def __init__(self, what: str, *, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


def tells_state(url: str) -> bool:
    """Return whether every response reports size and version of its file."""
    return _scheme(url) in HTTP


def describe(url: str, timeout: float) -> Answer:
    """Return size, version and checksum of a file; ``timeout`` is how many seconds a connection may be silent.

    Raises:
        AttemptError: the request failed.
        NoLibraryError: the library for such URLs is not installed, or does not exist.
    """
    if tells_state(url):
        # GET, not HEAD: a signed URL allows only one method, and this also verifies that ranges work.
        return _http_get(url, 0, 1, timeout)
    info = _call(url, "info", timeout)
    if info.get("type") == "directory":
        raise AttemptError("it is a folder", again=False, status=404)
    version = str(info.get("generation") or info.get("ETag") or info.get("etag") or "").strip('"')
    checksum = digest_of("md5", info.get("md5Hash") or "")
    if _scheme(url) in _S3 and "-" not in version:
        checksum = _s3_checksum(url, version, timeout)
    return Answer(b"", int(info["size"]), version, checksum)


def fetch(url: str, start: int, stop: int, timeout: float) -> Answer:
    """Return the bytes ``[start, stop)``, which must lie inside the file; raises like :func:`describe`."""
    if tells_state(url):
        return _http_get(url, start, stop, timeout)
    return Answer(_call(url, "cat_file", timeout, start=start, end=stop))


def fetch_whole(url: str, timeout: float) -> bytes:
    """Return all bytes of a small object; raises like :func:`describe`."""
    return bytes(_call(url, "cat_file", timeout))


def put(url: str, data: bytes, timeout: float) -> None:
    """Create or replace an object; readers see the old or the new one. Raises like :func:`describe`."""
    _call(url, "pipe_file", timeout, data)


def upload(path: str, url: str, timeout: float) -> None:
    """Upload a local file as an object, which appears once it is complete; raises like :func:`describe`.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb"):
        pass  # report a local error as such, not as the server's
    from fsspec.callbacks import Callback

    # fsspec calls this after every part it has sent.
    progress = Callback(hooks={"beat": lambda *_, **__: beat()})
    _call(url, "put_file", timeout, before=(path,), callback=progress)


def remove(url: str, timeout: float) -> None:
    """Delete an object; raises like :func:`describe`, with status 404 if it does not exist."""
    _call(url, "rm_file", timeout)
    if _scheme(url) in _LOCAL:  # on object stores a folder vanishes with its last object
        with suppress(OSError):
            os.rmdir(os.path.dirname(_filesystem(url, timeout)._strip_protocol(url)))


def listing(url: str, timeout: float) -> dict[str, int]:
    """Return the sizes of all objects below a URL, by relative name; raises like :func:`describe`."""
    found = _call(url, "find", timeout, detail=True)
    begin = _filesystem(url, timeout)._strip_protocol(url).rstrip("/") + "/"
    return {name.removeprefix(begin): int(of["size"] or 0) for name, of in found.items() if name.startswith(begin)}


def _s3_checksum(url: str, etag: str, timeout: float) -> tuple[str, str]:
    """Return the MD5 in an S3 ETag, if it is one. That depends on the encryption, which s3fs does not report."""
    system = _filesystem(url, timeout)
    bucket, key, _ = system.split_path(url)
    try:
        head = system.call_s3("head_object", Bucket=bucket, Key=key)
    except Exception as error:  # botocore's, aiohttp's and the operating system's
        raise _failed(error, timeout) from None
    return md5_of_etag(etag, head.get("ServerSideEncryption"), head.get("SSECustomerAlgorithm"))


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


_FILESYSTEMS: dict[tuple[int, str, float], Any] = {}
_LOCK: Final = Lock()


def _filesystem(url: str, timeout: float) -> Any:
    """Return fsspec's file system for a URL: one per process, since fsspec's own cache keeps one per thread."""
    scheme = _scheme(url)
    with _LOCK:
        key = (os.getpid(), scheme, timeout)
        if key not in _FILESYSTEMS:
            _FILESYSTEMS[key] = _new_filesystem(scheme, timeout)
        return _FILESYSTEMS[key]


def _new_filesystem(scheme: str, timeout: float) -> Any:
    if scheme in _GCS:
        # gcsfs's support for zonal buckets queries the bucket type over gRPC at each read.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec

        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise NoLibraryError(str(error), hint="run `pip install 'disttrain[cloud]'`") from None
    except ValueError as error:
        raise NoLibraryError(str(error), hint="use http, https, s3 or gs") from None
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in _S3:
        limits = {"connect_timeout": timeout, "read_timeout": timeout}
        found = kind(**options, config_kwargs={"retries": {"max_attempts": 0}, **limits})
        found.retries = 1  # attempts of s3fs's own loop, on top of botocore's
    elif scheme in _GCS:
        import aiohttp

        if os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"].lower() == "false":  # gcsfs may be imported already
            kind = importlib.import_module("gcsfs.core").GCSFileSystem
        limit = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        found = kind(**options, requests_timeout=limit)
        once = getattr(kind._request, "__wrapped__", None)
        if once is not None:  # bypass the decorator that retries six times
            found._request = partial(once, found)
    elif scheme in _LOCAL:
        found = kind(**options, auto_mkdir=True)
    elif scheme in HTTP:
        # A body compressed against our request must reach the caller to be rejected, not fail here and be retried.
        found = kind(**options, client_kwargs={"auto_decompress": False})
    else:
        found = kind(**options)
    return found


def _call(url: str, method: str, timeout: float, *after: Any, before: tuple[Any, ...] = (), **arguments: Any) -> Any:
    """Call a method of fsspec's file system and classify its failures."""
    try:
        system = _filesystem(url, timeout)
        if not system.async_impl:
            return getattr(system, method)(*before, url, *after, **arguments)
        from fsspec.asyn import sync

        # S3 and GCS limit silence, set above. For others only the whole call can be limited, which would break uploads.
        whole = None if method == "put_file" or _scheme(url) in (*_S3, *_GCS) else timeout
        return sync(system.loop, getattr(system, f"_{method}"), *before, url, *after, timeout=whole, **arguments)
    except NoLibraryError:
        raise
    except Exception as error:  # each library raises its own types
        raise _failed(error, timeout) from None


def _failed(error: Exception, timeout: float) -> AttemptError:
    """Translate an exception of any library to an AttemptError."""
    status = _status_of(error)
    _let_go(error)
    kind, text = type(error).__name__, " ".join(str(error).split())
    if status is None and isinstance(error, FileNotFoundError):
        status = 404
    # gcsfs reports 403 this way.
    if status is None and (isinstance(error, PermissionError) or text.startswith("Forbidden")):
        status = 403
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
        return _untrusted(text)
    if any(sign in text for sign in _NO_TLS):
        hint = "correct the port, or use http:// if no encryption is intended"
        return AttemptError("the server does not speak TLS on this port", again=False, hint=hint)
    if kind in _NO_CREDENTIALS:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket"
        return AttemptError(f"no credentials: {text}", again=False, hint=hint)
    may_pass = kind not in _BAD_URLS and not isinstance(error, _BUGS)
    again = may_pass and (status is None or status in WAITING_HELPS)
    if status is not None and status >= 400:
        # For a missing file the library's text adds nothing; for a missing bucket it does.
        what = f"the server refused the request: {text}" if status != 404 or NO_BUCKET in text else "not found"
    elif isinstance(error, TimeoutError) or "Timeout" in kind:
        what = f"the server sent nothing for {timeout:g} s"
    elif kind in ("ClientConnectorError", "EndpointConnectionError"):
        refused = "refused" in text or isinstance(getattr(error, "os_error", None), ConnectionRefusedError)
        what = "the connection was refused" if refused else f"cannot connect: {text}"
    else:
        what = _IN_WORDS.get(kind) or (f"{kind}: {text}" if text else kind)
    return AttemptError(what, again=again, status=status)


def _let_go(error: BaseException | None) -> None:
    """Drop the tracebacks of an exception and of its causes.

    fsspec's frames and the exception form a reference cycle. Until a garbage collection it would keep all callers'
    variables alive, and with them locked files.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _untrusted(text: str) -> AttemptError:
    """Return the error for a certificate that does not verify, with the reason."""
    found = re.search(r"certificate verify failed:? ?([^(\"'\]]*[^(\"'\] ])?", text)
    why = (found[1] or "").rstrip(". ") if found else ""
    hint = (
        "to trust it, set SSL_CERT_FILE (for s3: AWS_CA_BUNDLE) to a PEM file with this certificate or that of its"
        " authority"
    )
    if "expired" in why:
        hint = "renew the server's certificate, and check this machine's clock"
    elif "ostname mismatch" in why or "IP address mismatch" in why:
        hint = "use the host name that the certificate was issued for"
    return AttemptError(f"the server's certificate is not trusted: {why or text}", again=False, hint=hint)


def _status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status in an exception or in one of its causes."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif type(error).__module__ == "aiohttp.http_exceptions":
            found = None  # aiohttp invents this code: 400 for a dropped connection
        else:
            found = error.status if hasattr(error, "status") else getattr(error, "code", None)
        if isinstance(found, int) and 100 <= found < 600:
            return found
        error = error.__cause__ or error.__context__
    return None


def _http_get(url: str, start: int, stop: int, timeout: float) -> Answer:
    system = _filesystem(url, timeout)
    from fsspec.asyn import sync

    async def get() -> Answer:
        return await get_range(await system.set_session(), url, start, stop, timeout)

    try:
        answer: Answer = sync(system.loop, get)
    except AttemptError as error:
        _let_go(error)
        raise
    except Exception as error:  # aiohttp's, asyncio's and the operating system's
        raise _failed(error, timeout) from None
    return answer
