"""Check configuration files and values before jsonargparse parses them, so that none can hang or crash the parser.

On import, every piece of YAML that jsonargparse reads, file or value, is routed through
:func:`disttrain.system.reading.check_yaml`: the C parser recurses on nested YAML, and aliases can expand exponentially.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from disttrain.commands.settings.parse_errors import SEE_HELP
from disttrain.errors import ConfigError, passed_through_users_code
from disttrain.system.reading import ReadError, check_yaml, read_yaml

_CONFIG: Final = ("-c", "--config")
_MOST_DIGITS: Final = 300  # no floating-point number needs more


def parse(parser: LightningArgumentParser, args: Sequence[Any]) -> Any:
    """Parse a command line whose first word is the subcommand.

    Raises:
        ConfigError: the parser rejects the command line or crashes on it.
    """
    _check_words(args)
    try:
        config = parser.parse_args(args)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, OSError) as error:
        if isinstance(error, ConfigError) or passed_through_users_code(error):
            raise
        raise ConfigError(f"a setting cannot be read: {type(error).__name__}: {error}", hint=SEE_HELP) from error
    seed = config.get(f"{args[0]}.seed_everything", 0)
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything is {seed}", hint="use a number from 0 to 4294967295")
    return config


def _check_words(words: Sequence[Any]) -> None:
    """Check the words of a command line and the configuration files that they name.

    Raises:
        ConfigError: a file is not UTF-8 YAML within the limits; or a value names something other than a file or folder
            (such as a FIFO), contains a NUL, or is a number that no setting can hold.
    """
    flag = ""
    for word in map(str, words):
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            name, value = flag, word
        elif not equals:
            name, value = word, ""
        flag = word if word.startswith("-") and not equals else ""
        if name in _CONFIG and value:
            for key, leaf in _leaves(_content(value)):
                _check(f"{value}: {key}", leaf)
        _check(name, value)


def _content(file: str) -> Any:
    try:
        return read_yaml(file)
    except ReadError as error:
        raise ConfigError(f"{file} {error}", hint="correct --config, or the file") from None
    except FileNotFoundError:
        raise ConfigError(f"configuration file {file} does not exist", hint="correct --config") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{file} cannot be read: {why}", hint="correct --config") from None


def _check(name: str, value: str) -> None:
    """Reject a value that would block the parser or crash it with an obscure error."""
    if "\0" in value:
        raise ConfigError(f"{name} is {value!r}, which contains a NUL character", hint="remove it")
    if len(value) > _MOST_DIGITS and re.fullmatch(r"[-+]?\d+", value):
        raise ConfigError(f"{name} is a number with {len(value):,} digits", hint="use a smaller number")
    try:
        mode = Path(value).stat().st_mode if value and name.rpartition(".")[2] != "url" else stat.S_IFREG
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ConfigError(f"{name} is {value}, which is neither a regular file nor a folder", hint="correct it")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the strings of a configuration with their dotted names."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}[{number}]")
    elif isinstance(value, str):
        yield key, value


def _load(text: str) -> Any:
    """Call jsonargparse's own loader on text within the limits."""
    try:
        check_yaml(text)
        return _THEIRS(text)
    except (ValueError, OverflowError, RecursionError, TypeError) as error:
        raise yaml.YAMLError(str(error)) from None


_THEIRS: Final = get_loader("yaml")
set_loader("yaml", _load, (yaml.YAMLError,))
