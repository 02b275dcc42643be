"""A training configuration read as ``disttrain fit`` reads it, but neither made nor run: for checks before a job waits.

Everything that parsing finds is found here: unknown settings, wrong types, classes that cannot be imported; and whether
local data files are there. What only samples, devices or several ranks can show is not. Cost: the imports of training.
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
from disttrain.data.index import read_manifest
from disttrain.data.patterns import is_manifest, places
from disttrain.data.remote import is_remote
from disttrain.errors import ConfigError
from disttrain.files import expand_path
from disttrain.parallel.config import ParallelConfig, usual_micro_batch_size


@dataclass(frozen=True)
class Checked:
    """What a job has to know of a configuration.

    Attributes:
        text: the whole configuration as YAML, defaults included; ``--config`` takes it again.
        run_dir: the run's folder.
        resume: what ``fit`` is to start from.
        parallel: how the model is spread over ranks.
        data: shard patterns and manifests of each split; of several sources, none.
        global_batch_size: samples of a step.
        micro_batch_size: samples of a forward pass of a rank.
        mirroring: callbacks, by their classes, that copy checkpoints to remote storage beside ``checkpoint``.
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
        """Make nothing."""

    def checked(self) -> Checked:
        get = self.config.fit.get
        parallel, size = get("trainer.parallel"), get("data.micro_batch_size")
        if size is None:
            size = usual_micro_batch_size(int(get("data.global_batch_size")))
        elif size != "auto" and size < 1:
            raise ConfigError(f"data.micro_batch_size is {size}", mend="use at least 1, or auto")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jsonargparse's, of a keyword that older versions need
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
    """Whether the local files of a configuration's data are there; remote ones are not asked for.

    Raises:
        DataError: one is missing, or of another size than its manifest says.
    """
    for name, patterns in checked.data.items():
        for pattern in patterns:
            for place in places(pattern, name=name, ask_servers=False):
                if is_manifest(place) and not is_remote(place):
                    read_manifest(place, name=name)


def _patterns(spec: object) -> list[str]:
    """A split's patterns; those of several sources are looked at when the run starts."""
    if isinstance(spec, str):
        return [spec]
    return [one for one in spec if isinstance(one, str)] if isinstance(spec, list | tuple) else []


def _mirrors(callback: Namespace) -> bool:
    """Whether a callback has a mirror of its own."""
    mirror = (callback.get("init_args") or {}).get("mirror")
    return mirror is not None and mirror.get("url") is not None


def read_config(configs: Sequence[str], settings: Sequence[str]) -> Checked:
    """Read a configuration for ``fit``.

    Args:
        configs: files, later ones over earlier ones.
        settings: ``NAME=VALUE``, over all files.

    Raises:
        ConfigError: what ``fit`` would say of it.
    """
    for one in configs:
        if not Path(one).is_file():
            raise ConfigError(f"there is no configuration {one}", mend="correct --config")
    words = ["fit"]
    for one in configs:
        words += ["--config", one]
    return read_words([*words, *(f"--{one}" for one in settings)])


def read_words(words: Sequence[str]) -> Checked:
    """Read the arguments of ``disttrain``, of which the first is ``fit``.

    Raises:
        ConfigError: what ``fit`` would say of them.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return _Reader(list(words)).checked()
