"""Pack data into plain WebDataset tars, in splits and shards.

The tars are written by webdataset's ``TarWriter`` with fixed times, owners and modes, so the same source and options
give the same bytes anywhere. Each split becomes ``<prefix>-000000.tar`` and so on, with a sidecar beside each shard
and finally a manifest ``<prefix>.json`` with the MD5 of every shard. A split is packed once its manifest exists.
Every file is written under a temporary name, then renamed. An interrupted packing resumes: a journal,
``.pack-<prefix>.jsonl``, holds a fingerprint of source and options, and the size and MD5 of each finished shard.
Intact shards are kept; a different fingerprint starts over. A complete packing is recognized from the manifests
alone, without reading the source. Only one process at a time may pack to a prefix. Memory: what the source holds,
plus one sample.
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

from disttrain.data.index.build import md5_of
from disttrain.data.index.shard_index import Shard, describe_shard, read_manifest, write_manifest
from disttrain.data.pack.samples import Ids, Samples, Source, shuffled, stratified_split
from disttrain.data.pack.shard_writer import Tick, write_shard
from disttrain.errors import ConfigError, DataError
from disttrain.system.files import make_folder, sync_directory, write_atomically
from disttrain.system.reading import parse_json, read_json, read_text

PACK_VERSION: Final = 1
"""Incremented whenever the same source and options would give different bytes; part of the fingerprint."""

SPLITS: Final = ("train", "val", "test")
DEFAULT_FRACTIONS: Final = (0.70, 0.15, 0.15)
_WHOLE: Final = ""  # name of the single split when there are no splits


@dataclass(frozen=True)
class PackConfig:
    """How to cut a source into splits and shards.

    Attributes:
        samples_per_shard: maximum samples per shard; shard sizes within a split differ by at most one.
        num_shards: shards of the train split (of everything, if there are no splits), instead of
            ``samples_per_shard``; the other splits get shards of about the same size.
        fractions: of train, val and, if given, test; they sum to 1. Empty: no splits. None: the source's own
            splits if it has any, else 0.70, 0.15, 0.15.
        split_seed: determines the samples of each split and the order in which train is written.
        prefix: prepended to the split in file names (``digits-train-000000.tar``); without splits it is the
            whole name, ``data`` by default.

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
                hint="set one of them to at least 1",
            )
        if self.fractions:
            fits = len(self.fractions) in (2, 3) and min(self.fractions) >= 0 and self.fractions[0] > 0
            if not fits or abs(sum(self.fractions) - 1) > 1e-6:
                raise ConfigError(
                    f"split fractions {', '.join(map(str, self.fractions))} are not valid",
                    hint="give two or three, for train, val and test, that sum to 1, such as 0.7,0.15,0.15",
                )
        if not 0 <= self.split_seed < 2**63:
            raise ConfigError(f"split_seed is {self.split_seed}", hint="use a seed from 0 to 2**63 - 1")
        if not re.fullmatch(r"[\w-]*", self.prefix):
            raise ConfigError(f"prefix is {self.prefix!r}", hint="use letters, digits, '_' and '-' only")

    def file_prefix(self, split: str) -> str:
        """Return the file name prefix of a split."""
        if split == _WHOLE:
            return self.prefix or "data"
        return f"{self.prefix}-{split}" if self.prefix else split

    @property
    def classes_file(self) -> str:
        """Name of the file for the class names."""
        return f"{self.prefix}-classes.json" if self.prefix else "classes.json"


@dataclass(frozen=True)
class PackedSplit:
    """One split on disk.

    Attributes:
        manifest: its manifest.
        shards: its shards, with MD5.
        num_written: how many of the shards this call wrote; the others already existed.
    """

    manifest: Path
    shards: tuple[Shard, ...]
    num_written: int = 0

    @property
    def num_samples(self) -> int:
        """Total samples over all its shards."""
        return sum(shard.num_samples for shard in self.shards)


@dataclass(frozen=True)
class Packing:
    """Result of :func:`pack`: the splits by file prefix, and notes about the source."""

    splits: Mapping[str, PackedSplit]
    was_complete: bool
    notes: tuple[str, ...] = ()


