"""The range of a request: `from` and `to`."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from worker.contract.times import parse_time
from worker.web.endpoint import BadRequest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import timedelta

EARLIEST = datetime.min.replace(tzinfo=UTC)
_MILLISECONDS = re.compile("-?[0-9]{1,15}")


def parse_range(parameters: Mapping[str, str], default: timedelta, now: datetime) -> tuple[datetime, datetime]:
    """First and last time, both in UTC: up to `now`, and `default` long, where not given. Raises BadRequest."""
    last = _parse_time(parameters, "to") or now
    first = _parse_time(parameters, "from") or last - min(default, last - EARLIEST)
    if "to" in parameters and first > last:
        raise BadRequest("from: expected a time that is not after `to`")
    return first, last


def _parse_time(parameters: Mapping[str, str], name: str) -> datetime | None:
    text = parameters.get(name)
    if text is None:
        return None
    try:
        # In UTC, because with its offset it may lie beyond the calendar.
        return parse_time(int(text) if _MILLISECONDS.fullmatch(text) else text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise BadRequest(f"{name}: expected a time in RFC 3339 (a + is written %2B), or in milliseconds") from None
