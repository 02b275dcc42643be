"""Parse a training configuration exactly as ``disttrain fit`` does, without building or running anything.

Used to check a configuration before a job waits in a queue. Finds everything that parsing finds (unknown settings,
wrong types, classes that cannot be imported) and missing local data files. Does not find problems that only samples,
devices or several ranks can show. Cost: the imports of training.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from disttrain.commands.training import TrainingCLI
from disttrain.data.index.patterns import is_manifest, places
from disttrain.data.index.shard_index import read_manifest
from disttrain.data.remote.ranges import is_remote
from disttrain.errors import ConfigError
from disttrain.parallel.config import ParallelConfig, usual_micro_batch_size
from disttrain.system.files import expand_path


@dataclass(frozen=True)
class Checked:
    """The parts of a configuration that a job needs.

    Attributes:
        text: the whole configuration as YAML, defaults included; can be passed back to ``--config``.
        run_dir: the run's folder.
        resume: the ``resume`` setting of ``fit``.
        parallel: how the model is spread over ranks.
        data: shard patterns and manifests of each split; empty for a split with several sources.
        global_batch_size: samples per step.
        micro_batch_size: samples per forward pass on one rank.
        mirroring: class paths of callbacks, other than ``checkpoint``, that copy checkpoints to remote storage.
    """

    text: str
    run_dir: Path
    resume: str
    parallel: ParallelConfig
    data: dict[str, list[str]]
    global_batch_size: int
    micro_batch_size: int | Literal["auto"]
    mirroring: list[str] = field(default_factory=list)


class _Reader(TrainingCLI):
    runs = False

    def instantiate_classes(self) -> None:
        """Skip building the model, data and trainer."""

    def checked(self) -> Checked:
        get = self.config.fit.get
        parallel, size = get("trainer.parallel"), get("data.micro_batch_size")
        if size is None:
            size = usual_micro_batch_size(int(get("data.global_batch_size")))
        elif size != "auto" and size < 1:
            raise ConfigError(f"data.micro_batch_size is {size}", hint="use at least 1, or auto")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hides jsonargparse's warning about a keyword that older versions need
            text = self._config_text
        return Checked(
            text=text,
            run_dir=expand_path(get("trainer.run_dir"), name="trainer.run_dir"),
            resume=str(get("resume")),
            parallel=ParallelConfig() if parallel is None else ParallelConfig(**parallel.as_dict()),
            data={f"data.{split}": _patterns(get(f"data.{split}")) for split in ("train", "val", "test")},
            global_batch_size=int(get("data.global_batch_size")),
            micro_batch_size=size,
            mirroring=[str(one.class_path) for one in get("trainer.callbacks") or [] if _mirrors(one)],
        )


def check_data(checked: Checked) -> None:
    """Check that the configuration's local data files exist; remote files are not checked.

    Raises:
        DataError: a file is missing, or its size differs from its manifest.
    """
    for name, patterns in checked.data.items():
        for pattern in patterns:
            for place in places(pattern, name=name, ask_servers=False):
                if is_manifest(place) and not is_remote(place):
                    read_manifest(place, name=name)


def _patterns(spec: object) -> list[str]:
    """Return a split's patterns; several sources are only checked when the run starts."""
    if isinstance(spec, str):
        return [spec]
    return [one for one in spec if isinstance(one, str)] if isinstance(spec, list | tuple) else []


def _mirrors(callback: Namespace) -> bool:
    """Return whether a callback has its own mirror."""
    mirror = (callback.get("init_args") or {}).get("mirror")
    return mirror is not None and mirror.get("url") is not None


def read_config(configs: Sequence[str], settings: Sequence[str]) -> Checked:
    """Read a configuration as ``fit`` would.

    Args:
        configs: files; later ones override earlier ones.
        settings: ``NAME=VALUE`` pairs, which override all files.

    Raises:
        ConfigError: the error that ``fit`` would raise.
    """
    for one in configs:
        if not Path(one).is_file():
            raise ConfigError(f"configuration file {one} does not exist", hint="correct --config")
    words = ["fit"]
    for one in configs:
        words += ["--config", one]
    return read_words([*words, *(f"--{one}" for one in settings)])


def read_words(words: Sequence[str]) -> Checked:
    """Parse the arguments of ``disttrain``; the first must be ``fit``.

    Raises:
        ConfigError: the error that ``fit`` would raise.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return _Reader(list(words)).checked()
