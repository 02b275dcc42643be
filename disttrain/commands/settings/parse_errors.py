"""Turn a configuration parse error into one readable message.

For a wrong setting, jsonargparse reports a nested list of every type that did not match. This module extracts the part
that matters: which setting, what was expected, what was given, and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl

from disttrain.checkpoint.remote.copies import MirrorConfig
from disttrain.data.cache.shard_cache import CacheConfig
from disttrain.data.decode.field import Field
from disttrain.data.loader.loaders import LoaderConfig
from disttrain.data.loader.transforms import HooksConfig
from disttrain.data.module import ShuffleConfig
from disttrain.data.remote.ranges import RetryConfig
from disttrain.errors import ConfigError, DisttrainError, nearest
from disttrain.optim import OptimizerConfig, ScheduleConfig
from disttrain.parallel.config import ParallelConfig

_CONFIGS = (
    OptimizerConfig,
    ScheduleConfig,
    ParallelConfig,
    LoaderConfig,
    ShuffleConfig,
    CacheConfig,
    Field,
    HooksConfig,
    MirrorConfig,
    RetryConfig,
)
SEE_HELP = "see --help for the settings and their types, or --print_config for all of them"


def explain(message: str, settings: Iterable[str]) -> DisttrainError:
    """Return the error to show for a parser message.

    Args:
        message: the parser's message.
        settings: the dotted names of all settings that the parser knows.
    """
    own = re.search(r"(?:^|- )\s*([^\n]+)\n\s+hint: ([^\n]+)", message)
    if own is not None and own.group(2) != SEE_HELP and "Option '" not in own.group(1):
        return ConfigError(_within(_keys(message[: own.start()]), own.group(1).strip()), hint=own.group(2).strip())
    text = " ".join(message.replace(SEE_HELP, "").split())
    unknown = re.search(r"(?:Option '|does not accept option '|[Uu]nrecognized arguments: --)([\w.]+)", text)
    if unknown is not None:
        path = ".".join([*_keys(text[: unknown.start()]), unknown.group(1)])
        return ConfigError(f"there is no setting {path!r}", hint=_nearest_setting(path, set(settings)))
    value = re.search(r"Expected an? (.{1,200}?)\. Got value: (.*?)(?: hint:| - | Given value|$)", text)
    if value is not None:
        path = ".".join(_keys(text[: value.start()]))
        return ConfigError(f"{path} is {value.group(2)!r}", hint=f"it must be {_kind(value.group(1))}")
    optional = re.search(r"Expected an? (.{1,200}?) - Expected a <class 'NoneType'>.*Given value: (.*)$", text)
    if optional is not None:
        path = ".".join(_keys(text[: optional.start()]))
        return ConfigError(f"{path} is {optional.group(2)!r}", hint=f"it must be {_kind(optional.group(1))}, or null")
    function = re.search(r"expects a function or a callable class: (.*?)(?= - Expected| Given value| hint:|$)", text)
    if function is not None:
        return ConfigError(
            f"{'.'.join(_keys(text[: function.start()]))}: {function.group(1)[:300]}",
            hint="name a function, or a class with its init_args, in a module that can be imported from here",
        )
    class_path = re.search(r"Problem with given class_path .*?(?= - Expected| hint:|$)", text)
    if class_path is not None:
        return ConfigError(class_path.group(0), hint="correct the class path; its module must be importable from here")
    return ConfigError(text[:400], hint=SEE_HELP)


def own_error(error: BaseException) -> DisttrainError | None:
    """Return the ``DisttrainError`` in an error's cause or context chain, if any."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DisttrainError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _within(keys: list[str], what: str) -> str:
    """Replace the setting name in a nested parser's message with its full path."""
    if not keys:
        return what
    path = ".".join(keys)
    return re.sub(r"^(there is no setting ')?([\w.]+)(' is |'?)", rf"\g<1>{path}.\g<2>\g<3>", what, count=1)


def _kind(typehint: str) -> str:
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", typehint)
    if literal is not None:
        return f"one of {literal.group(1)}"
    plain = re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", typehint)
    return f"of type {plain.group(1) if plain else typehint}"


def _keys(text: str) -> list[str]:
    return re.findall(r'Parser key "([\w.]+)"', text)


def _nearest_setting(path: str, settings: set[str]) -> str:
    """Find the first part of a dotted path that does not exist and suggest the nearest name at that level."""
    parts = path.split(".")
    for depth, part in enumerate(parts):
        prefix = ".".join(parts[:depth])
        children = {_child(name, prefix) for name in settings if not prefix or name.startswith(f"{prefix}.")}
        if not children:
            return f"correct {part!r}; {nearest(part, set(_vocabulary()))}"
        if part not in children:
            return f"correct {part!r}; {nearest(part, children)}"
    return f"correct {parts[-1]!r}; {nearest(parts[-1], set(_vocabulary()))}"


def _child(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}." if prefix else "").split(".")[0]


def _vocabulary() -> Iterator[str]:
    """Yield setting names that the parser does not list: fields of dataclasses and arguments of tasks."""
    for config in _CONFIGS:
        yield from (field.name for field in dataclasses.fields(config))
    for task in _subclasses(pl.LightningModule):
        yield from (
            name for name in inspect.signature(task.__init__).parameters if name not in ("self", "args", "kwargs")
        )


def _subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)
