"""Packing: the same bytes every time, whole files only, interrupted packings that go on, fair splits."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from disttrain.data.index.shard_index import ShardIndex, read_manifest
from disttrain.data.index.sidecar import build_table, read_sidecar, sidecar_path
from disttrain.data.pack.packer import PackConfig, pack
from disttrain.data.pack.samples import Sample, Samples, Source, stratified_split
from disttrain.errors import ConfigError, DataError


@dataclass
class Toy:
    """A source that counts what is read of it and may break off."""

    num_samples: int = 100
    fingerprint: str = "toy 1"
    fails_after: int | None = None
    sample: Callable[[int], Sample] | None = None
    reads: list[int] = field(default_factory=list)
    loads: int = 0

    def read(self, number: int) -> Sample:
        if self.fails_after is not None and len(self.reads) >= self.fails_after:
            raise KeyboardInterrupt
        self.reads.append(number)
        if self.sample is not None:
            return self.sample(number)
        return Sample(f"toy-{number:06d}", {"bin": bytes([number % 256]) * number, "cls": str(number % 4).encode()})

    def load(self) -> Samples:
        self.loads += 1
        return Samples(self.num_samples, self.read, labels=np.arange(self.num_samples, dtype=np.int64) % 4)

    @property
    def source(self) -> Source:
        return Source(name="toy", fingerprint=self.fingerprint, load=self.load)


CONFIG = PackConfig(samples_per_shard=10)
GOLDEN = [[0, 1, 3, 4, 8, 9, 10, 11, 12, 13, 14, 16, 17, 19], [6, 7, 18], [2, 5, 15]]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same_files(found: Path, expected: Path) -> None:
    here, there = files(found), files(expected)
    assert list(here) == list(there), f"other files: {set(here) ^ set(there)}"
    differing = [name for name in here if here[name] != there[name]]
    assert not differing, f"other bytes in {differing}"


def states(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tar")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted packing."""
    folder = tmp_path_factory.mktemp("expected")
    pack(Toy().source, out_dir=folder, config=CONFIG)
    return folder


def test_what_a_packing_leaves(expected: Path) -> None:
    counts = {"train": 7, "val": 2, "test": 2}
    names = {f"{split}-{i:06d}.{kind}" for split, n in counts.items() for i in range(n) for kind in ("tar", "idx")}
    assert set(files(expected)) == names | {"train.json", "val.json", "test.json"}
    for split, count in counts.items():
        shards = read_manifest(expected / f"{split}.json")
        assert [Path(shard.path).name for shard in shards] == [f"{split}-{i:06d}.tar" for i in range(count)]
        sizes = [shard.num_samples for shard in shards]
        assert max(sizes) - min(sizes) <= 1, f"{split}: shards of sizes {sizes}"
        for shard in shards:
            assert shard.md5 == hashlib.md5(Path(shard.path).read_bytes()).hexdigest()
            sidecar, table = read_sidecar(shard.path), build_table(shard.path)
            assert sidecar is not None
            assert sidecar.spans() == table.spans()
            assert len(table) == shard.num_samples
            assert sidecar_path(shard.path).stat().st_mtime_ns >= Path(shard.path).stat().st_mtime_ns


def test_every_sample_is_in_one_split_with_its_bytes(expected: Path) -> None:
    index = ShardIndex.open([str(expected / f"{split}.json") for split in ("train", "val", "test")])
    found = {}
    for number, shard in enumerate(index.shards):
        data = Path(shard.path).read_bytes()
        for key, fields in index.table(number).spans().items():
            assert key not in found, f"{key} is there twice"
            found[key] = {name: data[offset : offset + size] for name, (offset, size) in fields.items()}
    assert found == {sample.key: dict(sample.fields) for sample in Toy().load()}


def test_train_is_shuffled_and_the_others_are_in_order(expected: Path) -> None:
    def keys(split: str) -> list[str]:
        index = ShardIndex.open(str(expected / f"{split}.json"))
        return [index.key(number) for number in range(len(index))]

    assert keys("val") == sorted(keys("val"))
    assert keys("test") == sorted(keys("test"))
    in_order = sum(a < b for a, b in zip(keys("train"), keys("train")[1:], strict=False))
    assert 20 < in_order < 50, f"{in_order} of 69 neighbours in order: not shuffled"


