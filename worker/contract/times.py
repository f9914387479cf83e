"""Times as producers and readers write them: RFC 3339, or epoch in milliseconds."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Newer Pythons parse an hour of 24, all of them an offset of +05:99.
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ](?!24)\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:[0-5]\d)?", re.ASCII)


def parse_time(value: str | int) -> datetime:
    """Parse RFC 3339, or an integer as milliseconds since 1970. Raises ValueError.

    Without an offset it is UTC; nanoseconds are cut to microseconds.
    """
    if isinstance(value, int):
        try:
            return EPOCH + timedelta(milliseconds=value)
        except OverflowError:
            raise ValueError("beyond the calendar") from None
    if _RFC3339.fullmatch(value) is None:
        raise ValueError("not a time in RFC 3339")
    # fromisoformat takes upper-case letters only, and cuts what follows the sixth digit.
    time = datetime.fromisoformat(value.upper())
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def format_time(time: datetime) -> str:
    """RFC 3339 in UTC, with `Z`."""
    return time.isoformat().replace("+00:00", "Z")
