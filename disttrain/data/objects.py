"""A folder of objects on remote storage (s3, gs and whatever else fsspec writes to): list, read, write, remove.

An object is there whole or not at all, and a listing shows what was written before: S3 and Google Cloud Storage
promise both. There is no renaming. Failed requests are tried again as in :mod:`disttrain.data.remote`. Costs one
request an object, a few for large ones; reading asks for several parts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from disttrain.beats import beat
from disttrain.data import transport
from disttrain.data.remote import DEFAULT_RETRY, RemoteError, RemoteFile, RetryConfig, try_again

T = TypeVar("T")

_PART_BYTES: Final = 8 << 20
_AT_ONCE: Final = 4


@dataclass(frozen=True)
class ObjectFolder:
    """Objects by their names below a URL. Safe to use from several threads.

    Attributes:
        url: where they are, without a slash at the end.
        retry: how long to try.
    """

    url: str
    retry: RetryConfig = DEFAULT_RETRY

    def sizes(self) -> dict[str, int]:
        """Bytes of each object, by name.

        Raises:
            RemoteError: it cannot be listed; of a folder that is not there, some stores say that it is empty.
        """
        return self._try(self.url, lambda: transport.listing(self.url, self.retry.timeout_seconds))

    def read(self, name: str) -> bytes | None:
        """A small object's bytes; None where it is not there.

        Raises:
            RemoteError: it cannot be read.
        """
        url = self.at(name)
        try:
            return self._try(url, lambda: transport.fetch_whole(url, self.retry.timeout_seconds))
        except RemoteError as error:
            if error.status == 404 and transport.NO_BUCKET not in error.what:
                return None
            raise

    def parts(self, name: str, size: int) -> Iterator[bytes]:
        """The bytes of an object of known size, in parts.

        Raises:
            RemoteError: it cannot be read, or has another size.
        """
        file = RemoteFile(self.at(name), self.retry, size)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            starts = range(0, size, _PART_BYTES)
            for first in range(0, len(starts), _AT_ONCE):
                yield from pool.map(lambda start: file.read(start, _PART_BYTES), starts[first : first + _AT_ONCE])

    def write(self, name: str, data: bytes) -> None:
        """Make a small object, or replace it.

        Raises:
            RemoteError: it cannot be written.
        """
        url = self.at(name)
        self._try(url, lambda: transport.put(url, data, self.retry.timeout_seconds))

    def upload(self, name: str, path: Path) -> None:
        """Make an object of a file.

        Raises:
            RemoteError: it cannot be written.
            OSError: the file cannot be read.
        """
        url = self.at(name)
        self._try(url, lambda: transport.upload(str(path), url, self.retry.timeout_seconds))
        beat()

    def remove(self, names: Iterable[str]) -> None:
        """Delete objects, several at once; those that are gone already are no error.

        Raises:
            RemoteError: one cannot be deleted.
        """

        def one(name: str) -> None:
            url = self.at(name)
            try:
                self._try(url, lambda: transport.remove(url, self.retry.timeout_seconds))
            except RemoteError as error:
                if error.status != 404:
                    raise
            beat()

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(one, names))

    def at(self, name: str) -> str:
        """An object's URL."""
        return f"{self.url}/{name}"

    def _try(self, url: str, attempt: Callable[[], T]) -> T:
        return try_again(attempt, url, self.retry)
