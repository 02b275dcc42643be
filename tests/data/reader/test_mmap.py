"""A mapped shard that is cut off: an error before it is used, and an explained end of the process during its use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from disttrain.data.decode.fields import Field
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.reader.sample_reader import Reader
from disttrain.errors import ShardError
from tests.support.shards import write_numbered

# Truncates the second shard after its size was checked, before its bytes are used.
_TORN = """
import os, sys
import numpy as np
from disttrain.data.decode.fields import Field
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.reader import mmap
from disttrain.data.reader.sample_reader import Reader

mmap.is_on_local_disk = lambda folder: True
reader = Reader(ShardIndex.open(sys.argv[1:]), {"x": Field("x.npy")})
reader.read(np.arange(40))
check = mmap.MappedShards._check


def check_then_truncate(self, shard, found, end):
    check(self, shard, found, end)
    if shard == 1:
        os.truncate(sys.argv[2], 0)


mmap.MappedShards._check = check_then_truncate
reader.read(np.arange(40))
"""


def test_a_shard_cut_off_between_its_check_and_its_use_ends_the_process_at_a_place_it_names(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _TORN, *write_numbered(tmp_path, [20, 20])],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGBUS, done.stderr
    assert "Fatal Python error: Bus error" in done.stderr
    assert "data/reader/mmap.py" in done.stderr


def test_a_shard_cut_off_between_two_reads_is_one_error(tmp_path: Path) -> None:
    first, second = write_numbered(tmp_path, [20, 20])
    reader = Reader(ShardIndex.open([first, second]), {"x": Field("x.npy")})
    reader.read(np.arange(40))
    os.truncate(second, 4096)
    with pytest.raises(ShardError, match="ends at byte 4096"):
        reader.read(np.arange(40))
    reader.read(np.arange(20))  # the other shard can still be read
