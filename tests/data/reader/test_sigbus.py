"""A mapped shard that is cut off while it is used: an error, in a process that lives on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from disttrain.data.reader import sigbus
from tests.support.shards import write_numbered

pytestmark = pytest.mark.skipif(not sigbus.can_guard(), reason="nothing is mapped on this system")

# In a process of its own: where the guard fails, it dies.
_TORN = """
import os, sys
import numpy as np
from disttrain.data.reader import mmap as mapped_shards
from disttrain.data.decode.fields import Field
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.reader.sample_reader import Reader
from disttrain.errors import DecodeError, ShardError

mapped_shards.is_on_local_disk = lambda folder: True
first, second = sys.argv[1:3]
fields = {"x": Field("x.npy"), "raw": Field("cls", decoder="bytes")}
reader = Reader(ShardIndex.open([first, second]), fields)
kept = reader.read(np.arange(40))["x"].clone()
check = mapped_shards.MappedShards._check


def check_then_tear(self, shard, found, end):
    check(self, shard, found, end)
    os.truncate(second, int(sys.argv[3]))


mapped_shards.MappedShards._check = check_then_tear
for attempt in range(2):
    try:
        reader.read(np.arange(40))
    except ShardError as error:
        print("error:", error.what)
    mapped_shards.MappedShards._check = check
print(bool((reader.read(np.arange(20))["x"] == kept[:20]).all()))
"""


@pytest.mark.parametrize("left", [0, 4096, 10_000])
def test_a_shard_cut_off_between_its_check_and_its_use(tmp_path: Path, left: int) -> None:
    first, second = write_numbered(tmp_path, [20, 20])
    done = subprocess.run(
        [sys.executable, "-c", _TORN, first, second, str(left)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    torn, later, rest = done.stdout.splitlines()
    assert torn.startswith(f"error: shard {second} ends at byte {left}"), torn
    assert later.startswith(f"error: shard {second}"), later
    assert rest == "True", "the other shard cannot be read any more"


_TWO_THREADS = """
import os, sys, threading
import numpy as np
from disttrain.data.reader import mmap as mapped_shards
from disttrain.data.decode.fields import Field
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.reader.sample_reader import Reader
from disttrain.errors import ShardError

mapped_shards.is_on_local_disk = lambda folder: True
first, second, num_samples = sys.argv[1], sys.argv[2], int(sys.argv[3])
content = open(second, "rb").read()
reader = Reader(ShardIndex.open([first, second]), {"x": Field("x.npy")})
kept = reader.read(np.arange(40))["x"].clone()
spans, check = mapped_shards.MappedShards.spans, mapped_shards.MappedShards._check
has_spans, is_torn = threading.Event(), threading.Event()


def in_turn(self, *arguments, **options):
    found = spans(self, *arguments, **options)
    if threading.current_thread() is other:
        has_spans.set()
        assert is_torn.wait(60)
    else:
        open(second, "wb").write(content)  # so that its length does not tell
    return found


def check_then_tear(self, shard, found, end):
    check(self, shard, found, end)
    if threading.current_thread() is not other:
        os.truncate(second, 0)


def read(name, ids):
    try:
        same = bool((reader.read(ids)["x"] == kept[ids]).all())
        print(f"{name}: {'right' if same else 'WRONG'} values")
    except ShardError as error:
        print(f"{name}: {error.what}")


other = threading.Thread(target=read, args=("other", np.arange(num_samples)))
mapped_shards.MappedShards.spans, mapped_shards.MappedShards._check = in_turn, check_then_tear
other.start()
assert has_spans.wait(60)
read("one", np.arange(20, 40))
is_torn.set()
other.join()
mapped_shards.MappedShards.spans, mapped_shards.MappedShards._check = spans, check
read("later", np.arange(40))
"""


@pytest.mark.parametrize(("num_samples", "uses_torn"), [(20, False), (40, True)])
def test_a_fault_concerns_all_threads_that_use_the_shard_and_no_others(
    tmp_path: Path, num_samples: int, uses_torn: bool
) -> None:
    first, second = write_numbered(tmp_path, [20, 20])
    done = subprocess.run(
        [sys.executable, "-c", _TWO_THREADS, first, second, str(num_samples)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    one, other, later = done.stdout.splitlines()
    assert one == f"one: reading {second} failed"
    assert other == (f"other: reading {second} failed" if uses_torn else "other: right values")
    assert later == "later: right values", "a mapping that failed was used again"


def test_a_fault_elsewhere_still_kills(tmp_path: Path) -> None:
    code = """
import mmap, sys
import numpy as np
from disttrain.data.reader import sigbus as bus_errors

ours = open(sys.argv[1], "rb")
mapped = mmap.mmap(ours.fileno(), 0, prot=mmap.PROT_READ)
bus_errors.watch(mapped, np.frombuffer(mapped, np.uint8).__array_interface__["data"][0])
other = open(sys.argv[2], "r+b")
theirs = mmap.mmap(other.fileno(), 0, prot=mmap.PROT_READ)
other.truncate(0)
theirs[0]
"""
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"1" * 8192)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "one"), str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        timeout=60,
    )
    assert done.returncode == -7, "SIGBUS of somebody else's mapping was swallowed"
