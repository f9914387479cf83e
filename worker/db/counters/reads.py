"""Reads the totals of some ids, and the most-viewed ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Integer,
    Interval,
    Text,
    Uuid,
    any_,
    bindparam,
    cast,
    column,
    exists,
    func,
    or_,
    select,
    union_all,
)

from worker.db.read_limit import read_settings
from worker.db.tables import (
    view_count_flushes,
    view_count_lineages,
    view_count_sources,
    view_counts,
    view_counts_hourly,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

_SETTINGS = read_settings()

_ids = bindparam("ids", type_=ARRAY(Text))
_total, _flush = view_counts.c, view_count_flushes.c
_this, _lineage = bindparam("source", type_=Text), bindparam("lineage", type_=Uuid)
_last = union_all(
    *(
        select(table.c.last_flush_id).where(table.c.source == _this, table.c.lineage == _lineage)
        for table in (view_count_sources, view_count_lineages)
    )
).scalar_subquery()
# Flushes of its lineage after the marker: what they took is in the totals, and was still in the counters when those
# were read.
_taken = (
    func.unnest(_flush.vod_ids, _flush.counted)
    .table_valued(column("vod_id", Text), column("counted", BigInteger), name="taken")
    .render_derived()
)
_unsettled = (
    select(_taken.c.vod_id, func.sum(_taken.c.counted).label("counted"))
    .select_from(view_count_flushes.join(_taken, _taken.c.vod_id == any_(_ids)))
    .where(_flush.source == _this)
    .where(_flush.flush_id > bindparam("settled", type_=BigInteger), _flush.flush_id <= _last)
    .group_by(_taken.c.vod_id)
    .subquery("unsettled")
)
_asked = func.unnest(_ids).table_valued(column("vod_id", Text), name="asked").render_derived()
TOTALS = select(
    _asked.c.vod_id,
    # An id that was forgotten a moment ago has no total, but a part of its counter may be unsettled.
    func.coalesce(_total.views, 0),
    func.coalesce(_total.counted, 0),
    func.coalesce(_total.announced, 0),
    cast(func.coalesce(_unsettled.c.counted, 0), BigInteger),
).select_from(
    _asked.outerjoin(view_counts, _total.vod_id == _asked.c.vod_id).outerjoin(
        _unsettled, _unsettled.c.vod_id == _asked.c.vod_id
    )
)

_hour = view_counts_hourly.c
_of_id = bindparam("of_id", type_=Text)
_IS_STORED = select(or_(exists().where(_total.vod_id == _of_id), exists().where(_hour.vod_id == _of_id)))
_since = func.date_trunc("hour", func.now() - bindparam("window", type_=Interval), "UTC")
_views = func.sum(_hour.views).label("views")
TOP = (
    select(_hour.vod_id, _views)
    .where(_hour.bucket >= _since)
    .group_by(_hour.vod_id)
    .order_by(_views.desc(), _hour.vod_id)
    .limit(bindparam("at_most", type_=Integer))
)


# All flushes before this time are in the history.
_as_of = (
    select(func.coalesce(func.min(_flush.flushed_at), func.now()))
    .select_from(view_count_sources.join(view_count_flushes, _flush.source == view_count_sources.c.source))
    .where(_flush.flush_id == view_count_sources.c.rolled_up_id + 1)
    .scalar_subquery()
)


_bucket = func.date_trunc(bindparam("bucket", type_=Text), _hour.bucket, "UTC").label("start")
HISTORY = (
    select(_bucket, func.sum(_hour.views).label("views"))
    .where(_hour.vod_id == bindparam("vod_id", type_=Text))
    .where(_hour.bucket >= func.date_trunc(bindparam("bucket", type_=Text), bindparam("first"), "UTC"))
    .where(_hour.bucket <= bindparam("last"))
    .group_by(_bucket)
    .order_by(_bucket)
)


@dataclass(frozen=True, slots=True)
class Stored:
    """An id's row in `view_counts`; all zeros if it has none.

    `unsettled` is the part of `counted` that was still in the counter when the counter was read.
    """

    vod_id: str
    views: int = 0
    counted: int = 0
    announced: int = 0
    unsettled: int = 0


@dataclass(frozen=True, slots=True)
class Ranked:
    """`views` is the number flushed since the start of the window."""

    vod_id: str
    views: int


@dataclass(frozen=True, slots=True)
class Shown:
    """`views` is the number to show, `pending` the counter's value, `stored` the total in Postgres.

    Not `is_exact` where Redis and Postgres contradict each other: pending views may be counted already, or be others.
    """

    vod_id: str
    views: int
    pending: int
    stored: int
    is_exact: bool = True


@dataclass(frozen=True, slots=True)
class TopEntry:
    """`views` is the number since the start of the window, as far as `as_of`; `total` is the number to show now."""

    vod_id: str
    views: int
    total: int


@dataclass(frozen=True, slots=True)
class Top:
    """All flushes before `as_of` are counted. Not `is_exact`: as Shown, for the totals."""

    since: datetime
    as_of: datetime
    entries: list[TopEntry]
    is_exact: bool = True


@dataclass(frozen=True, slots=True)
class Bucket:
    """The views of an id that were flushed in the hour or day that begins at `start`."""

    start: datetime
    views: int


async def read_totals(
    tx: AsyncConnection, ids: Sequence[str], source: str, lineage: UUID | None, settled: int
) -> dict[str, Stored]:
    """The totals of all these ids, to combine with counters that were read when the marker named flush `settled`.

    If the source never had this `lineage`, `unsettled` is zero. Runs in the caller's transaction.
    """
    await tx.execute(_SETTINGS)
    rows = await tx.execute(TOTALS, {"ids": list(ids), "source": source, "lineage": lineage, "settled": settled})
    return {row.vod_id: Stored(*row) for row in rows}


async def is_stored(tx: AsyncConnection, vod_id: str) -> bool:
    """Whether the id has a total or history."""
    return bool((await tx.execute(_IS_STORED, {"of_id": vod_id})).scalar_one())


async def read_top(tx: AsyncConnection, window: timedelta, limit: int) -> tuple[datetime, datetime, list[Ranked]]:
    """The start of the window, the end of the history, and the most-viewed ids between them.

    The history is hourly: the first hour counts in full.
    """
    await tx.execute(_SETTINGS)
    since, as_of = (await tx.execute(select(_since, _as_of), {"window": window})).one()
    rows = await tx.execute(TOP, {"window": window, "at_most": limit})
    return since, as_of, [Ranked(row.vod_id, int(row.views)) for row in rows]


async def read_history(
    tx: AsyncConnection, vod_id: str, bucket: str, first: datetime, last: datetime
) -> tuple[datetime, list[Bucket]]:
    """The end of the history, and the buckets (`hour` or `day`, in UTC) from that of `first` to that of `last`.

    Buckets without views are left out.
    """
    await tx.execute(_SETTINGS)
    as_of = (await tx.execute(select(_as_of))).scalar_one()
    rows = await tx.execute(HISTORY, {"vod_id": vod_id, "bucket": bucket, "first": first, "last": last})
    return as_of, [Bucket(row.start, int(row.views)) for row in rows]
