"""Reads bars, sessions, metrics, and the number of dead letters. Every query is bounded, and uses an index."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Double,
    Integer,
    Interval,
    MetaData,
    Table,
    Text,
    bindparam,
    func,
    literal_column,
    select,
    tuple_,
)

from worker.db.read_limit import read_settings
from worker.db.tables import dead_letters
from worker.errors import NotEncodable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import timedelta

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from worker.db.read_limit import ReadLimit
    from worker.db.session import Database

# Only the primary key (symbol, timestamp) has the order that the queries ask for. Otherwise the planner may walk the
# index on the time, through all newer bars of other symbols, or sort all bars of the symbol.
BAR_SETTINGS = read_settings(enable_sort="off", enable_incremental_sort="off")
_SETTINGS = read_settings()

_metadata = MetaData()
_bars = Table(
    "bars_1m",
    _metadata,
    Column("symbol", Text),
    Column("timestamp", DateTime(timezone=True)),
    *(Column(name, Double) for name in ("open", "high", "low", "close")),
    Column("volume", BigInteger),
    Column("vwap", Double),
)
_sessions = Table(
    "session_events",
    _metadata,
    Column("session_id", Text),
    Column("last_event_id", Text),
    Column("recorded_at", DateTime(timezone=True)),
)
_metrics = Table(
    "metrics",
    _metadata,
    Column("time", DateTime(timezone=True)),
    Column("service_name", Text),
    Column("metric_name", Text),
    Column("value", Double),
)
_symbol, _at_most = bindparam("of_symbol", type_=Text), bindparam("at_most", type_=Integer)
_first, _last = (bindparam(name, type_=DateTime(timezone=True)) for name in ("first", "last"))
_key = tuple_(_bars.c.symbol, _bars.c.timestamp)
# Postgres has times that are not a datetime. The driver sends the first and the last datetime as infinities.
_earliest: ColumnElement[datetime] = literal_column(f"timestamptz '{datetime.min}+00'")
_latest: ColumnElement[datetime] = literal_column(f"timestamptz '{datetime.max}+00'")
# The range of the time is implied by that of the key; it also says which chunks of a hypertable to read.
BARS_BETWEEN = (
    select(_bars)
    .where(
        _key >= tuple_(_symbol, _first),
        _key <= tuple_(_symbol, _last),
        _bars.c.timestamp.between(_first, _last),
        _bars.c.timestamp.between(_earliest, _latest),
    )
    .order_by(_bars.c.symbol, _bars.c.timestamp)
    .limit(_at_most)
)
LATEST_BARS = (
    select(_bars)
    .where(_key >= tuple_(_symbol, _earliest), _key <= tuple_(_symbol, _latest))
    .order_by(_bars.c.symbol.desc(), _bars.c.timestamp.desc())
    .limit(_at_most)
)
LAST_EVENT = select(_sessions.c.last_event_id, _sessions.c.recorded_at).where(
    _sessions.c.session_id == bindparam("of_session")
)
_of_metric = (
    _metrics.c.service_name == bindparam("of_service", type_=Text),
    _metrics.c.metric_name == bindparam("of_metric", type_=Text),
    _metrics.c.time.between(_first, _last),
    _metrics.c.time.between(_earliest, _latest),
)
METRIC_VALUES = select(_metrics.c.time, _metrics.c.value).where(*_of_metric).order_by(_metrics.c.time).limit(_at_most)
_value = _metrics.c.value
_epoch: ColumnElement[datetime] = literal_column("timestamptz '1970-01-01+00'")
_start: ColumnElement[datetime] = literal_column("start")
# Postgres raises an error where the sum of finite values is infinite; its avg() does so far earlier.
METRIC_BUCKETS = (
    select(
        func.date_bin(bindparam("width", type_=Interval), _metrics.c.time, _epoch).label("start"),
        func.count().label("count"),
        func.min(_value).label("min"),
        func.max(_value).label("max"),
        func.sum(_value).filter(func.abs(_value) < bindparam("summable", type_=Double)).label("sum"),
    )
    .where(*_of_metric, _value.is_not(None))
    .group_by(_start)
    .order_by(_start)
)

# Bounded: there may be millions.
NEWEST_LETTERS = 10_000
_newest = select(dead_letters.c.pipeline).order_by(dead_letters.c.id.desc()).limit(NEWEST_LETTERS).subquery()
STORED_LETTERS = select(_newest.c.pipeline, func.count().label("letters")).group_by(_newest.c.pipeline)

Row = dict[str, Any]
T = TypeVar("T")


async def read_bars(tx: AsyncConnection, symbol: str, first: datetime, last: datetime, at_most: int) -> Sequence[Row]:
    """The bars of a symbol from `first` to `last`, both included, the oldest first; column → value."""
    await tx.execute(BAR_SETTINGS)
    found = await tx.execute(BARS_BETWEEN, {"of_symbol": symbol, "first": first, "last": last, "at_most": at_most})
    return [dict(row) for row in found.mappings()]


async def read_latest_bars(tx: AsyncConnection, symbol: str, count: int) -> Sequence[Row]:
    """The newest `count` bars of a symbol, the oldest of them first; column → value."""
    await tx.execute(BAR_SETTINGS)
    found = await tx.execute(LATEST_BARS, {"of_symbol": symbol, "at_most": count})
    return [dict(row) for row in found.mappings()][::-1]


async def read_last_event(tx: AsyncConnection, session_id: str) -> tuple[str, datetime] | None:
    """The last event id of a session, and when it was recorded. None for an unknown session."""
    await tx.execute(_SETTINGS)
    row = (await tx.execute(LAST_EVENT, {"of_session": session_id})).one_or_none()
    return None if row is None else (row.last_event_id, row.recorded_at)


class RecordReader:
    """Reads for requests, in transactions of its own and within the limit.

    Raises Unavailable when Postgres cannot be used, is too slow, or too many readers ask at once, and DatabaseRefused
    when the table does not exist.
    """

    def __init__(self, database: Database, limit: ReadLimit) -> None:
        self._database = database
        self._limit = limit

    async def bars(self, symbol: str, first: datetime, last: datetime, at_most: int) -> Sequence[Row]:
        return await self._ask(lambda tx: read_bars(tx, symbol, first, last, at_most), [])

    async def latest_bars(self, symbol: str, count: int) -> Sequence[Row]:
        return await self._ask(lambda tx: read_latest_bars(tx, symbol, count), [])

    async def last_event(self, session_id: str) -> tuple[str, datetime] | None:
        return await self._ask(lambda tx: read_last_event(tx, session_id), None)

    async def metric_values(
        self, service: str, metric: str, first: datetime, last: datetime, at_most: int
    ) -> Sequence[tuple[datetime, float | None]]:
        """The values of a metric from `first` to `last`, both included, the oldest first."""
        asked = {"of_service": service, "of_metric": metric, "first": first, "last": last, "at_most": at_most}

        async def read(tx: AsyncConnection) -> Sequence[tuple[datetime, float | None]]:
            await tx.execute(_SETTINGS)
            return [(row.time, row.value) for row in await tx.execute(METRIC_VALUES, asked)]

        return await self._ask(read, [])

    async def metric_buckets(
        self, service: str, metric: str, first: datetime, last: datetime, width: timedelta, summable: float
    ) -> Sequence[Row]:
        """The values of a metric from `first` to `last`, both included, in buckets whose beginnings are multiples of
        `width` since 1970 in UTC, the oldest first: `start`, `count`, `min`, `max`, and `sum` of the values that are
        less than `summable` in absolute terms. Buckets without values are left out.
        """
        asked = {"of_service": service, "of_metric": metric, "first": first, "last": last}
        asked |= {"width": width, "summable": summable}

        async def read(tx: AsyncConnection) -> Sequence[Row]:
            await tx.execute(_SETTINGS)
            return [dict(row) for row in (await tx.execute(METRIC_BUCKETS, asked)).mappings()]

        return await self._ask(read, [])

    async def count_dead_letters(self) -> dict[str, int]:
        """How many of the newest NEWEST_LETTERS stored dead letters each pipeline has."""

        async def read(tx: AsyncConnection) -> dict[str, int]:
            await tx.execute(_SETTINGS)
            return {row.pipeline: row.letters for row in await tx.execute(STORED_LETTERS)}

        return await self._ask(read, {})

    async def _ask(self, read: Callable[[AsyncConnection], Awaitable[T]], nothing: T) -> T:
        """What `read` finds; `nothing` for a name that the database cannot encode, which no row has."""
        try:
            async with self._limit.turn(), self._database.transaction() as tx:
                return await read(tx)
        except NotEncodable:
            return nothing
