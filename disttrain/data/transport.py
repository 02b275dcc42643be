"""One attempt to ask a server for some bytes of a file, or to give it some, and what its failure means.

:func:`describe` and :func:`fetch` go through fsspec's file systems; over HTTP the request is that of
:mod:`disttrain.data.http_range`. Every failure becomes an :class:`AttemptError`: in words, with the status where one
is known, and whether another attempt may succeed. The retries that the libraries make on their own are switched off,
so attempts are counted in one place. Cost: one request; two to describe a file on S3 or GCS.
"""

from __future__ import annotations

import importlib
import os
import re
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import Any, Final

from disttrain.beats import beat
from disttrain.data.http_range import HTTP, WAITING_HELPS, Answer, AttemptError, digest_of, get_range, md5_of_etag

_S3: Final = ("s3", "s3a")
_GCS: Final = ("gs", "gcs")
_LOCAL: Final = ("file", "local")
NO_BUCKET: Final = "bucket does not exist"
"""What stores say of a bucket that is not there, rather than a file."""
_NO_CREDENTIALS: Final = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError")
_BAD_URLS: Final = ("InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError")
_BUGS: Final = (ImportError, AttributeError, NameError, TypeError)
_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE")
_IN_WORDS: Final = {
    "ClientPayloadError": "the connection was cut in the middle of the answer",
    "IncompleteReadError": "the connection was cut in the middle of the answer",
    "ResponseStreamingError": "the connection was cut in the middle of the answer",
    "ServerDisconnectedError": "the connection was cut before the answer",
    "ClientOSError": "the connection was cut before the answer",
    "ClientConnectionResetError": "the connection was cut before the answer",
    "ConnectionClosedError": "the connection was cut before the answer",
    "ClientConnectorDNSError": "the name of the host is not known",
}


class NoLibraryError(Exception):
    """URLs of this kind cannot be opened here; ``mend`` says what would help."""

    def __init__(self, what: str, *, mend: str) -> None:
        super().__init__(what)
        self.mend = mend


def tells_state(url: str) -> bool:
    """Whether every answer tells size and version of the file that it comes from."""
    return _scheme(url) in HTTP


def describe(url: str, timeout: float) -> Answer:
    """Size, version and checksum of a file; ``timeout`` is how many seconds a connection may be silent.

    Raises:
        AttemptError: the server does not say.
        NoLibraryError: the library for such URLs is not installed, or there is none.
    """
    if tells_state(url):
        # Not HEAD: a signed URL allows one method only, and this also proves that ranges work.
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
    """The bytes ``[start, stop)``, which must lie inside the file; errors as those of :func:`describe`."""
    if tells_state(url):
        return _http_get(url, start, stop, timeout)
    return Answer(_call(url, "cat_file", timeout, start=start, end=stop))


def fetch_whole(url: str, timeout: float) -> bytes:
    """All bytes of a small object; errors as those of :func:`describe`."""
    return bytes(_call(url, "cat_file", timeout))


def put(url: str, data: bytes, timeout: float) -> None:
    """Make an object of some bytes, or replace it: readers see the old or the new one. Errors as above."""
    _call(url, "pipe_file", timeout, data)


def upload(path: str, url: str, timeout: float) -> None:
    """Make an object of a local file; it is there once all of it is. Errors as above.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb"):
        pass  # a local error must not look like a server's
    from fsspec.callbacks import Callback

    # It is told of every part that has gone.
    progress = Callback(hooks={"beat": lambda *_, **__: beat()})
    _call(url, "put_file", timeout, before=(path,), callback=progress)


def remove(url: str, timeout: float) -> None:
    """Delete an object; errors as above, and an :class:`AttemptError` of status 404 where it is not there."""
    _call(url, "rm_file", timeout)
    if _scheme(url) in _LOCAL:  # elsewhere a folder is gone with its last object
        with suppress(OSError):
            os.rmdir(os.path.dirname(_filesystem(url, timeout)._strip_protocol(url)))


def listing(url: str, timeout: float) -> dict[str, int]:
    """Sizes of all objects below a URL, by their names from there on; errors as above."""
    found = _call(url, "find", timeout, detail=True)
    begin = _filesystem(url, timeout)._strip_protocol(url).rstrip("/") + "/"
    return {name.removeprefix(begin): int(of["size"] or 0) for name, of in found.items() if name.startswith(begin)}


def _s3_checksum(url: str, etag: str, timeout: float) -> tuple[str, str]:
    """The MD5 that an ETag of S3's may be; what s3fs tells of an object leaves out how it is encrypted."""
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
    """fsspec's file system for a URL: one a process, since fsspec's own cache holds one for every thread."""
    scheme = _scheme(url)
    with _LOCK:
        key = (os.getpid(), scheme, timeout)
        if key not in _FILESYSTEMS:
            _FILESYSTEMS[key] = _new_filesystem(scheme, timeout)
        return _FILESYSTEMS[key]


