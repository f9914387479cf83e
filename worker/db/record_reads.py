"""Reads bars and sessions. Every query is bounded, and uses an index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Double,
    Integer,
    MetaData,
    Table,
    Text,
    bindparam,
    func,
    select,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

# Cancel slow reads before they slow down the database.
_LIMITS = select(func.set_config("statement_timeout", "2s", True), func.set_config("lock_timeout", "1s", True))

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
_of_symbol = _bars.c.symbol == bindparam("of_symbol")
_at_most = bindparam("at_most", type_=Integer)
BARS_BETWEEN = (
    select(_bars)
    .where(_of_symbol, _bars.c.timestamp.between(bindparam("first"), bindparam("last")))
    .order_by(_bars.c.timestamp)
    .limit(_at_most)
)
LATEST_BARS = select(_bars).where(_of_symbol).order_by(_bars.c.timestamp.desc()).limit(_at_most)
LAST_EVENT = select(_sessions.c.last_event_id, _sessions.c.recorded_at).where(
    _sessions.c.session_id == bindparam("of_session")
)

Row = dict[str, Any]


async def read_bars(tx: AsyncConnection, symbol: str, first: datetime, last: datetime, at_most: int) -> Sequence[Row]:
    """The bars of a symbol from `first` to `last`, both included, the oldest first; column → value."""
    await tx.execute(_LIMITS)
    found = await tx.execute(BARS_BETWEEN, {"of_symbol": symbol, "first": first, "last": last, "at_most": at_most})
    return [dict(row) for row in found.mappings()]


async def read_latest_bars(tx: AsyncConnection, symbol: str, count: int) -> Sequence[Row]:
    """The newest `count` bars of a symbol, the oldest of them first; column → value."""
    await tx.execute(_LIMITS)
    found = await tx.execute(LATEST_BARS, {"of_symbol": symbol, "at_most": count})
    return [dict(row) for row in found.mappings()][::-1]


async def read_last_event(tx: AsyncConnection, session_id: str) -> tuple[str, datetime] | None:
    """The last event id of a session, and when it was recorded. None for an unknown session."""
    await tx.execute(_LIMITS)
    row = (await tx.execute(LAST_EVENT, {"of_session": session_id})).one_or_none()
    return None if row is None else (row.last_event_id, row.recorded_at)
