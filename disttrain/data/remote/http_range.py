"""Send one HTTP range request, and read the file's size, version and checksum from the response.

The URL is sent byte for byte, in redirects too, because a presigned URL's signature covers its escapes. A response is
accepted only if it holds exactly the requested bytes, uncompressed. Cost: one request, plus one per redirect.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import ssl
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

HTTP: Final = ("http", "https")
WAITING_HELPS: Final = frozenset({408, 425, 429, *range(500, 600)} - {501, 505})
"""HTTP statuses worth a retry."""
_MD5: Final = re.compile(r"[0-9a-f]{32}")
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_DIGEST: Final = re.compile(r"\b(md5|sha-256|sha-512)=:?([A-Za-z0-9+/]+=*)", re.IGNORECASE)
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS: Final = 10
_SMALL_BYTES: Final = 2**16
_MENDS: Final = {
    200: "use a server that supports range requests, such as nginx, S3 or GCS",
    400: "check the URL, and renew the credentials if they are temporary",
    401: "use credentials with read access",
    403: "use credentials with read access (some servers also return this for a missing file)",
    404: "correct the URL, or upload the file",
    410: "correct the URL, or upload the file",
}


class AttemptError(Exception):
    """A failed attempt.

    Attributes:
        again: whether a retry may succeed.
        status: the HTTP status, if known.
        hint: how to fix it, if more than waiting is needed.
        after_seconds: the server's ``Retry-After``.
    """

    def __init__(
        self, what: str, *, again: bool, status: int | None = None, hint: str = "", after_seconds: float = 0.0
    ) -> None:
        super().__init__(what)
        self.again, self.status, self.after_seconds = again, status, after_seconds
        self.hint = hint or _MENDS.get(status or 0, "")


@dataclass(frozen=True)
class Answer:
    """A server's response to one request.

    Attributes:
        body: the bytes.
        total: the size of the whole file; None if the response does not give it.
        version: identifies the contents, or empty.
        checksum: algorithm, by its :mod:`hashlib` name, and hexadecimal digest of the whole file; empty strings if the
            server gives none.
    """

    body: bytes
    total: int | None = None
    version: str = ""
    checksum: tuple[str, str] = ("", "")


async def get_range(session: Any, url: str, start: int, stop: int, timeout: float) -> Answer:
    """Read the bytes ``[start, stop)`` of a file, with the size, version and checksum of the whole file.

    Args:
        session: an aiohttp session with decompression off.
        url: URL of the file.
        start: the first byte.
        stop: the byte after the last.
        timeout: how many seconds the connection may be idle.

    Raises:
        AttemptError: the response is not valid. Errors of aiohttp and the operating system are not wrapped.
    """
    status, headers, body = await _request(session, url, start, stop, timeout)
    version = headers.get("ETag", "").removeprefix("W/").strip('"')
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if status == 416 and found and int(found[3]) <= start:  # the range starts past the end of the file
        return Answer(b"", int(found[3]), version)
    if status == 200:
        raise AttemptError("the server ignores range requests and sends the whole file", again=False, status=status)
    if status != 206:
        again = status in WAITING_HELPS
        after = headers.get("Retry-After", "")
        what = "not found" if status in (404, 410) else "the server refused the request"
        seconds = float(after) if after.isdecimal() else 0.0
        raise AttemptError(what, again=again, status=status, after_seconds=seconds)
    if (encoding := headers.get("Content-Encoding", "identity").lower()) != "identity":
        hint = "disable compression of such files on the server and on proxies in front of it"
        what = f"the server compressed the response ({encoding}), though asked not to"
        raise AttemptError(what, again=False, status=status, hint=hint)
    if found is None or found[1] is None:
        raise AttemptError(f"invalid Content-Range {headers.get('Content-Range')!r}", again=True, status=status)
    first, last, total = int(found[1]), int(found[2]), int(found[3])
    if first != start or last != min(stop, total) - 1:
        raise AttemptError(
            f"received bytes {first}-{last} instead of bytes {start}-{stop - 1}", again=True, status=status
        )
    if len(body) != last - first + 1:
        raise AttemptError(f"received {len(body)} bytes for the range {start}-{stop - 1}", again=True, status=status)
    return Answer(body, total, version, _checksum(headers, version))


async def _request(session: Any, url: str, start: int, stop: int, timeout: float) -> tuple[int, Any, bytes]:
    import aiohttp

    # identity: byte ranges of a compressed body are not byte ranges of the file
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    trusted = _trusted(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    for _ in range(_MOST_REDIRECTS):
        get = session.get(_verbatim(url), headers=headers, timeout=limits, ssl=trusted, allow_redirects=False)
        async with get as response:
            if response.status not in _REDIRECTS:
                # Any other body is useless and may be a whole shard. A small one is read all the same, because aiohttp
                # reuses a connection only after its response has been read.
                is_small = response.content_length is not None and response.content_length <= _SMALL_BYTES
                body = await response.read() if response.status == 206 or is_small else b""
                return response.status, response.headers, body
            place = response.headers.get("Location", "")
        before, url = urlsplit(url), urljoin(url, place)
        after = urlsplit(url)
        scheme = after.scheme
        if (scheme, after.netloc.lower()) == (before.scheme, before.netloc.rpartition("@")[2].lower()):
            url = urlunsplit(after._replace(netloc=before.netloc))  # keep user and password within the same origin
        if not place or scheme not in HTTP:
            where = f"to {scheme}://..., which is not http" if place else "without a location"
            raise AttemptError(f"the server redirects {where}", again=False, status=response.status)
    raise AttemptError("too many redirects", again=False)


def _verbatim(url: str) -> Any:
    """Build an aiohttp URL that is sent unchanged, except that characters not allowed in a URL are escaped."""
    import yarl

    if not url.partition("://")[2].partition("/")[0].isascii():
        return yarl.URL(url)  # let yarl encode the host name (IDNA)
    escaped = re.sub("%(?![0-9A-Fa-f]{2})", "%25", url)
    return yarl.URL(quote(escaped, safe="%/:?#[]@!$&'()*+,;=~"), encoded=True)


@lru_cache(maxsize=4)
def _trusted(file: str | None, folder: str | None) -> ssl.SSLContext:
    """Return OpenSSL's trusted CAs for the current values of its two variables; aiohttp reads them only at import."""
    return ssl.create_default_context()