def pack(source: Source, *, out_dir: str | Path, config: PackConfig | None = None, progress: bool = False) -> Packing:
    """Pack a source into a folder, unless it already contains this packing.

    Args:
        source: what to pack.
        out_dir: target folder; created if missing.
        config: splits and shards.
        progress: show a progress bar on standard error if that is a terminal.

    Raises:
        ConfigError: the options do not suit the source.
        DataError: the source is faulty or too small, or the folder cannot be written or holds shards of the
            same name that were not written by a packing.
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
        # Start every split before writing any, so that an old split is never mistaken for part of this packing.
        kept = {split: job.begin(parts[split]) for split, job in jobs.items()}
        with _bar(sum(map(len, splits.values())), show=progress) as tick:
            for split, job in jobs.items():
                packed[job.prefix] = job.run(samples, parts[split], kept[split], record, tick)
    except OSError as error:
        raise DataError(
            f"cannot pack into {folder}: {error}",
            hint="check the folder and its free space, then rerun: packing resumes",
        ) from error
    return Packing(packed, was_complete=False, notes=samples.notes)


def plan_splits(samples: Samples, config: PackConfig) -> dict[str, Ids]:
    """Return the samples of each split in write order: train shuffled, the others unchanged.

    Raises:
        ConfigError: fractions are given, but the source has its own splits.
        DataError: a split would be empty.
    """
    if len(samples) == 0:
        raise DataError("the source holds no samples", hint="point it at data")
    if samples.splits:
        if config.fractions is not None:
            raise ConfigError("the source already has splits", hint="omit --split")
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
            hint="use other fractions, or --split none",
        )
    splits["train"] = shuffled(splits["train"], seed=config.split_seed)
    return splits


def _shard_counts(splits: Mapping[str, Ids], config: PackConfig) -> dict[str, int]:
    """Return how many shards each split gets."""
    sizes = {split: len(ids) for split, ids in splits.items()}
    if not config.num_shards:
        return {split: -(-size // config.samples_per_shard) for split, size in sizes.items()}
    first = next(iter(sizes.values()))
    if config.num_shards > first:
        raise ConfigError(f"{config.num_shards} shards are too many for {first} samples", hint=f"use at most {first}")
    return {split: min(size, max(1, round(size / first * config.num_shards))) for split, size in sizes.items()}


def _record(manifest: Path) -> dict[str, Any] | None:
    """Return the packing record in a manifest; None if the manifest was not written by a packing."""
    try:
        record = read_json(manifest)["packed_from"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if isinstance(record, dict) else None


def _complete(folder: Path, config: PackConfig, fingerprint: str) -> dict[str, PackedSplit] | None:
    """Return the splits of this exact packing if it is complete, judged by sizes (`shards verify` checks MD5)."""
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
                describe_shard(shard.path)  # repairs a missing or stale sidecar
        except DataError:
            return None
    return found or None


def _refuse_other_splits(folder: Path, config: PackConfig, splits: Mapping[str, Ids]) -> None:
    # A test split left over from other fractions would share samples with the new train split.
    for split in SPLITS if _WHOLE not in splits else ():
        job = _Job(folder, config.file_prefix(split), "")
        if split not in splits and (job.manifest.exists() or job.journal.exists()):
            raise DataError(
                f"{folder} holds a split {job.prefix!r} of another packing, which this packing does not have",
                hint=f"remove {job.manifest} and its shards, or pack into another folder",
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
        """Raise if a file here was not written by a packing, so that it is never overwritten.

        With a journal all shards are ours, otherwise only those in the manifest.
        """
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
                f"{self.folder / min(there - ours)} exists and was not written by `disttrain shards pack`",
                hint="remove it, pack into another folder, or set --prefix",
            )

    def begin(self, parts: list[Ids]) -> dict[str, Shard]:
        """Start the split and return the finished shards to keep.

        Afterwards the split has a journal, no manifest, and no shards except the returned ones.
        """
        finished = self._finished()
        kept = {
            path.name: finished[path.name]
            for path, ids in zip(self._paths(parts), parts, strict=True)
            if path.name in finished and finished[path.name].num_samples == len(ids)
        }
        # Write the journal first: it marks all shards of this prefix as ours, so only then may any be removed.
        lines = [json.dumps({"fingerprint": self.fingerprint}), *map(_line, kept.values())]
        write_atomically(self.journal, "\n".join(lines) + "\n")
        self.manifest.unlink(missing_ok=True)
        sync_directory(self.folder)  # otherwise a power failure could restore a manifest whose shards are gone
        for path in list(self.folder.iterdir()):
            stale = self._shard_file.fullmatch(path.name) and path.with_suffix(".tar").name not in kept
            if stale or self._temporary.fullmatch(path.name):
                path.unlink()
        return kept

    def run(
        self, samples: Samples, parts: list[Ids], kept: Mapping[str, Shard], record: dict[str, Any], tick: Tick
    ) -> PackedSplit:
        """Write the missing shards, then the manifest."""
        shards = []
        with open(self.journal, "a", encoding="utf-8") as journal:
            for path, ids in zip(self._paths(parts), parts, strict=True):
                if path.name in kept:
                    shards.append(kept[path.name])
                    describe_shard(str(path))  # writes its sidecar if it is missing
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
        """Return the shards of this exact packing that an earlier run finished and that are still intact."""
        shards = []
        if self.journal.exists():
            try:
                # A line without a newline was cut off when the process died; rewrite its shard.
                head, *lines = read_text(self.journal).split("\n")[:-1]
                if parse_json(head)["fingerprint"] == self.fingerprint:
                    shards = [self._shard(parse_json(line)) for line in lines]
            except (OSError, ValueError, KeyError, TypeError):
                return {}  # damaged, for example by a power failure: start over
        elif (_record(self.manifest) or {}).get("fingerprint") == self.fingerprint:
            shards = self._listed()
        return {Path(shard.path).name: shard for shard in shards if md5_of(shard.path, shard.size_bytes) == shard.md5}


def _line(shard: Shard) -> str:
    entry = {"url": Path(shard.path).name, "nsamples": shard.num_samples}
    return json.dumps({**entry, "filesize": shard.size_bytes, "md5sum": shard.md5})


@contextmanager
def _bar(total: int, *, show: bool) -> Iterator[Tick]:
    """Show a progress bar if standard error is a terminal; yield the function that advances it by samples."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task("packing", total=total)
        yield lambda count: progress.advance(task, count)