def test_members_carry_nothing_of_time_or_user(expected: Path) -> None:
    with tarfile.open(expected / "train-000000.tar") as tar:
        facts = {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in tar}
    assert facts == {(0, 0, 0, "disttrain", "disttrain", 0o644)}


def test_packing_again_gives_the_same_bytes(expected: Path, tmp_path: Path) -> None:
    pack(Toy().source, out_dir=tmp_path / "deep" / "new", config=CONFIG)
    assert_same_files(tmp_path / "deep" / "new", expected)


def test_a_complete_packing_is_left_alone(tmp_path: Path) -> None:
    pack(Toy().source, out_dir=tmp_path, config=CONFIG)
    before, toy = states(tmp_path), Toy()
    sidecar_path(str(tmp_path / "val-000000.tar")).unlink()
    done = pack(toy.source, out_dir=tmp_path, config=CONFIG)
    assert done.was_complete
    assert {prefix: split.num_samples for prefix, split in done.splits.items()} == {"train": 70, "val": 15, "test": 15}
    assert (toy.loads, toy.reads) == (0, []), "the source was read"
    assert states(tmp_path) == before
    assert sidecar_path(str(tmp_path / "val-000000.tar")).exists(), "a lost sidecar comes back"


@pytest.mark.parametrize("after", [0, 5, 10, 35, 69, 70, 84, 99])
def test_an_interrupted_packing_goes_on(expected: Path, tmp_path: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack(Toy(fails_after=after).source, out_dir=tmp_path, config=CONFIG)
    assert not list(tmp_path.glob(".*.part")), "a part of a shard was left"
    assert not (tmp_path / "test.json").exists(), "a manifest of a split that is not whole"
    before, toy = states(tmp_path), Toy()
    done = pack(toy.source, out_dir=tmp_path, config=CONFIG)
    assert_same_files(tmp_path, expected)
    rewritten = [name for name, state in before.items() if states(tmp_path)[name] != state]
    assert not rewritten, f"finished shards were written again: {rewritten}"
    assert sum(split.num_written for split in done.splits.values()) == 11 - len(before)
    there = sum(len(build_table(str(tmp_path / name))) for name in before)
    assert len(toy.reads) == 100 - there, "samples of finished shards were read again"


def test_a_killed_packing_goes_on(expected: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_packer import CONFIG, Toy, pack\n"
        "def sample(number, toy=Toy()):\n"
        "    if len(toy.reads) == 25: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return toy.read(number)\n"
        "pack(Toy(sample=sample).source, out_dir=sys.argv[1], config=CONFIG)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    journals = {f".pack-{split}.jsonl" for split in ("train", "val", "test")}
    assert {path.name for path in tmp_path.glob(".*")} == {".train-000002.tar.part", *journals}
    before = states(tmp_path)
    assert set(before) == {"train-000000.tar", "train-000001.tar"}
    pack(Toy().source, out_dir=tmp_path, config=CONFIG)
    assert_same_files(tmp_path, expected)
    assert {name: states(tmp_path)[name] for name in before} == before, "finished shards were written again"


@pytest.mark.parametrize("damage", ["journal cut", "journal empty", "shard cut", "shard other", "shard gone"])
def test_only_what_is_intact_is_kept(expected: Path, tmp_path: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack(Toy(fails_after=35).source, out_dir=tmp_path, config=CONFIG)
    journal, shard = tmp_path / ".pack-train.jsonl", tmp_path / "train-000001.tar"
    before = states(tmp_path)
    if damage == "journal cut":
        os.truncate(journal, journal.stat().st_size - 5)
    elif damage == "journal empty":
        os.truncate(journal, 0)
    elif damage == "shard cut":
        os.truncate(shard, shard.stat().st_size - 512)
    elif damage == "shard other":
        content = bytearray(shard.read_bytes())
        content[600] ^= 1
        shard.write_bytes(content)
    else:
        shard.unlink()
    pack(Toy().source, out_dir=tmp_path, config=CONFIG)
    assert_same_files(tmp_path, expected)
    kept = {name for name, state in before.items() if states(tmp_path)[name] == state}
    first = {"train-000000.tar", "train-000001.tar", "train-000002.tar"}
    lost = {"journal cut": {"train-000002.tar"}, "journal empty": first}.get(damage, {"train-000001.tar"})
    assert kept == first - lost


def test_a_shard_lost_after_packing_is_made_good(expected: Path, tmp_path: Path) -> None:
    pack(Toy().source, out_dir=tmp_path, config=CONFIG)
    (tmp_path / "train-000003.tar").unlink()
    before = states(tmp_path)
    done = pack(Toy().source, out_dir=tmp_path, config=CONFIG)
    assert sum(split.num_written for split in done.splits.values()) == 1
    assert_same_files(tmp_path, expected)
    assert {name: states(tmp_path)[name] for name in before} == before


@pytest.mark.parametrize("when", ["complete", "interrupted"])
@pytest.mark.parametrize(
    ("toy", "config"),
    [
        (Toy(fingerprint="toy 2"), CONFIG),
        (Toy(), PackConfig(samples_per_shard=10, split_seed=1)),
        (Toy(), PackConfig(samples_per_shard=50)),
        (Toy(), PackConfig(num_shards=2)),
    ],
    ids=["source", "seed", "size", "shards"],
)
def test_other_sources_or_options_start_over(tmp_path: Path, when: str, toy: Toy, config: PackConfig) -> None:
    new, clean = tmp_path / "new", tmp_path / "clean"
    if when == "complete":
        pack(Toy().source, out_dir=new, config=CONFIG)
    else:
        with pytest.raises(KeyboardInterrupt):
            pack(Toy(fails_after=35).source, out_dir=new, config=CONFIG)
    (new / ".train-000099.tar.part").touch()  # as a kill leaves it
    pack(Toy(fingerprint=toy.fingerprint).source, out_dir=new, config=config)
    pack(Toy(fingerprint=toy.fingerprint).source, out_dir=clean, config=config)
    assert_same_files(new, clean)


def test_old_manifests_go_before_new_shards_come(tmp_path: Path) -> None:
    pack(Toy().source, out_dir=tmp_path, config=CONFIG)
    with pytest.raises(KeyboardInterrupt):
        pack(Toy(fingerprint="toy 2", fails_after=35).source, out_dir=tmp_path, config=CONFIG)
    assert not list(tmp_path.glob("*.json")), "a manifest of the old packing stands beside shards of the new"


def test_foreign_files_are_never_overwritten(tmp_path: Path) -> None:
    shard = tmp_path / "val-000000.tar"
    shard.write_bytes(b"someone's data")
    with pytest.raises(DataError, match=r"val-000000\.tar exists and was not written by"):
        pack(Toy().source, out_dir=tmp_path, config=CONFIG)
    assert files(tmp_path) == {"val-000000.tar": b"someone's data"}
    shard.rename(tmp_path / "val-extra-000000.tar")  # another prefix: no concern of this packing
    (tmp_path / "test.json").write_text("{}")
    with pytest.raises(DataError, match=r"test\.json exists and was not written by"):
        pack(Toy().source, out_dir=tmp_path, config=CONFIG)
    (tmp_path / "test.json").unlink()
    pack(Toy().source, out_dir=tmp_path, config=CONFIG)
    assert (tmp_path / "val-extra-000000.tar").read_bytes() == b"someone's data"


def test_a_split_of_another_packing_is_not_left_beside(tmp_path: Path) -> None:
    pack(Toy().source, out_dir=tmp_path, config=CONFIG)
    with pytest.raises(DataError, match="holds a split 'test' of another packing"):
        pack(Toy().source, out_dir=tmp_path, config=PackConfig(samples_per_shard=10, fractions=(0.8, 0.2)))
    assert (tmp_path / "train.json").exists(), "nothing may be removed before the refusal"


def test_without_splits_and_with_prefixes(tmp_path: Path) -> None:
    done = pack(Toy().source, out_dir=tmp_path, config=PackConfig(fractions=()))
    assert (list(done.splits), done.splits["data"].num_samples) == (["data"], 100)
    assert ShardIndex.open(str(tmp_path / "data-*.tar")).key(3) == "toy-000003", "the source's own order"
    assert pack(Toy().source, out_dir=tmp_path, config=PackConfig(fractions=())).was_complete
    done = pack(Toy().source, out_dir=tmp_path, config=PackConfig(prefix="toy", fractions=(0.5, 0.5)))
    assert list(done.splits) == ["toy-train", "toy-val"]
    assert (tmp_path / "toy-val-000000.tar").exists()


@pytest.mark.parametrize("wanted", [1, 2, 3, 7, 69, 70])
def test_num_shards_is_that_of_train(tmp_path: Path, wanted: int) -> None:
    done = pack(Toy().source, out_dir=tmp_path, config=PackConfig(num_shards=wanted))
    found = [len(split.shards) for split in done.splits.values()]
    assert found[0] == wanted
    assert all(1 <= count <= 15 for count in found[1:])


def test_the_manifest_is_plain_wids_with_its_origin(expected: Path) -> None:
    content = json.loads((expected / "val.json").read_text())
    assert content["__kind__"] == "wids-shard-index-v1"
    assert content["packed_from"]["source"] == "toy"
    assert set(content["shardlist"][0]) == {"url", "nsamples", "filesize", "md5sum"}


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (lambda i: Sample("same", {"cls": b"1"}), "two samples have the key 'same'"),
        (lambda i: Sample(f"a.{i}", {"cls": b"1"}), "cannot be stored"),
        (lambda i: Sample(f"a{i}", {"CLS": b"1"}), "cannot be stored"),
        (lambda i: Sample(f"a{i}", {"_cls": b"1"}), "cannot be stored"),
        (lambda i: Sample(f"__a__/{i}", {"cls": b"1"}), "cannot be stored"),
        (lambda i: Sample(f"a{i}", {}), "has no fields"),
    ],
)
def test_samples_that_would_not_come_back_are_refused(
    tmp_path: Path, sample: Callable[[int], Sample], words: str
) -> None:
    with pytest.raises(DataError) as caught:
        pack(Toy(sample=sample).source, out_dir=tmp_path)
    assert words in caught.value.what


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard is 0"),
        ({"num_shards": -1}, "num_shards -1"),
        ({"fractions": (0.5, 0.4)}, "split fractions 0.5, 0.4"),
        ({"fractions": (0.5, 0.6, -0.1)}, "split fractions"),
        ({"fractions": (1.0,)}, "split fractions"),
        ({"fractions": (0.0, 0.5, 0.5)}, "split fractions"),
        ({"split_seed": -1}, "split_seed is -1"),
        ({"prefix": "a/b"}, "prefix is 'a/b'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PackConfig(**options)  # type: ignore[arg-type]
    assert words in caught.value.what
    assert caught.value.hint


def test_too_little_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 samples are too few: split 'test' would be empty"):
        pack(Toy(num_samples=3).source, out_dir=tmp_path)
    with pytest.raises(DataError, match="holds no samples"):
        pack(Toy(num_samples=0).source, out_dir=tmp_path)
    with pytest.raises(ConfigError, match="71 shards are too many for 70 samples"):
        pack(Toy().source, out_dir=tmp_path, config=PackConfig(num_shards=71))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot pack into"):
        pack(Toy().source, out_dir=tmp_path / "file" / "x")


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    fractions=st.sampled_from([(0.7, 0.15, 0.15), (0.8, 0.2), (0.5, 0.25, 0.25), (0.9, 0.05, 0.05), (1 / 3,) * 3]),
    seed=st.integers(0, 5),
)
def test_splits_are_stratified(counts: list[int], fractions: tuple[float, ...], seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    parts = stratified_split(labels, fractions=fractions, seed=seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels))), "not every sample exactly once"
    for part, fraction in zip(parts, fractions, strict=True):
        assert abs(len(part) - fraction * len(labels)) < 1, f"a part of {len(part)}, not {fraction * len(labels)}"
        off = np.bincount(labels[part], minlength=len(counts)) - fraction * np.array(counts)
        assert np.abs(off).max() <= 1 + 1e-9, f"classes are off by {off}"


def test_targets_are_stratified_by_quantiles() -> None:
    targets = np.random.default_rng(0).exponential(size=400)
    tenth = np.searchsorted(np.quantile(targets, np.arange(1, 10) / 10), targets)
    for part, share in zip(stratified_split(targets, fractions=(0.7, 0.15, 0.15), seed=0), (28, 6, 6), strict=True):
        np.testing.assert_allclose(np.bincount(tenth[part], minlength=10), share, atol=1)
    few = stratified_split(targets[:5], fractions=(0.6, 0.4), seed=0)
    assert [len(part) for part in few] == [3, 2]


def test_the_split_is_fixed_for_all_time() -> None:
    labels = np.arange(20) % 2
    found = [part.tolist() for part in stratified_split(labels, fractions=(0.7, 0.15, 0.15), seed=0)]
    assert found == GOLDEN, "another split for the same seed: data packed before would leak between splits"
    other = stratified_split(labels, fractions=(0.7, 0.15, 0.15), seed=1)
    assert other[1].tolist() != GOLDEN[1], "the seed does not matter"
