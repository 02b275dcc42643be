"""Report every fault of a shard, including those after the first.

Checks the tar itself, its samples' keys and fields, links and devices in place of fields, its sidecar, its manifest
entry and, with a :class:`Decoding`, the fields' contents. Each fault is one sentence with shard, byte offset, sample
key and field as far as they apply. A damaged tar is checked up to the damage. Shards may be local or remote. Cost: the
headers; all bytes, once, if an MD5 is recorded or contents are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from disttrain.data.index.remote_index import remote_sidecar, sidecar_url
from disttrain.data.index.shard_index import Shard
from disttrain.data.index.sidecar import ShardTable, in_words, read_sidecar, sidecar_is_fresh, sidecar_path, split_name
from disttrain.data.index.stream import Stream, opened
from disttrain.data.index.tar import ByteSource, Member, TarError, Unread, scan_source
from disttrain.data.remote.ranges import RemoteError, RemoteFile, shown
from disttrain.errors import ShardError, nearest

Spans = dict[str, dict[str, tuple[int, int]]]

_BATCH: Final = 256
_BATCH_BYTES: Final = 2 * 2**20  # images grow tenfold when decoded
_MOST_UNREAD: Final = 5
_MEND: Final = "run `disttrain shards index`"


class Decoding(Protocol):
    """Decodes fields; implemented by :class:`disttrain.data.verify.decode_check.Decoders`, which imports torch."""

    def wants(self, field: str) -> bool:
        """Return whether there is a decoder for a field."""

    def faults(self, field: str, values: Sequence[bytes]) -> Mapping[int, str]:
        """Return why values of a field do not decode, by place."""


def shard_faults(
    shard: Shard,
    *,
    fields: Sequence[str],
    decoding: Decoding | None = None,
    tell_keys: Callable[[Collection[str]], None] | None = None,
) -> tuple[list[str], int]:
    """Return the faults of one shard and the number of its samples.

    Args:
        shard: a shard with its manifest entry: -1 or empty for what is not recorded.
        fields: what every sample must have; alternatives as ``jpg;png``.
        decoding: decodes the fields' contents.
        tell_keys: called with the unique keys of a shard that could be opened.
    """
    if not shard.is_remote and not Path(shard.path).is_file():
        return [f"shard {shard.path} does not exist"], 0
    try:
        with opened(shard.path) as file:
            return _file_faults(shard, file, fields, decoding, tell_keys)
    except ShardError as error:
        return [_unreadable(error)], 0


def _file_faults(
    shard: Shard,
    file: ByteSource,
    fields: Sequence[str],
    decoding: Decoding | None,
    tell_keys: Callable[[Collection[str]], None] | None,
) -> tuple[list[str], int]:
    name = file.name
    is_hashed = bool(shard.md5) and shard.size_bytes in (-1, file.size)
    stream = Stream(file, is_hashed=is_hashed) if is_hashed or decoding is not None else None
    found = _Samples(name, stream or file, decoding)
    try:
        found.read()
    except ShardError as error:
        return [*found.faults, _unreadable(error)], len(found.samples)
    finally:
        if tell_keys is not None:
            tell_keys(found.samples)
    faults, samples, is_whole = found.faults, found.samples, found.is_whole
    faults.extend(_missing_fields(name, samples if is_whole else _without_last(samples), fields))
    # A damaged tar leaves nothing to compare the sidecar with.
    faults.extend(_sidecar_faults(file, samples if is_whole else None))
    if shard.size_bytes not in (-1, file.size):
        faults.append(f"shard {name} has {file.size} bytes, but its manifest says {shard.size_bytes}")
    elif is_hashed and stream is not None:
        faults.extend(_md5_faults(stream, shard))
    if is_whole and shard.num_samples not in (-1, len(samples)):
        faults.append(f"shard {name} holds {len(samples)} samples, but its manifest says {shard.num_samples}")
    return faults, len(samples)


def _md5_faults(stream: Stream, shard: Shard) -> Iterator[str]:
    try:
        md5 = stream.md5()
    except ShardError as error:  # still report the faults found so far
        yield _unreadable(error)
        return
    if md5 != shard.md5:
        yield f"shard {stream.name} has MD5 {md5}, but its manifest says {shard.md5}"


def _unreadable(error: ShardError) -> str:
    return f"shard {error.what}" if isinstance(error, RemoteError) else error.what  # begins with its URL


def first_fields(paths: Iterable[str]) -> tuple[str, ...]:
    """Return the fields of the first readable sample, which the others are expected to have.

    Raises:
        RemoteError: a server does not answer despite retries.
    """
    for path in paths:
        samples: Spans = {}
        try:
            with opened(path) as file:
                for member in scan_source(file):
                    parts = split_name(member.name)
                    if parts is None:
                        continue
                    if samples and parts[0] not in samples:
                        break
                    samples.setdefault(parts[0], {})[parts[1]] = (member.offset, member.size)
        except ShardError as error:
            if isinstance(error, RemoteError) and (error.status is None or error.status >= 500):
                raise  # server down: trying all shards would take hours
            continue  # reported when the shard itself is checked
        for fields in samples.values():
            return tuple(fields)
    return ()


@dataclass
class _Samples:
    """The samples of a shard up to the first damage, and the faults found so far."""

    name: str
    source: ByteSource
    decoding: Decoding | None
    samples: Spans = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    is_whole: bool = True
    _waiting: dict[str, list[tuple[str, int, bytes]]] = field(default_factory=dict)  # key, offset, value, by field
    _waiting_bytes: int = 0
    _num_unread: int = 0

    def read(self) -> None:
        """Read the shard; raises ShardError if the disk or the server fails."""
        last, is_repeat, damage = None, False, ""
        try:
            for member in scan_source(self.source, unread=self._pass_over):
                parts = split_name(member.name)
                if parts is None:
                    continue
                key, extension = parts
                place = f"shard {self.name} at byte {member.offset}: sample {key!r}"
                if key != last:
                    is_repeat = key in self.samples
                    if is_repeat:
                        self.faults.append(f"{place} occurs twice, with other samples in between")
                elif not is_repeat and extension in self.samples[key]:
                    self.faults.append(f"{place} has field {extension!r} twice")
                if not is_repeat:
                    self.samples.setdefault(key, {}).setdefault(extension, (member.offset, member.size))
                last = key
                self._take(key, extension, member)
        except TarError as error:
            damage = error.what
        finally:
            self._decode()
        if self._num_unread > _MOST_UNREAD:
            self.faults.append(f"shard {self.name}: {self._num_unread - _MOST_UNREAD} more members are not read")
        if damage:
            self.faults.append(damage)
            self.is_whole = False
            return
        if not self.samples:
            self.faults.append(f"shard {self.name} holds no samples")

    def _pass_over(self, member: Unread) -> None:
        if split_name(member.name) is None:
            return
        self._num_unread += 1
        if self._num_unread <= _MOST_UNREAD:
            self.faults.append(f"shard {self.name}: {in_words(member)}, is not read")

    def _take(self, key: str, extension: str, member: Member) -> None:
        """Queue a value for decoding in batches of its field."""
        if self.decoding is None or not self.decoding.wants(extension):
            return
        waiting = self._waiting.setdefault(extension, [])
        waiting.append((key, member.offset, self.source.read(member.offset, member.size)))
        self._waiting_bytes += member.size
        if len(waiting) >= _BATCH or self._waiting_bytes >= _BATCH_BYTES:
            self._decode()

    def _decode(self) -> None:
        found: list[tuple[int, str]] = []
        for extension, waiting in self._waiting.items():
            assert self.decoding is not None
            reasons = self.decoding.faults(extension, [value for _, _, value in waiting])
            for place, reason in reasons.items():
                key, offset, _ = waiting[place]
                what = f"shard {self.name} at byte {offset}: sample {key!r}, field {extension!r}: {reason}"
                found.append((offset, what))
        self.faults.extend(what for _, what in sorted(found))
        self._waiting, self._waiting_bytes = {}, 0


def _without_last(samples: Spans) -> Spans:
    return dict(list(samples.items())[:-1])  # the last sample may lack fields only because of the damage


def _missing_fields(name: str, samples: Spans, fields: Sequence[str]) -> Iterator[str]:
    present = {extension for sample in samples.values() for extension in sample}
    for wanted in fields:
        alternatives = {extension.strip().lower() for extension in wanted.split(";")}
        if samples and not alternatives & present:
            yield f"shard {name}: no sample has field {wanted!r}; {nearest(wanted, present)}"
            continue
        for key, sample in samples.items():
            if not alternatives & set(sample):
                offset = next(iter(sample.values()))[0]
                yield f"shard {name} at byte {offset}: sample {key!r} lacks field {wanted!r}, has {', '.join(sample)}"


def _sidecar_faults(file: ByteSource, samples: Spans | None) -> Iterator[str]:
    """Yield what is wrong with a shard's sidecar, if it has one."""
    if isinstance(file, RemoteFile):
        sidecar = shown(sidecar_url(file.url))
        try:
            is_there, table = remote_sidecar(file)
        except RemoteError as error:
            yield f"sidecar {error.what}"  # begins with its URL
            return
    else:
        path = sidecar_path(file.name)
        sidecar, is_there = str(path), path.exists()
        if is_there and not sidecar_is_fresh(file.name):
            yield f"sidecar {sidecar} is older than its shard and ignored: {_MEND}"
            return
        try:
            table = read_sidecar(file.name) if is_there else None
        except OSError as error:
            yield f"sidecar {sidecar} cannot be read: {error.strerror}"
            return
    if is_there and table is None:
        yield f"sidecar {sidecar} is damaged or points outside its shard: {_MEND}"
    if table is not None and samples is not None:
        yield from _differences(table, samples, sidecar)


def _differences(table: ShardTable, samples: Spans, sidecar: str) -> Iterator[str]:
    claimed = table.spans()
    differing = [key for key in {**samples, **claimed} if samples.get(key) != claimed.get(key)]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more samples)" if len(differing) > 1 else ""
        yield (
            f"sidecar {sidecar} does not match its shard: sample {key!r} is {_words(samples.get(key))} in the shard,"
            f" {_words(claimed.get(key))} in the sidecar{more}: {_MEND}"
        )
    elif list(claimed) != list(samples):
        yield f"sidecar {sidecar} lists the samples in a different order than its shard: {_MEND}"


def _words(fields: dict[str, tuple[int, int]] | None) -> str:
    if fields is None:
        return "absent"
    return ", ".join(f"{name} at byte {offset} of size {size}" for name, (offset, size) in fields.items())
