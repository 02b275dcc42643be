"""Packing data into plain WebDataset tars, in splits and shards.

The tars are written by webdataset's own ``TarWriter``, with fixed times, owners and modes, so that the same
source and options give the same bytes anywhere. Each split becomes ``<prefix>-000000.tar`` and so on, a
sidecar beside every shard, and last a manifest ``<prefix>.json`` with the MD5 of every shard: a split is
packed once its manifest exists. Every file appears whole (temporary name, then rename). An interrupted
packing goes on: a journal, ``.pack-<prefix>.jsonl``, holds a fingerprint of source and options and the size
and MD5 of each finished shard; those still intact are kept, and another fingerprint starts over. A packing
that is complete is recognized from the manifests alone, without reading the source. Only one packing at a
time may write to a prefix. Memory: what the source holds, and one sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from disttrain.data.index import Shard, describe_shard, read_manifest, write_manifest
from disttrain.data.samples import Ids, Samples, Source, shuffled, stratified_split
from disttrain.data.write import Tick, md5_of, write_shard
from disttrain.errors import ConfigError, DataError
from disttrain.files import make_folder, sync_directory, write_atomically
from disttrain.reading import parse_json, read_json, read_text

PACK_VERSION: Final = 1
"""Raised whenever the same source and options would give other bytes; part of the fingerprint."""

SPLITS: Final = ("train", "val", "test")
DEFAULT_FRACTIONS: Final = (0.70, 0.15, 0.15)
_WHOLE: Final = ""  # the name of the only split where there is none


@dataclass(frozen=True)
class PackConfig:
    """How a source is cut into splits and shards.

    Attributes:
        samples_per_shard: at most so many samples in a shard; shards of a split differ by one at most.
        num_shards: shards of the train split (of all, where nothing is split), instead of
            ``samples_per_shard``; the other splits get shards of about the same size.
        fractions: of train, val and, if given, test; they sum to 1. Empty: no splits. None: the source's own
            splits where it has them, else 0.70, 0.15, 0.15.
        split_seed: chooses the samples of each split and the order in which train is written.
        prefix: put before the split in file names (``digits-train-000000.tar``); without splits it is the
            whole name, by default ``data``.

    Raises:
        ConfigError: a value is out of range.
    """

    samples_per_shard: int = 1000
    num_shards: int = 0
    fractions: tuple[float, ...] | None = None
    split_seed: int = 0
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or self.num_shards < 0:
            raise ConfigError(
                f"samples_per_shard is {self.samples_per_shard} and num_shards {self.num_shards}",
                mend="set one of them to at least 1",
            )
        if self.fractions:
            fits = len(self.fractions) in (2, 3) and min(self.fractions) >= 0 and self.fractions[0] > 0
            if not fits or abs(sum(self.fractions) - 1) > 1e-6:
                raise ConfigError(
                    f"split fractions {', '.join(map(str, self.fractions))} cannot work",
                    mend="give two or three, for train, val and test, that sum to 1, such as 0.7,0.15,0.15",
                )
        if not 0 <= self.split_seed < 2**63:
            raise ConfigError(f"split_seed is {self.split_seed}", mend="use a seed from 0 to 2**63 - 1")
        if not re.fullmatch(r"[\w-]*", self.prefix):
            raise ConfigError(f"prefix is {self.prefix!r}", mend="use letters, digits, '_' and '-' only")

    def file_prefix(self, split: str) -> str:
        """What the files of a split are called."""
        if split == _WHOLE:
            return self.prefix or "data"
        return f"{self.prefix}-{split}" if self.prefix else split

    @property
    def classes_file(self) -> str:
        """Where the names of the classes go."""
        return f"{self.prefix}-classes.json" if self.prefix else "classes.json"


@dataclass(frozen=True)
class PackedSplit:
    """One split on disk.

    Attributes:
        manifest: its manifest.
        shards: its shards, with MD5.
        num_written: how many of the shards were written now; the others were there.
    """

    manifest: Path
    shards: tuple[Shard, ...]
    num_written: int = 0

    @property
    def num_samples(self) -> int:
        """Samples in all its shards."""
        return sum(shard.num_samples for shard in self.shards)


@dataclass(frozen=True)
class Packing:
    """What :func:`pack` made or found: the splits by file prefix, and notes of the source."""

    splits: Mapping[str, PackedSplit]
    was_complete: bool
    notes: tuple[str, ...] = ()


def pack(source: Source, *, out_dir: str | Path, config: PackConfig | None = None, progress: bool = False) -> Packing:
    """Pack a source into a folder, or find that this has been done.

    Args:
        source: what to pack.
        out_dir: where to; made if it is not there.
        config: splits and shards.
        progress: show a bar on standard error if that is a terminal.

    Raises:
        ConfigError: the options do not suit the source.
        DataError: the source is faulty or too small, or the folder cannot be written or holds shards of the
            same name that no packing made.
    """
    config = config or PackConfig()
    folder = Path(out_dir)
    facts = {"version": PACK_VERSION, "source": source.fingerprint, **asdict(config)}
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    complete = _complete(folder, config, fingerprint)
    if complete is not None:
        return Packing(complete, was_complete=True)
    samples = source.load()
    splits = plan_splits(samples, config)
    parts = {split: np.array_split(splits[split], count) for split, count in _shard_counts(splits, config).items()}
    _refuse_other_splits(folder, config, splits)
    jobs = {split: _Job(folder, config.file_prefix(split), fingerprint) for split in splits}
    for job in jobs.values():
        job.refuse_foreign_shards()
    record = {
        "source": source.name,
        "fingerprint": fingerprint,
        "splits": list(splits),
        "classes": config.classes_file if samples.classes else "",
    }
    packed = {}
    try:
        make_folder(folder)
        _write_classes(folder / config.classes_file, samples.classes)
        # Every split is opened before one is written: no old split is ever taken for a part of this packing.
        kept = {split: job.begin(parts[split]) for split, job in jobs.items()}
        with _bar(sum(map(len, splits.values())), show=progress) as tick:
            for split, job in jobs.items():
                packed[job.prefix] = job.run(samples, parts[split], kept[split], record, tick)
    except OSError as error:
        raise DataError(
            f"cannot pack into {folder}: {error}",
            mend="check the folder and its free space, and start again: it goes on",
        ) from error
    return Packing(packed, was_complete=False, notes=samples.notes)


def plan_splits(samples: Samples, config: PackConfig) -> dict[str, Ids]:
    """The samples of each split in the order in which they are written: train shuffled, the others as they are.

    Raises:
        ConfigError: fractions are given, but the source has splits of its own.
        DataError: a split would be empty.
    """
    if len(samples) == 0:
        raise DataError("the source holds no samples", mend="point it at data")
    if samples.splits:
        if config.fractions is not None:
            raise ConfigError("the source has splits of its own", mend="leave --split out")
        splits = dict(samples.splits)
    elif config.fractions == ():
        return {_WHOLE: np.arange(len(samples), dtype=np.int64)}
    else:
        fractions = config.fractions or DEFAULT_FRACTIONS
        names = [name for name, fraction in zip(SPLITS, fractions, strict=False) if fraction > 0]
        parts = stratified_split(
            samples.labels if samples.labels is not None else np.zeros(len(samples), dtype=np.int64),
            fractions=[fraction for fraction in fractions if fraction > 0],
            seed=config.split_seed,
        )
        splits = dict(zip(names, parts, strict=True))
    empty = [name for name, ids in splits.items() if len(ids) == 0]
    if empty:
        raise DataError(
            f"{len(samples)} samples are too few: split {empty[0]!r} would be empty",
            mend="give other fractions, or --split none",
        )
    splits["train"] = shuffled(splits["train"], seed=config.split_seed)
    return splits


def _shard_counts(splits: Mapping[str, Ids], config: PackConfig) -> dict[str, int]:
    """How many shards each split gets."""
    sizes = {split: len(ids) for split, ids in splits.items()}
    if not config.num_shards:
        return {split: -(-size // config.samples_per_shard) for split, size in sizes.items()}
    first = next(iter(sizes.values()))
    if config.num_shards > first:
        raise ConfigError(f"{config.num_shards} shards for {first} samples", mend=f"ask for at most {first}")
    return {split: min(size, max(1, round(size / first * config.num_shards))) for split, size in sizes.items()}


def _record(manifest: Path) -> dict[str, Any] | None:
    """What a packing noted in a manifest; None for one that no packing wrote."""
    try:
        record = read_json(manifest)["packed_from"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if isinstance(record, dict) else None


def _complete(folder: Path, config: PackConfig, fingerprint: str) -> dict[str, PackedSplit] | None:
    """The splits of this very packing if all of it is there, by sizes (not by MD5: `shards verify` does that)."""
    first = _WHOLE if config.fractions == () else "train"
    record = _record(folder / f"{config.file_prefix(first)}.json")
    if record is None or not (folder / record.get("classes", "")).exists():
        return None
    found: dict[str, PackedSplit] = {}
    for split in record.get("splits", ()):
        prefix = config.file_prefix(split)
        job = _Job(folder, prefix, fingerprint)
        if (_record(job.manifest) or {}).get("fingerprint") != fingerprint or job.journal.exists():
            return None
        try:
            found[prefix] = PackedSplit(job.manifest, tuple(read_manifest(job.manifest)))
            for shard in found[prefix].shards:
                describe_shard(shard.path)  # mends a sidecar that is gone or stale
        except DataError:
            return None
    return found or None


def _refuse_other_splits(folder: Path, config: PackConfig, splits: Mapping[str, Ids]) -> None:
    # A test split left from other fractions would share samples with the new train split.
    for split in SPLITS if _WHOLE not in splits else ():
        job = _Job(folder, config.file_prefix(split), "")
        if split not in splits and (job.manifest.exists() or job.journal.exists()):
            raise DataError(
                f"{folder} holds a split {job.prefix!r} of another packing, which this one has not",
                mend=f"remove {job.manifest} and its shards, or pack into another folder",
            )


def _write_classes(path: Path, classes: tuple[str, ...]) -> None:
    text = json.dumps(list(classes), indent=2, ensure_ascii=False) + "\n"
    if classes and not (path.is_file() and path.read_text(encoding="utf-8") == text):
        write_atomically(path, text)


class _Job:
    """The packing of one split: its files, and which shards are finished."""

    def __init__(self, folder: Path, prefix: str, fingerprint: str) -> None:
        self.folder, self.prefix, self.fingerprint = folder, prefix, fingerprint
        self.manifest = folder / f"{prefix}.json"
        self.journal = folder / f".pack-{prefix}.jsonl"
        name = re.escape(prefix)
        self._shard_file = re.compile(rf"{name}-\d{{6,}}\.(tar|idx)")
        self._temporary = re.compile(rf"\.({name}-\d{{6,}}\.(tar|idx)|{name}\.json|\.pack-{name}\.jsonl)\..+")

    def refuse_foreign_shards(self) -> None:
        """Nothing is overwritten that no packing wrote: with a journal all shards are ours, else those listed."""
        if self.journal.exists():
            return
        ours = {Path(shard.path).name for shard in self._listed()} if _record(self.manifest) else set()
        there = {
            path.name for path in self.folder.glob(f"{self.prefix}-*.tar") if self._shard_file.fullmatch(path.name)
        }
        if self.manifest.exists() and not ours:
            there.add(self.manifest.name)
        if there - ours:
            raise DataError(
                f"{self.folder / min(there - ours)} is there and was not written by `disttrain shards pack`",
                mend="remove it, pack into another folder, or set --prefix",
            )

    def begin(self, parts: list[Ids]) -> dict[str, Shard]:
        """Open the split: afterwards it has a journal and no manifest, and only the shards returned, which stay."""
        finished = self._finished()
        kept = {
            path.name: finished[path.name]
            for path, ids in zip(self._paths(parts), parts, strict=True)
            if path.name in finished and finished[path.name].num_samples == len(ids)
        }
        # From here on the journal says that all shards of this prefix are ours; only then is one removed.
        lines = [json.dumps({"fingerprint": self.fingerprint}), *map(_line, kept.values())]
        write_atomically(self.journal, "\n".join(lines) + "\n")
        self.manifest.unlink(missing_ok=True)
        sync_directory(self.folder)  # no power cut brings it back, to shards that are gone
        for path in list(self.folder.iterdir()):
            stale = self._shard_file.fullmatch(path.name) and path.with_suffix(".tar").name not in kept
            if stale or self._temporary.fullmatch(path.name):
                path.unlink()
        return kept

    def run(
        self, samples: Samples, parts: list[Ids], kept: Mapping[str, Shard], record: dict[str, Any], tick: Tick
    ) -> PackedSplit:
        """Write what is missing, then the manifest."""
        shards = []
        with open(self.journal, "a", encoding="utf-8") as journal:
            for path, ids in zip(self._paths(parts), parts, strict=True):
                if path.name in kept:
                    shards.append(kept[path.name])
                    describe_shard(str(path))  # writes its sidecar if that is what was missing
                    tick(len(ids))
                    continue
                shards.append(write_shard(samples, ids, path, tick))
                journal.write(_line(shards[-1]) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
        name = f"{record['source']}/{self.prefix}"
        write_manifest(self.manifest, shards, name=name, extra={"packed_from": record})
        self.journal.unlink()
        return PackedSplit(self.manifest, tuple(shards), num_written=len(shards) - len(kept))

    def _paths(self, parts: list[Ids]) -> list[Path]:
        return [self.folder / f"{self.prefix}-{number:06d}.tar" for number in range(len(parts))]

    def _listed(self) -> list[Shard]:
        try:
            content = read_json(self.manifest)["shardlist"]
            return [self._shard(entry) for entry in content]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _shard(self, entry: Mapping[str, Any]) -> Shard:
        path = str(self.folder / entry["url"])
        return Shard(path, int(entry["nsamples"]), int(entry["filesize"]), str(entry["md5sum"]))

    def _finished(self) -> dict[str, Shard]:
        """Shards of this very packing that an earlier run finished and that are still what it wrote."""
        shards = []
        if self.journal.exists():
            try:
                # A line without its end was cut off by a kill: its shard is written again.
                head, *lines = read_text(self.journal).split("\n")[:-1]
                if parse_json(head)["fingerprint"] == self.fingerprint:
                    shards = [self._shard(parse_json(line)) for line in lines]
            except (OSError, ValueError, KeyError, TypeError):
                return {}  # damaged, as a power failure may leave it: start over
        elif (_record(self.manifest) or {}).get("fingerprint") == self.fingerprint:
            shards = self._listed()
        return {Path(shard.path).name: shard for shard in shards if md5_of(shard.path, shard.size_bytes) == shard.md5}


def _line(shard: Shard) -> str:
    entry = {"url": Path(shard.path).name, "nsamples": shard.num_samples}
    return json.dumps({**entry, "filesize": shard.size_bytes, "md5sum": shard.md5})


@contextmanager
def _bar(total: int, *, show: bool) -> Iterator[Tick]:
    """A progress bar on standard error where that is a terminal; gives what to call with samples done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task("packing", total=total)
        yield lambda count: progress.advance(task, count)
