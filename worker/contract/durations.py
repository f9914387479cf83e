"""Durations as people write them: `200ms`, `1s`, `5m`, `24h`, `30d`."""

from __future__ import annotations

import re
from datetime import timedelta

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "y": 365 * 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|y)", re.ASCII)
_LONGEST_S = 100 * _UNITS["y"]


def parse_duration(text: str) -> timedelta:
    """Parse a duration above zero and of at most a hundred years. Raises ValueError saying what is expected."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not 0 < (seconds := float(match[1]) * _UNITS[match[2]]) <= _LONGEST_S:
        raise ValueError("a duration above zero such as 200ms, 1s, 5m, 30d")
    return timedelta(seconds=seconds)


def format_age(seconds: float) -> str:
    """An age for people: whole days, hours, minutes or seconds, the largest unit of which it has at least two."""
    for unit in ("d", "h", "m"):
        if seconds >= 2 * _UNITS[unit]:
            return f"{int(seconds // _UNITS[unit])}{unit}"
    return f"{max(0, int(seconds))}s"


def format_duration(value: timedelta) -> str:
    """The inverse of `parse_duration`, in the largest unit that needs no fraction, rounded to milliseconds."""
    milliseconds = round(value / timedelta(milliseconds=1))
    for unit in ("d", "h", "m", "s"):
        whole, rest = divmod(milliseconds, int(_UNITS[unit] * 1000))
        if whole and not rest:
            return f"{whole}{unit}"
    return f"{milliseconds}ms"