def _new_filesystem(scheme: str, timeout: float) -> Any:
    if scheme in _GCS:
        # Its support of zonal buckets asks over gRPC, at each read, of what kind the bucket is.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec

        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise NoLibraryError(str(error), mend="run `pip install 'disttrain[cloud]'`") from None
    except ValueError as error:
        raise NoLibraryError(str(error), mend="use http, https, s3 or gs") from None
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in _S3:
        limits = {"connect_timeout": timeout, "read_timeout": timeout}
        found = kind(**options, config_kwargs={"retries": {"max_attempts": 0}, **limits})
        found.retries = 1
    elif scheme in _GCS:
        import aiohttp

        if os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"].lower() == "false":  # also where it was imported before
            kind = importlib.import_module("gcsfs.core").GCSFileSystem
        limit = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        found = kind(**options, requests_timeout=limit)
        once = getattr(kind._request, "__wrapped__", None)
        if once is not None:  # without the decorator that tries six times
            found._request = partial(once, found)
    elif scheme in _LOCAL:
        found = kind(**options, auto_mkdir=True)
    elif scheme in HTTP:
        # What is compressed in spite of what was asked for is an answer to be refused, not to be tried again.
        found = kind(**options, client_kwargs={"auto_decompress": False})
    else:
        found = kind(**options)
    return found


def _call(url: str, method: str, timeout: float, *after: Any, before: tuple[Any, ...] = (), **arguments: Any) -> Any:
    """A method of fsspec's file system, its failures told apart."""
    try:
        system = _filesystem(url, timeout)
        if not system.async_impl:
            return getattr(system, method)(*before, url, *after, **arguments)
        from fsspec.asyn import sync

        # Those set above bound the silence; of others only the whole can be bounded, and no file's upload may be.
        whole = None if method == "put_file" or _scheme(url) in (*_S3, *_GCS) else timeout
        return sync(system.loop, getattr(system, f"_{method}"), *before, url, *after, timeout=whole, **arguments)
    except NoLibraryError:
        raise
    except Exception as error:  # each library raises its own kinds
        raise _failed(error, timeout) from None


def _failed(error: Exception, timeout: float) -> AttemptError:
    """What one attempt's exception says, whichever library raised it."""
    status = _status_of(error)
    _let_go(error)
    kind, text = type(error).__name__, " ".join(str(error).split())
    if status is None and isinstance(error, FileNotFoundError):
        status = 404
    # gcsfs says it so.
    if status is None and (isinstance(error, PermissionError) or text.startswith("Forbidden")):
        status = 403
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
        return _untrusted(text)
    if any(sign in text for sign in _NO_TLS):
        mend = "correct the port, or use http:// if it is meant to be open"
        return AttemptError("the server does not speak TLS there", again=False, mend=mend)
    if kind in _NO_CREDENTIALS:
        mend = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket"
        return AttemptError(f"there are no credentials: {text}", again=False, mend=mend)
    may_pass = kind not in _BAD_URLS and not isinstance(error, _BUGS)
    again = may_pass and (status is None or status in WAITING_HELPS)
    if status is not None and status >= 400:
        # A library names the file in its own way; of the bucket it says something new.
        what = f"the server refuses: {text}" if status != 404 or NO_BUCKET in text else "it is not there"
    elif isinstance(error, TimeoutError) or "Timeout" in kind:
        what = f"the server was silent for {timeout:g} s"
    elif kind in ("ClientConnectorError", "EndpointConnectionError"):
        refused = "refused" in text or isinstance(getattr(error, "os_error", None), ConnectionRefusedError)
        what = "the connection was refused" if refused else f"there is no connection: {text}"
    else:
        what = _IN_WORDS.get(kind) or (f"{kind}: {text}" if text else kind)
    return AttemptError(what, again=again, status=status)


def _let_go(error: BaseException | None) -> None:
    """Drop the tracebacks of an exception and of its causes.

    fsspec's frames refer to it as it to them, so until a garbage collection it would keep all callers' variables
    alive, and with them locked files.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _untrusted(text: str) -> AttemptError:
    """A certificate that does not verify, and why."""
    found = re.search(r"certificate verify failed:? ?([^(\"'\]]*[^(\"'\] ])?", text)
    why = (found[1] or "").rstrip(". ") if found else ""
    mend = (
        "if it is to be trusted, name a PEM file with it, or with the authority's that signed it, in SSL_CERT_FILE"
        " (for s3 in AWS_CA_BUNDLE)"
    )
    if "expired" in why:
        mend = "renew the server's certificate, and check this machine's clock"
    elif "ostname mismatch" in why or "IP address mismatch" in why:
        mend = "use the host name that the certificate is made out to"
    return AttemptError(f"the server's certificate is not trusted: {why or text}", again=False, mend=mend)


def _status_of(error: BaseException | None) -> int | None:
    """The HTTP status in an exception or in what caused it."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif type(error).__module__ == "aiohttp.http_exceptions":
            found = None  # its code is made up: 400 for a connection that was cut
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
