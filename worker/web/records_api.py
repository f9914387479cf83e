"""Serves bars and the last events of sessions: `/v1/bars` and `/v1/sessions`. Requests are bounded and read-only."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from math import isfinite
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from worker.contract.ids import decode_id
from worker.contract.times import format_time, parse_time
from worker.web.endpoint import BadRequest, NotFound, answering, read_parameters, read_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from worker.runtime.clock import Clock

# A day of minutes is 1440.
MAX_BARS = 1500
MAX_LATEST = 1000
DEFAULT_RANGE = timedelta(days=1)
_LATEST = re.compile("[0-9]{1,4}")
_MILLISECONDS = re.compile("-?[0-9]{1,15}")
_EARLIEST = datetime.min.replace(tzinfo=UTC)
_VALUES = ("open", "high", "low", "close", "volume", "vwap")


class Records(Protocol):
    """Reads records. Raises Unavailable, DatabaseRefused."""

    async def bars(self, symbol: str, first: datetime, last: datetime, at_most: int) -> Sequence[Mapping[str, Any]]: ...
    async def latest_bars(self, symbol: str, count: int) -> Sequence[Mapping[str, Any]]: ...
    async def last_event(self, session_id: str) -> tuple[str, datetime] | None: ...


class RecordsApi:
    def __init__(self, records: Records, clock: Clock) -> None:
        self._records = records
        self._clock = clock

    def routes(self) -> list[web.RouteDef]:
        bars, session = answering(self._bars), answering(self._session)
        return [
            web.get("/v1/bars", bars),
            web.get("/v1/bars/{symbol:(?s:.*)}", bars),
            web.get("/v1/sessions", session),
            web.get("/v1/sessions/{session_id:(?s:.*)}", session),
        ]

    async def _bars(self, request: web.Request) -> dict[str, Any]:
        symbol = decode_id(read_path(request), "symbol")
        parameters = read_parameters(request, ("from", "to", "latest"))
        if "latest" in parameters:
            bars = await self._records.latest_bars(symbol, _parse_latest(parameters))
        else:
            bars = await self._records.bars(symbol, *self._parse_range(parameters), MAX_BARS + 1)
        body = {"symbol": symbol, "bars": [_bar(row) for row in bars[:MAX_BARS]]}
        return body if len(bars) <= MAX_BARS else body | {"truncated": True}

    def _parse_range(self, parameters: Mapping[str, str]) -> tuple[datetime, datetime]:
        last = _parse_time(parameters, "to") or self._clock.now()
        first = _parse_time(parameters, "from") or last - min(DEFAULT_RANGE, last - _EARLIEST)
        if "to" in parameters and first > last:
            raise BadRequest("from: expected a time that is not after `to`")
        return first, last

    async def _session(self, request: web.Request) -> dict[str, Any]:
        session_id = decode_id(read_path(request), "session id")
        read_parameters(request)
        found = await self._records.last_event(session_id)
        if found is None:
            raise NotFound("no event of this session is stored")
        last_event_id, recorded_at = found
        return {"sessionId": session_id, "lastEventId": last_event_id, "recordedAt": format_time(recorded_at)}


def _parse_latest(parameters: Mapping[str, str]) -> int:
    latest = parameters["latest"]
    if len(parameters) > 1:
        raise BadRequest("latest: expected without `from` and `to`")
    if _LATEST.fullmatch(latest) is None or not 1 <= int(latest) <= MAX_LATEST:
        raise BadRequest(f"latest: expected a number from 1 to {MAX_LATEST}")
    return int(latest)


def _parse_time(parameters: Mapping[str, str], name: str) -> datetime | None:
    text = parameters.get(name)
    if text is None:
        return None
    try:
        # In UTC, because with its offset it may lie beyond the calendar.
        return parse_time(int(text) if _MILLISECONDS.fullmatch(text) else text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise BadRequest(f"{name}: expected a time in RFC 3339 (a + is written %2B), or in milliseconds") from None


def _bar(row: Mapping[str, Any]) -> dict[str, Any]:
    """Another program may have stored a NaN or an infinity, which JSON does not have: null."""
    values = {name: row[name] if isfinite(row[name]) else None for name in _VALUES}
    return {"timestamp": format_time(row["timestamp"]), **values}
