"""List, read, write and delete objects in a folder on remote storage (s3, gs and any other scheme fsspec can write to).

Relies on two guarantees of S3 and Google Cloud Storage: an object appears whole or not at all, and a listing shows
every earlier write. Object stores have no rename. Failed requests are retried as in
:mod:`disttrain.data.remote.ranges`. Costs one request per object, a few for large ones; large reads request several
parts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from disttrain.data.remote import requests
from disttrain.data.remote.ranges import DEFAULT_RETRY, RemoteError, RemoteFile, RetryConfig, try_again
from disttrain.system.heartbeat import beat

T = TypeVar("T")

_PART_BYTES: Final = 8 << 20
_AT_ONCE: Final = 4


@dataclass(frozen=True)
class ObjectFolder:
    """Objects by name below a URL. Thread-safe.

    Attributes:
        url: URL of the folder, without a trailing slash.
        retry: retry policy.
    """

    url: str
    retry: RetryConfig = DEFAULT_RETRY

    def sizes(self) -> dict[str, int]:
        """Return the size of each object in bytes, by name.

        Raises:
            RemoteError: the folder cannot be listed. Some stores list a missing folder as empty instead.
        """
        return self._try(self.url, lambda: requests.listing(self.url, self.retry.timeout_seconds))

    def read(self, name: str) -> bytes | None:
        """Read a small object; return None if it does not exist.

        Raises:
            RemoteError: it cannot be read.
        """
        url = self.at(name)
        try:
            return self._try(url, lambda: requests.fetch_whole(url, self.retry.timeout_seconds))
        except RemoteError as error:
            if error.status == 404 and requests.NO_BUCKET not in error.what:
                return None
            raise

    def parts(self, name: str, size: int) -> Iterator[bytes]:
        """Yield the bytes of an object of known size, in parts.

        Raises:
            RemoteError: it cannot be read, or its size differs.
        """
        file = RemoteFile(self.at(name), self.retry, size)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            starts = range(0, size, _PART_BYTES)
            for first in range(0, len(starts), _AT_ONCE):
                yield from pool.map(lambda start: file.read(start, _PART_BYTES), starts[first : first + _AT_ONCE])

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a small object.

        Raises:
            RemoteError: it cannot be written.
        """
        url = self.at(name)
        self._try(url, lambda: requests.put(url, data, self.retry.timeout_seconds))

    def upload(self, name: str, path: Path) -> None:
        """Upload a file as an object.

        Raises:
            RemoteError: it cannot be written.
            OSError: the file cannot be read.
        """
        url = self.at(name)
        self._try(url, lambda: requests.upload(str(path), url, self.retry.timeout_seconds))
        beat()

    def remove(self, names: Iterable[str]) -> None:
        """Delete objects, several at once; objects that no longer exist are ignored.

        Raises:
            RemoteError: an object cannot be deleted.
        """

        def one(name: str) -> None:
            url = self.at(name)
            try:
                self._try(url, lambda: requests.remove(url, self.retry.timeout_seconds))
            except RemoteError as error:
                if error.status != 404:
                    raise
            beat()

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(one, names))

    def at(self, name: str) -> str:
        """Return the URL of an object."""
        return f"{self.url}/{name}"

    def _try(self, url: str, attempt: Callable[[], T]) -> T:
        return try_again(attempt, url, self.retry)
