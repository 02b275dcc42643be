"""Where predictions are written: one file, or a folder of numbered files, published by one rename.

File *k* of a folder holds samples ``[k * n, (k + 1) * n)`` of the plain order, whichever rank predicted them. Until it
is complete, everything is in a hidden folder next to the output; the last action is a rename. So an output exists in
full or not at all, and the next run removes what a killed one left behind. An existing output is never replaced unless
requested. Cost: results are written twice, first as parts and then as files.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from disttrain.callbacks.predictions.formats import FormatName, Pieces
from disttrain.data.index.shard_index import Shard, write_manifest
from disttrain.data.index.sidecar import sidecar_path
from disttrain.errors import ConfigError, DataError
from disttrain.system.files import make_folder, resolve_path, sync_directory

SAMPLES_PER_FILE: Final = 10_000
NAME: Final = "predictions"
_BY_SUFFIX: Final[dict[str, FormatName]] = {".jsonl": "jsonl", ".parquet": "parquet", ".tar": "tar"}
_OWN: Final = re.compile(rf"{NAME}(-\d{{6,}}\.(jsonl|parquet|tar|idx)|\.json)")
_HEAD: Final = struct.Struct("<Q")


@dataclass(frozen=True)
class Output:
    """Where predictions are written, and in which format.

    Attributes:
        path: a file, or a folder of files.
        format: the file format.
        samples_per_file: samples per file; 0 writes one file.
        overwrite: whether to replace an existing output.
    """

    path: Path
    format: FormatName
    samples_per_file: int = 0
    overwrite: bool = False

    @classmethod
    def choose(
        cls,
        run_dir: Path,
        *,
        path: str | None = None,
        format: FormatName | None = None,
        samples_per_file: int | None = None,
        overwrite: bool = False,
    ) -> Output:
        """Return the output that the options of ``disttrain predict`` specify.

        A path that ends in ``.jsonl``, ``.parquet`` or ``.tar`` is one file, any other path a folder. The default is
        ``predictions.jsonl`` in the run folder, or its subfolder ``predictions`` if another format or several files are
        requested.

        Raises:
            ConfigError: the options contradict each other.
        """
        if samples_per_file is not None and samples_per_file < 1:
            raise ConfigError(f"--samples_per_file is {samples_per_file}", hint="use at least 1")
        if path is None:
            is_file = format in (None, "jsonl") and samples_per_file is None
            place = run_dir / (f"{NAME}.jsonl" if is_file else NAME)
            format = format or "jsonl"
        else:
            place = resolve_path(path, name="--output")
        suffix = _BY_SUFFIX.get(place.suffix.lower())
        if suffix is None:
            if format is None:
                raise ConfigError(
                    f"--output {path} does not say what is to be written",
                    hint="end it in .jsonl, .parquet or .tar for one file, or give --format for a folder of files",
                )
            return cls(place, format, samples_per_file or SAMPLES_PER_FILE, overwrite)
        if format not in (None, suffix):
            raise ConfigError(
                f"--output {path} is a {suffix} file, but --format is {format}",
                hint="leave one of them out, or name a folder",
            )
        if samples_per_file is not None:
            raise ConfigError(
                f"--output {path} is one file, but --samples_per_file is {samples_per_file}",
                hint=f"name a folder: --output {place.with_suffix('')} --format {suffix}",
            )
        return cls(place, suffix, 0, overwrite)

    def file_of(self, sample_id: int) -> int:
        """Return the number of the file that holds a sample's result."""
        return sample_id // self.samples_per_file if self.samples_per_file else 0

    def file_name(self, number: int) -> str:
        """Return the name of a file."""
        return f"{NAME}-{number:06d}.{self.format}" if self.samples_per_file else self.path.name

    def check(self) -> None:
        """Refuse an output that exists and may not be replaced, or that holds other files. Called on one rank.

        Raises:
            ConfigError: it does.
        """
        if self.samples_per_file and self.path.is_dir():
            held = sorted(entry.name for entry in self.path.iterdir())
            other = next((name for name in held if not _OWN.fullmatch(name)), None)
            if other is not None:
                raise ConfigError(
                    f"folder {self.path} holds other things than predictions, such as {other}",
                    hint="let --output name a folder of its own",
                )
            if not held:
                return
        elif not self.path.exists():
            return
        elif self.samples_per_file or self.path.is_dir():
            kind, wanted = ("folder", "file") if self.path.is_dir() else ("file", "folder")
            raise ConfigError(f"--output {self.path} is a {kind}, not a {wanted}", hint="name another place")
        if not self.overwrite:
            raise ConfigError(
                f"predictions exist: {self.path}", hint="let --output name another place, or give --overwrite"
            )


class Workshop:
    """The hidden folder in which an output is built.

    Args:
        output: the output.
        token: identifies this attempt; the same on all ranks.
    """

    def __init__(self, output: Output, token: str) -> None:
        self.output = output
        whole = Path(os.path.abspath(output.path))
        self._hidden = whole.with_name(f".{whole.name}.partial-")
        self._folder = Path(f"{self._hidden}{token}")
        self._parts, self._files = self._folder / "parts", self._folder / "files"

    def open(self) -> None:
        """Create the folder, and remove those of killed attempts. Called on one rank."""
        for left in glob.glob(f"{glob.escape(str(self._hidden))}*"):
            shutil.rmtree(left, ignore_errors=True)
        make_folder(self._parts.parent)
        self._parts.mkdir()
        self._files.mkdir()

    def check(self) -> None:
        """Check that this rank sees the folder that rank 0 created.

        Raises:
            DataError: it does not.
        """
        if not self._parts.is_dir():
            raise DataError(
                f"{self._folder}, made by rank 0, is not to be seen from here",
                hint="let --output name a place that all nodes share",
            )

    def part(self, number: int, rank: int) -> IO[bytes]:
        """Open a new file for a rank's part of an output file."""
        return open(self._part(number, rank), "wb")

    def pieces(self, number: int, ranks: Sequence[int]) -> Pieces:
        """Yield the pieces of an output file from some ranks' parts, in that order; delete each part once read."""
        for rank in ranks:
            path = self._part(number, rank)
            with open(path, "rb") as file:
                while head := file.read(_HEAD.size):
                    yield file.read(*_HEAD.unpack(head))
            path.unlink()

    def file(self, number: int) -> Path:
        """Return the path at which an output file is built."""
        return self._files / self.output.file_name(number)

    def publish(self, shards: Sequence[Shard]) -> None:
        """Move the finished files to their final place. Called on one rank.

        Raises:
            ConfigError: another output has appeared there meanwhile.
        """
        output = self.output
        output.check()
        if output.samples_per_file:
            if output.format == "tar":
                write_manifest(self._files / f"{NAME}.json", shards, name=NAME)
            if output.path.exists():
                os.rename(output.path, self._folder / "replaced")
            sync_directory(self._files)
            os.rename(self._files, output.path)
        else:
            os.replace(self.file(0), output.path)
            sidecar = sidecar_path(str(self.file(0)))
            if sidecar.exists():
                os.replace(sidecar, sidecar_path(str(output.path)))
        sync_directory(output.path.parent)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _part(self, number: int, rank: int) -> Path:
        return self._parts / f"{number:06d}-{rank:05d}"


def write_piece(file: IO[bytes], piece: bytes) -> None:
    """Append a piece to a part."""
    file.write(_HEAD.pack(len(piece)))
    file.write(piece)
