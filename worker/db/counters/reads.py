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
    func,
    select,
    union_all,
)

from worker.db.read_limit import read_settings
from worker.db.tables import (
    view_count_deltas,
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
_total, _delta = view_counts.c, view_count_deltas.c
_this, _lineage = bindparam("source", type_=Text), bindparam("lineage", type_=Uuid)
_last = union_all(
    *(
        select(table.c.last_flush_id).where(table.c.source == _this, table.c.lineage == _lineage)
        for table in (view_count_sources, view_count_lineages)
    )
).scalar_subquery()
# Flushes of its lineage after the marker: what they took is in the totals, and was still in the counters when those
# were read.
_unsettled = (
    select(_delta.vod_id, func.sum(_delta.counted).label("counted"))
    .where(_delta.source == _this, _delta.vod_id == any_(_ids))
    .where(_delta.flush_id > bindparam("settled", type_=BigInteger), _delta.flush_id <= _last)
    .group_by(_delta.vod_id)
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
_since = func.date_trunc("hour", func.now() - bindparam("window", type_=Interval), "UTC")
_views = func.sum(_hour.views).label("views")
TOP = (
    select(_hour.vod_id, _views)
    .where(_hour.bucket >= _since)
    .group_by(_hour.vod_id)
    .order_by(_views.desc(), _hour.vod_id)
    .limit(bindparam("at_most", type_=Integer))
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
    """`views` is the number to show, `pending` the counter's value, `stored` the total in Postgres."""

    vod_id: str
    views: int
    pending: int
    stored: int


@dataclass(frozen=True, slots=True)
class TopEntry:
    """`views` is the number since the start of the window, as of the last flush; `total` is the number to show now."""

    vod_id: str
    views: int
    total: int


@dataclass(frozen=True, slots=True)
class Top:
    since: datetime
    entries: list[TopEntry]


async def read_totals(
    tx: AsyncConnection, ids: Sequence[str], source: str, lineage: UUID | None, settled: int
) -> dict[str, Stored]:
    """The totals of all these ids, to combine with counters that were read when the marker named flush `settled`.

    If the source never had this `lineage`, `unsettled` is zero. Runs in the caller's transaction.
    """
    await tx.execute(_SETTINGS)
    rows = await tx.execute(TOTALS, {"ids": list(ids), "source": source, "lineage": lineage, "settled": settled})
    return {row.vod_id: Stored(*row) for row in rows}


async def read_top(tx: AsyncConnection, window: timedelta, limit: int) -> tuple[datetime, list[Ranked]]:
    """The start of the window and the most-viewed ids since. The history is hourly: the first hour counts in full."""
    await tx.execute(_SETTINGS)
    since = (await tx.execute(select(_since), {"window": window})).scalar_one()
    rows = await tx.execute(TOP, {"window": window, "at_most": limit})
    return since, [Ranked(row.vod_id, int(row.views)) for row in rows]
