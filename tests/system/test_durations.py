"""Durations as people write them."""

from __future__ import annotations

import pytest

from disttrain.errors import ConfigError
from disttrain.system.durations import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h50m", 13800), ("90s", 90), ("2d", 172800), ("1h 30m", 5400), ("0", 0), ("0.5s", 0.5), ("1.5h", 5400)],
)
def test_a_duration_is_its_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text, "x") == seconds


@pytest.mark.parametrize("text", ["", "5", "h", "3x", "-1h", "30m1h", "1h1h", "1h30", "one hour"])
def test_what_is_no_duration_names_the_setting(text: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer.stop_after is .*, not a duration\n  hint: write numbers"):
        parse_duration(text, "trainer.stop_after")
