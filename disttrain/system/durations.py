"""Human-readable durations: ``90s``, ``3h50m``, ``2d``."""

from __future__ import annotations

import re
from typing import Final

from disttrain.errors import ConfigError

_SECONDS: Final = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)([dhms])")


def parse_duration(text: str, setting: str) -> float:
    """Convert a duration to seconds: numbers with units ``d``, ``h``, ``m``, ``s``, largest first; ``0`` is zero.

    Raises:
        ConfigError: the text is not a duration; the message names the setting.
    """
    if text.strip() == "0":
        return 0.0
    parts = _PART.findall(text.replace(" ", ""))
    units = [unit for _, unit in parts]
    whole = "".join(number + unit for number, unit in parts)
    if not parts or whole != text.replace(" ", "") or units != sorted(set(units), key="dhms".index):
        raise ConfigError(
            f"{setting} is {text!r}, not a duration", hint="write numbers with d, h, m or s, such as 3h50m or 90s"
        )
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)
