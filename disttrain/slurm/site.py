"""Read what a cluster needs for every job from a small YAML file: account, partition, modules, container, environment.

The file is written once per site and shared by all users and recipes, so recipes name neither hardware nor account.
Unknown names and wrong types are errors that name the field. Nothing in the file is executed except the lines under
``setup``, which are copied into the job's script.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from disttrain.errors import ConfigError, nearest
from disttrain.system.reading import read_yaml

VARIABLE: Final = "DISTTRAIN_SITE"
DEFAULT: Final = Path("~/.config/disttrain/site.yaml")
RUNTIMES: Final = ("apptainer", "pyxis")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Container:
    """The image that ranks run in.

    Attributes:
        image: file or address of the image.
        runtime: ``apptainer`` or ``pyxis`` (NVIDIA's srun plugin).
        mounts: folders to mount, as ``/folder`` or ``/outside:/inside``; the working folder is always mounted.
    """

    image: str
    runtime: str = "apptainer"
    mounts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise ConfigError(
                f"container.runtime is {self.runtime!r}", hint=f"correct it; {nearest(self.runtime, RUNTIMES)}"
            )


@dataclass(frozen=True)
class Site:
    """Settings of a cluster; all are optional.

    Attributes:
        account: the account to charge.
        partition: default partition.
        qos: quality of service.
        python: the interpreter for the ranks, inside the container if there is one; the submitting one by default.
        cpus_per_task: cores per rank.
        memory: memory per node in SLURM's notation, such as ``64G``; ``0`` for all of it.
        modules: modules to load.
        setup: shell lines before the ranks start, such as ``source /shared/venv/bin/activate``.
        environment: environment variables for the ranks.
        sbatch: extra sbatch options by name; null for one without a value.
        container: the image that ranks run in.
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    python: str | None = None
    cpus_per_task: int | None = None
    memory: str | None = None
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    sbatch: Mapping[str, str | None] = field(default_factory=dict)
    container: Container | None = None

    def __post_init__(self) -> None:
        if self.cpus_per_task is not None and self.cpus_per_task < 1:
            raise ConfigError(f"cpus_per_task is {self.cpus_per_task}", hint="use at least 1")
        for name in self.environment:
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"environment has {name!r}, which is not a variable name", hint="use letters, digits and _"
                )


def find_site(named: Path | None) -> Path | None:
    """Return the site file: the one given, that of ``DISTTRAIN_SITE``, or the default one; None if there is none."""
    if named is None and VARIABLE in os.environ:
        named = Path(os.environ[VARIABLE])
    if named is not None:
        return named
    default = DEFAULT.expanduser()
    return default if default.exists() else None


def load_site(path: Path | None) -> Site:
    """Read the settings of a cluster; without a file, return empty settings.

    Raises:
        ConfigError: the file cannot be read, is not valid YAML, or has an invalid field; the message names it.
    """
    if path is None:
        return Site()
    try:
        content = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"site file {path} cannot be read: {error.strerror}", hint="correct --site") from None
    except ValueError as error:
        raise ConfigError(f"site file {path} {error}", hint="correct --site, or the file") from None
    try:
        return Site(**_read(Site, {} if content is None else content, ""))
    except ConfigError as error:
        raise ConfigError(f"site file {path}: {error.what}", hint=error.hint) from None


def _read(kind: type[Any], content: Any, prefix: str) -> dict[str, Any]:
    """Return the arguments of a dataclass, checked by name and type."""
    if not isinstance(content, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the file'} is not a mapping", hint="write NAME: VALUE")
    known = {one.name: str(one.type) for one in fields(kind)}
    found: dict[str, Any] = {}
    for name, value in content.items():
        if name not in known:
            raise ConfigError(
                f"there is no field {prefix}{name}", hint=f"correct or remove it; {nearest(str(name), known)}"
            )
        if value is not None:
            found[name] = _value(f"{prefix}{name}", known[name], value)
    if kind is Container and "image" not in found:
        raise ConfigError("container.image is missing", hint="set the image, or remove container")
    return found


def _value(name: str, kind: str, value: Any) -> Any:
    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"{name} is {value!r}", hint=f"it must be {expected}")

    if kind.startswith("Container"):
        return Container(**_read(Container, value, f"{name}."))
    if kind.startswith("tuple"):
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise wrong("a list of strings")
        return tuple(value)
    if kind.startswith("Mapping"):
        if not isinstance(value, dict) or not all(isinstance(one, str | int | float | None) for one in value.values()):
            raise wrong("a mapping")
        if "None" not in kind and None in value.values():
            raise wrong("a mapping without empty values")
        return {str(key): None if one is None or one is True else str(one) for key, one in value.items()}
    if kind.startswith("int"):
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong("an integer")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise wrong("a string")
    return str(value)
