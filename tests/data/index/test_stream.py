"""A stream: the bytes are the source's, each is hashed once, and without a hash what nobody wants is jumped over."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from disttrain.data.index.stream import Stream, opened
from disttrain.errors import ShardError

CONTENT = random.Random(0).randbytes(100_003)


class Source:
    """Bytes in memory, and what was read of them."""

    name, window_bytes = "here", 512

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content, self.size = content, len(content)
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        return self.content[offset : offset + length]


@pytest.mark.parametrize("is_hashed", [True, False])
@pytest.mark.parametrize("piece_bytes", [100, 4096, 10**6])
def test_bytes_are_those_of_the_source(is_hashed: bool, piece_bytes: int) -> None:
    draw = random.Random(1)
    for _ in range(20):
        stream = Stream(Source(), is_hashed=is_hashed, piece_bytes=piece_bytes)
        offset = 0
        while offset <= len(CONTENT):
            length = draw.choice([0, 1, 512, 3000, 40_000])
            assert stream.read(offset, length) == CONTENT[offset : offset + length]
            back = draw.randrange(offset + 1)
            assert stream.read(back, 100) == CONTENT[back : back + 100], "an earlier place"
            offset += draw.choice([1, length, 512, 30_000])
        if is_hashed:
            assert stream.md5() == hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


def test_bytes_are_read_once() -> None:
    source = Source()
    stream = Stream(source, is_hashed=True, piece_bytes=1000)
    for offset in range(0, len(CONTENT), 700):
        stream.read(offset, 700)
    stream.md5()
    assert [offset for offset, _ in source.reads] == [*range(0, 100_001, 1000), len(CONTENT)]


def test_what_nobody_wants_is_jumped_over() -> None:
    source = Source()
    stream = Stream(source, is_hashed=False, piece_bytes=1000)
    assert stream.read(0, 10) + stream.read(50_000, 10) == CONTENT[:10] + CONTENT[50_000:50_010]
    assert source.reads == [(0, 1000), (50_000, 1000)]


def test_an_empty_source() -> None:
    stream = Stream(Source(b""), is_hashed=True)
    assert stream.read(0, 512) == b""
    assert stream.md5() == hashlib.md5(b"", usedforsecurity=False).hexdigest()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="cannot open shard"), opened(str(tmp_path / "none.tar")):
        pass
