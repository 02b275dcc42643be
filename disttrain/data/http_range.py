"""One ranged HTTP request, and what its answer tells of the file.

The URL is sent to the letter, in redirects too, since a signature covers its escapes. An answer is taken only if it
is the bytes that were asked for, uncompressed. Cost: one request, and one for each redirect.
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
"""Statuses after which another attempt may succeed."""
_MD5: Final = re.compile(r"[0-9a-f]{32}")
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_DIGEST: Final = re.compile(r"\b(md5|sha-256|sha-512)=:?([A-Za-z0-9+/]+=*)", re.IGNORECASE)
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS: Final = 10
_SMALL_BYTES: Final = 2**16
_MENDS: Final = {
    200: "serve the files by a server that answers range requests, as nginx, S3 and GCS do",
    400: "check the URL, and renew the credentials if they are temporary",
    401: "give credentials that may read it",
    403: "give credentials that may read it (some servers also say so of a file that is not there)",
    404: "correct the URL, or upload the file",
    410: "correct the URL, or upload the file",
}


class AttemptError(Exception):
    """One attempt that failed, in words.

    Attributes:
        again: whether another may succeed.
        status: the HTTP status, where one is known.
        mend: how to mend it, where that is more than waiting.
        after_seconds: how long the server asks to be left alone.
    """

    def __init__(
        self, what: str, *, again: bool, status: int | None = None, mend: str = "", after_seconds: float = 0.0
    ) -> None:
        super().__init__(what)
        self.again, self.status, self.after_seconds = again, status, after_seconds
        self.mend = mend or _MENDS.get(status or 0, "")


@dataclass(frozen=True)
class Answer:
    """What a server said to one request.

    Attributes:
        body: the bytes.
        total: the size of the whole file; None where the answer does not tell.
        version: what identifies the contents, or empty.
        checksum: algorithm, as :mod:`hashlib` calls it, and hexadecimal digest of the whole file; empty where the
            server gives none.
    """

    body: bytes
    total: int | None = None
    version: str = ""
    checksum: tuple[str, str] = ("", "")


async def get_range(session: Any, url: str, start: int, stop: int, timeout: float) -> Answer:
    """The bytes ``[start, stop)`` of a file, and what the answer tells of all of it.

    Args:
        session: aiohttp's, which decompresses nothing.
        url: where it is.
        start: the first byte.
        stop: the byte after the last.
        timeout: how many seconds the connection may be silent.

    Raises:
        AttemptError: the answer is another one; what aiohttp and the operating system raise comes as it is.
    """
    status, headers, body = await _request(session, url, start, stop, timeout)
    version = headers.get("ETag", "").removeprefix("W/").strip('"')
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if status == 416 and found and int(found[3]) <= start:  # the file ends before
        return Answer(b"", int(found[3]), version)
    if status == 200:
        raise AttemptError("the server ignores range requests and sends the whole file", again=False, status=status)
    if status != 206:
        again = status in WAITING_HELPS
        after = headers.get("Retry-After", "")
        what = "it is not there" if status in (404, 410) else "the server refuses"
        seconds = float(after) if after.isdecimal() else 0.0
        raise AttemptError(what, again=again, status=status, after_seconds=seconds)
    if (encoding := headers.get("Content-Encoding", "identity").lower()) != "identity":
        mend = "switch compression off for such files, at the server and at proxies before it"
        what = f"the server compresses the answer ({encoding}), though it was asked not to"
        raise AttemptError(what, again=False, status=status, mend=mend)
    if found is None or found[1] is None:
        raise AttemptError(f"Content-Range {headers.get('Content-Range')!r} makes no sense", again=True, status=status)
    first, last, total = int(found[1]), int(found[2]), int(found[3])
    if first != start or last != min(stop, total) - 1:
        raise AttemptError(f"bytes {first}-{last} came for bytes {start}-{stop - 1}", again=True, status=status)
    if len(body) != last - first + 1:
        raise AttemptError(f"{len(body)} bytes came for bytes {start}-{stop - 1}", again=True, status=status)
    return Answer(body, total, version, _checksum(headers, version))


async def _request(session: Any, url: str, start: int, stop: int, timeout: float) -> tuple[int, Any, bytes]:
    import aiohttp

    # identity: a compressed body has no bytes at these places
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    trusted = _trusted(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    for _ in range(_MOST_REDIRECTS):
        get = session.get(_verbatim(url), headers=headers, timeout=limits, ssl=trusted, allow_redirects=False)
        async with get as response:
            if response.status not in _REDIRECTS:
                # The body of anything else is of no use, and may be a whole shard; a small one is read so that the
                # connection serves again.
                is_small = response.content_length is not None and response.content_length <= _SMALL_BYTES
                body = await response.read() if response.status == 206 or is_small else b""
                return response.status, response.headers, body
            place = response.headers.get("Location", "")
        before, url = urlsplit(url), urljoin(url, place)
        after = urlsplit(url)
        scheme = after.scheme
        if (scheme, after.netloc.lower()) == (before.scheme, before.netloc.rpartition("@")[2].lower()):
            url = urlunsplit(after._replace(netloc=before.netloc))  # user and password are for this origin alone
        if not place or scheme not in HTTP:
            where = f"to {scheme}://..., which is not http" if place else "without saying where to"
            raise AttemptError(f"the server redirects {where}", again=False, status=response.status)
    raise AttemptError("it redirects without end", again=False)


def _verbatim(url: str) -> Any:
    """A URL for aiohttp that is sent as it stands, but for what no URL may hold."""
    import yarl

    if not url.partition("://")[2].partition("/")[0].isascii():
        return yarl.URL(url)  # a host's name has an encoding of its own
    escaped = re.sub("%(?![0-9A-Fa-f]{2})", "%25", url)
    return yarl.URL(quote(escaped, safe="%/:?#[]@!$&'()*+,;=~"), encoded=True)


@lru_cache(maxsize=4)
def _trusted(file: str | None, folder: str | None) -> ssl.SSLContext:
    """The authorities that OpenSSL trusts, by its two variables as they are now: aiohttp reads them when imported."""
    return ssl.create_default_context()


def md5_of_etag(etag: str, by_store: str | None, by_customer: str | None) -> tuple[str, str]:
    """The MD5 that an ``ETag`` of S3's is, unless the object came in parts or has a key of KMS or of the customer.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html

    Args:
        etag: without quotes.
        by_store: how the store encrypts the object, if it says so.
        by_customer: likewise for a key of the customer's.
    """
    is_md5 = _MD5.fullmatch(etag) and by_store in (None, "AES256") and by_customer is None
    return ("md5", etag) if is_md5 else ("", "")


def _checksum(headers: Any, version: str) -> tuple[str, str]:
    """The checksum of the whole file in an answer's headers, also where the body is a part of it.

    ``Repr-Digest`` (RFC 9530), ``Digest`` (RFC 3230), Google's ``x-goog-hash``, and the ``ETag`` of S3.
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
    """A checksum from its base64; empty where that is damaged or missing."""
    try:
        digest = base64.b64decode(encoded, validate=True).hex()
    except (binascii.Error, ValueError):
        digest = ""
    return (algorithm, digest) if digest else ("", "")