def md5_of_etag(etag: str, by_store: str | None, by_customer: str | None) -> tuple[str, str]:
    """Return an S3 ``ETag`` as MD5, which it is unless the upload was multipart or the key is from KMS or the customer.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html

    Args:
        etag: without quotes.
        by_store: the store's ``x-amz-server-side-encryption``, if any.
        by_customer: the algorithm used with a customer's key, if any.
    """
    is_md5 = _MD5.fullmatch(etag) and by_store in (None, "AES256") and by_customer is None
    return ("md5", etag) if is_md5 else ("", "")


def _checksum(headers: Any, version: str) -> tuple[str, str]:
    """Return the whole file's checksum from the response headers, even if the body is only a part.

    Reads ``Repr-Digest`` (RFC 9530), ``Digest`` (RFC 3230), Google's ``x-goog-hash``, and S3's ``ETag``.
    """
    for name in ("Repr-Digest", "Digest", "x-goog-hash"):
        found = _DIGEST.search(", ".join(headers.getall(name, ())))
        if found:
            return digest_of(found[1].lower().replace("-", ""), found[2])
    if "x-amz-request-id" not in headers:
        return "", ""
    by_store, by_customer = (headers.get(f"x-amz-server-side-encryption{of}") for of in ("", "-customer-algorithm"))
    return md5_of_etag(version, by_store, by_customer)


def digest_of(algorithm: str, encoded: str) -> tuple[str, str]:
    """Decode a base64 checksum; empty strings if it is damaged or missing."""
    try:
        digest = base64.b64decode(encoded, validate=True).hex()
    except (binascii.Error, ValueError):
        digest = ""
    return (algorithm, digest) if digest else ("", "")
