"""The lease in SQL: the conditions and times that every leased row shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Interval, bindparam, func, literal, or_

from worker.db.lease import LEASE_TTL

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, FromClause

# The time of the statement, not of the transaction's begin: a long transaction must not shorten the lease.
NOW = func.clock_timestamp()
UNTIL = NOW + literal(LEASE_TTL, Interval)


def is_mine(table: FromClause) -> ColumnElement[bool]:
    """Held by the worker `me`."""
    return table.c.lease_holder == bindparam("me")


def is_free(table: FromClause) -> ColumnElement[Any]:
    """May be taken by the worker `me`, or is its own; the holder `dead` (or None) is known to have died."""
    row = table.c
    return or_(
        row.lease_holder.is_(None),
        row.lease_until <= NOW,
        # The clock was set back since, or is another server's: no lease is that long.
        row.lease_until > NOW + literal(2 * LEASE_TTL, Interval),
        is_mine(table),
        row.lease_holder == bindparam("dead"),
    )
