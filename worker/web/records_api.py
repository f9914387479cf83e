"""Serves records: `/v1/bars`, `/v1/sessions` and `/v1/metrics`. Requests are bounded and read-only."""

from __future__ import annotations

import re
from datetime import timedelta
from math import isfinite
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from worker.contract.durations import parse_duration
from worker.contract.ids import decode_id
from worker.contract.times import EPOCH, format_time
from worker.web.endpoint import BadRequest, NotFound, answering, read_pair, read_parameters, read_path
from worker.web.time_range import EARLIEST, parse_range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from worker.runtime.clock import Clock

# A day of minutes is 1440.
MAX_BARS = 1500
MAX_LATEST = 1000
MAX_VALUES = 1500
MAX_BUCKETS = 1500
SHORTEST_BUCKET = timedelta(seconds=1)
BARS_RANGE = timedelta(days=1)
METRICS_RANGE = timedelta(hours=1)
# No number of smaller values, in absolute terms, has a sum that a double cannot hold.
SUMMABLE = 1e290
_LATEST = re.compile("[0-9]{1,4}")
_VALUES = ("open", "high", "low", "close", "volume", "vwap")


class Records(Protocol):
    """Reads records. Raises Unavailable, DatabaseRefused."""

    async def bars(self, symbol: str, first: datetime, last: datetime, at_most: int) -> Sequence[Mapping[str, Any]]: ...
    async def latest_bars(self, symbol: str, count: int) -> Sequence[Mapping[str, Any]]: ...
    async def last_event(self, session_id: str) -> tuple[str, datetime] | None: ...
    async def metric_values(
        self, service: str, metric: str, first: datetime, last: datetime, at_most: int
    ) -> Sequence[tuple[datetime, float | None]]: ...
    async def metric_buckets(
        self, service: str, metric: str, first: datetime, last: datetime, width: timedelta, summable: float
    ) -> Sequence[Mapping[str, Any]]: ...


class RecordsApi:
    def __init__(self, records: Records, clock: Clock) -> None:
        self._records = records
        self._clock = clock

    def routes(self) -> list[web.RouteDef]:
        bars, session, metric = answering(self._bars), answering(self._session), answering(self._metric)
        return [
            web.get("/v1/bars", bars),
            web.get("/v1/bars/{symbol:(?s:.*)}", bars),
            web.get("/v1/sessions", session),
            web.get("/v1/sessions/{session_id:(?s:.*)}", session),
            web.get("/v1/metrics", metric),
            web.get("/v1/metrics/{service_and_metric:(?s:.*)}", metric),
        ]

    async def _bars(self, request: web.Request) -> dict[str, Any]:
        symbol = decode_id(read_path(request), "symbol")
        parameters = read_parameters(request, ("from", "to", "latest"))
        if "latest" in parameters:
            bars = await self._records.latest_bars(symbol, _parse_latest(parameters))
        else:
            bars = await self._records.bars(
                symbol, *parse_range(parameters, BARS_RANGE, self._clock.now()), MAX_BARS + 1
            )
        body = {"symbol": symbol, "bars": [_bar(row) for row in bars[:MAX_BARS]]}
        return body if len(bars) <= MAX_BARS else body | {"truncated": True}

    async def _session(self, request: web.Request) -> dict[str, Any]:
        session_id = decode_id(read_path(request), "session id")
        read_parameters(request)
        found = await self._records.last_event(session_id)
        if found is None:
            raise NotFound("no event of this session is stored")
        last_event_id, recorded_at = found
        return {"sessionId": session_id, "lastEventId": last_event_id, "recordedAt": format_time(recorded_at)}

    async def _metric(self, request: web.Request) -> dict[str, Any]:
        raw_service, raw_metric = read_pair(request)
        service, metric = decode_id(raw_service, "service"), decode_id(raw_metric, "metric")
        parameters = read_parameters(request, ("from", "to", "bucket"))
        first, last = parse_range(parameters, METRICS_RANGE, self._clock.now())
        body: dict[str, Any] = {"service": service, "metric": metric}
        if "bucket" in parameters:
            width = _parse_bucket(parameters["bucket"], first, last)
            found = await self._records.metric_buckets(service, metric, first, last, width, SUMMABLE)
            return body | {"bucket": parameters["bucket"].strip(), "buckets": [_bucket(row) for row in found]}
        values = await self._records.metric_values(service, metric, first, last, MAX_VALUES + 1)
        body["values"] = [{"time": format_time(time), "value": _number(value)} for time, value in values[:MAX_VALUES]]
        return body if len(values) <= MAX_VALUES else body | {"truncated": True}


def _parse_bucket(text: str, first: datetime, last: datetime) -> timedelta:
    try:
        width = parse_duration(text)
    except ValueError as error:
        raise BadRequest(f"bucket: expected {error}") from None
    if width < SHORTEST_BUCKET:
        raise BadRequest("bucket: expected one second or more")
    start = (first - EPOCH) // width
    if (last - EPOCH) // width - start >= MAX_BUCKETS:
        raise BadRequest(f"bucket: expected at most {MAX_BUCKETS} buckets between `from` and `to`")
    if start * width < EARLIEST - EPOCH:
        raise BadRequest("bucket: expected a bucket that begins in the year 1 or later")
    return width


def _parse_latest(parameters: Mapping[str, str]) -> int:
    latest = parameters["latest"]
    if len(parameters) > 1:
        raise BadRequest("latest: expected without `from` and `to`")
    if _LATEST.fullmatch(latest) is None or not 1 <= int(latest) <= MAX_LATEST:
        raise BadRequest(f"latest: expected a number from 1 to {MAX_LATEST}")
    return int(latest)


def _bar(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"timestamp": format_time(row["timestamp"]), **{name: _number(row[name]) for name in _VALUES}}


def _bucket(row: Mapping[str, Any]) -> dict[str, Any]:
    """`sum` has only the summable values: it is not known where there are others."""
    count, low, high = row["count"], row["min"], row["max"]
    total = row["sum"] if low > -SUMMABLE and high < SUMMABLE else None
    return {
        "time": format_time(row["start"]),
        "count": count,
        "min": _number(low),
        "max": _number(high),
        "avg": None if total is None else total / count,
        "sum": total,
    }


def _number(value: float | None) -> float | None:
    """Another program may have stored a NaN or an infinity, which JSON does not have: null."""
    return value if value is not None and isfinite(value) else None
