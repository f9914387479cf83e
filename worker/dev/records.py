"""Demo records of all pipelines. Each knows what the rows of this run must be, whatever happens to the worker."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import grpc
from redis.exceptions import RedisError
from sqlalchemy import BigInteger, ColumnElement, DateTime, String, cast, column, func, select, table

from worker.dev.report import Line
from worker.rpc.analytics.v1.analytics_pb2 import LogMetricsRequest, LogMetricsResponse
from worker.rpc.service import METHOD, SERVICE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from redis.asyncio import Redis

    from worker.db.session import Database

TICK_S = 0.05
CALL_TIMEOUT_S = 1.0
SYMBOLS = 20
SESSIONS = 50

Document = dict[str, Any]


class Made(NamedTuple):
    """A record: `key` and `value` are those of its row."""

    key: str
    value: str
    document: Document


class Found(NamedTuple):
    """How many rows there are, and how many keys do not have the row that they must have."""

    rows: int
    wrong: int


class Expected:
    """What the rows of this run must be: `sent` records were confirmed.

    By key: the values of which its row must have one. None among them means that there may be no row.
    """

    def __init__(self) -> None:
        self.sent = 0
        self._values: defaultdict[str, set[str | None]] = defaultdict(lambda: {None})

    def confirmed(self, key: str, value: str) -> None:
        self.sent += 1
        self._values[key] = {value}

    def unclear(self, key: str, value: str) -> None:
        """Sent without an answer."""
        self._values[key].add(value)

    def compare(self, rows: list[tuple[str, str]]) -> Found:
        """`rows`: key and value of each."""
        found: dict[str, list[str | None]] = {}
        for key, value in rows:
            found.setdefault(key, []).append(value)
        keys = self._values.keys() | found.keys()
        wrong = [key for key in keys if not self._is_right(key, found.get(key, [None]))]
        return Found(len(rows), len(wrong))

    def _is_right(self, key: str, values: list[str | None]) -> bool:
        return len(values) == 1 and values[0] in self._values.get(key, {None})


@dataclass(frozen=True, slots=True)
class Kind:
    """How the records of one pipeline are made, and found again.

    `make` takes a number and the id of this run, with which the column `mine` begins: rows of earlier runs stay.
    """

    pipeline: str
    promise: str
    make: Callable[[int, str], Made]
    mine: str
    key: ColumnElement[str]
    value: ColumnElement[str]


def _text(name: str) -> ColumnElement[str]:
    return cast(column(name), String)


def _whole(name: str) -> ColumnElement[str]:
    """A number without a fraction."""
    return cast(cast(column(name), BigInteger), String)


def _request(number: int, run: str) -> Made:
    document = {
        "time": datetime.now(UTC).isoformat(),
        "path": f"/vod/demo_{number % 100:04}/{number % 500:05}.m4s",
        "ip": f"192.0.2.{number % 254 + 1}",
        "user_agent": "demo",
        "sid": run,
        "uid": str(number),
    }
    return Made(str(number), str(number), document)


def _bar(number: int, run: str) -> Made:
    """The bars of one minute, corrected again and again."""
    symbol, volume = f"{run}-{number % SYMBOLS}", number
    prices = {"open": 1.0, "high": 2.0, "low": 0.5, "close": 1.5, "vwap": 1.25}
    minute = "2024-05-01T13:30:00Z"
    return Made(symbol, str(volume), {"symbol": symbol, "timestamp": minute, "volume": volume, **prices})


def _session_event(number: int, run: str) -> Made:
    session, event = f"{run}-{number % SESSIONS}", str(number)
    return Made(session, event, {"session_id": session, "event_id": event})


STREAMS = (
    Kind("chunk_requests", "each entry is one row", _request, "sid", _text("uid"), _text("uid")),
    Kind("bars_1m", "each bar has its last values", _bar, "symbol", _text("symbol"), _text("volume")),
    Kind(
        "session_events",
        "each session has its last event",
        _session_event,
        "session_id",
        _text("session_id"),
        _text("last_event_id"),
    ),
)
METRICS = Kind(
    "metrics",
    "each OK over gRPC is one row",
    lambda number, run: Made(str(number), str(number), {"service_name": run, "metric_name": "demo", "value": number}),
    "service_name",
    _whole("value"),
    _whole("value"),
)


class Records:
    """Sends `rate` records of one kind per second."""

    def __init__(self, kind: Kind, rate: float) -> None:
        self.kind = kind
        self.expected = Expected()
        self._rate = rate
        self._run = f"demo-{uuid4().hex[:12]}"
        self._number = 0

    async def run(self, stop: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        while not stop.is_set():
            due = int((loop.time() - started) * self._rate) - self._number
            if due > 0:
                await self._send([self._make() for _ in range(due)])
            await asyncio.sleep(TICK_S)

    def _make(self) -> Made:
        self._number += 1
        return self.kind.make(self._number, self._run)

    async def _send(self, records: list[Made]) -> None:
        raise NotImplementedError

    async def find(self, database: Database) -> Found:
        """Compare the rows of this run. Raises Unavailable."""
        kind = self.kind
        mine = column(kind.mine, String).startswith(self._run)
        query = select(kind.key, kind.value).select_from(table(kind.pipeline)).where(mine)
        async with database.transaction() as tx:
            return self.expected.compare([(key, value) for key, value in await tx.execute(query)])

    def line(self, found: Found) -> Line:
        """The line of the report."""
        result = f"[bold green]EXACT[/]: {self.kind.promise}" if self.expected.sent else "nothing was sent"
        wrong = (f"{found.wrong:,} {'row' if found.wrong == 1 else 'rows'} missing or wrong",) if found.wrong else ()
        return Line(self.kind.pipeline, None, self.expected.sent, found.rows, result, wrong)


class StreamRecords(Records):
    """Adds entries to the stream of the pipeline."""

    def __init__(self, kind: Kind, rate: float, redis: Redis) -> None:
        super().__init__(kind, rate)
        self._redis = redis

    async def _send(self, records: list[Made]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for record in records:
            pipeline.xadd(self.kind.pipeline, {"data": json.dumps(record.document)})
        try:
            await pipeline.execute()
        except (RedisError, OSError):
            for record in records:
                self.expected.unclear(record.key, record.value)
        else:
            for record in records:
                self.expected.confirmed(record.key, record.value)


class MetricCalls(Records):
    """Logs metrics over gRPC, several calls at a time. A call that fails is not repeated."""

    def __init__(self, rate: float, target: str) -> None:
        super().__init__(METRICS, rate)
        self._channel = grpc.aio.insecure_channel(target, options=[("grpc.max_reconnect_backoff_ms", 500)])
        self._log_metric = self._channel.unary_unary(
            f"/{SERVICE}/{METHOD}", LogMetricsRequest.SerializeToString, LogMetricsResponse.FromString
        )

    async def run(self, stop: asyncio.Event) -> None:
        try:
            await super().run(stop)
        finally:
            await self._channel.close()

    async def _send(self, records: list[Made]) -> None:
        await asyncio.gather(*(self._call(record) for record in records))

    async def _call(self, record: Made) -> None:
        try:
            await self._log_metric(LogMetricsRequest(**record.document), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            self.expected.unclear(record.key, record.value)
        else:
            self.expected.confirmed(record.key, record.value)


async def count_events(database: Database, since: datetime) -> Counter[str]:
    """How many rows of view_events each id has since then. Raises Unavailable."""
    vod_id, time = column("vod_id", String), column("time", DateTime(timezone=True))
    query = select(vod_id, func.count()).select_from(table("view_events")).where(time >= since).group_by(vod_id)
    async with database.transaction() as tx:
        return Counter({row[0]: row[1] for row in await tx.execute(query)})


def make_records(redis: Redis, grpc_target: str, rates: Mapping[str, float]) -> list[Records]:
    """The records of all pipelines; `rates` by pipeline, a second."""
    streams = [StreamRecords(kind, rates[kind.pipeline], redis) for kind in STREAMS]
    return [*streams, MetricCalls(rates[METRICS.pipeline], grpc_target)]
