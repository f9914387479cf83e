"""Sizes as people write them: `512KiB`, `64MiB`, `1GiB`."""

from __future__ import annotations

import re

_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"(\d{1,12})(KiB|MiB|GiB|)", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes. Raises ValueError saying what is expected."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not int(match[1]) > 0:
        raise ValueError("a size above zero in bytes, or such as 512KiB, 64MiB, 1GiB")
    return int(match[1]) * _UNITS[match[2]]


def format_size(size: int) -> str:
    """The inverse of `parse_size`, in the largest unit that needs no fraction."""
    unit = next(unit for unit in ("GiB", "MiB", "KiB", "") if size % _UNITS[unit] == 0)
    return f"{size // _UNITS[unit]}{unit}"
