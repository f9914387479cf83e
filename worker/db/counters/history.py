"""The SQL of the hourly history: flushes are added to it behind the flush, in transactions of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import (
    BigInteger,
    Text,
    bindparam,
    cast,
    column,
    delete,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert

from worker.db.tables import view_count_flushes, view_count_sources, view_counts_hourly
from worker.db.transaction_settings import SETTINGS

if TYPE_CHECKING:
    from sqlalchemy import Update
    from sqlalchemy.ext.asyncio import AsyncConnection

# Flushes that one transaction looks at: of each, only the number of its ids is read.
MAX_FLUSHES = 10_000

_flush, _source, _hour = view_count_flushes.c, view_count_sources.c, view_counts_hourly.c
_this = _source.source == bindparam("name")
_LOCK = select(_source.rolled_up_id, _source.last_flush_id, *SETTINGS).where(_this).with_for_update()
_POSITIONS = select(_source.rolled_up_id, _source.last_flush_id).where(_this)
_NAMES = select(_source.source).order_by(_source.source)
# Of the first flush that is not in the history yet.
_AGE = (
    select(func.extract("epoch", func.now() - _flush.flushed_at))
    .where(_flush.source == bindparam("name"), _flush.flush_id > bindparam("rolled_up"))
    .order_by(_flush.flush_id)
    .limit(1)
)


def _rolling_up() -> Update:
    """Add the flushes after `rolled_up` to their hours, and move `rolled_up_id`. Returns its new value.

    As many flushes as have `at_most` ids together, but at least one.
    """
    name, rolled_up = bindparam("name", type_=Text), bindparam("rolled_up", type_=BigInteger)
    at_most = bindparam("at_most", type_=BigInteger)
    next_ones = (
        select(_flush.flush_id, _flush["keys"])
        .where(_flush.source == name, _flush.flush_id > rolled_up)
        .order_by(_flush.flush_id)
        .limit(MAX_FLUSHES)
        .subquery("next_ones")
    )
    sized = select(
        next_ones.c.flush_id,
        func.sum(next_ones.c["keys"]).over(order_by=next_ones.c.flush_id).label("ids"),
        func.row_number().over(order_by=next_ones.c.flush_id).label("number"),
    ).subquery("sized")
    upto = (
        select(func.max(sized.c.flush_id).label("flush_id"))
        .where(or_(sized.c.ids <= at_most, sized.c.number == 1))
        .cte("upto")
    )
    change = (
        func.unnest(_flush.vod_ids, _flush.changes)
        .table_valued(column("vod_id", Text), column("views", BigInteger), name="change")
        .render_derived()
    )
    bucket, views = func.date_trunc("hour", _flush.flushed_at, "UTC"), func.sum(change.c.views)
    hours = upsert(view_counts_hourly).from_select(
        ["bucket", "vod_id", "views"],
        select(bucket, change.c.vod_id, cast(views, BigInteger))
        .select_from(view_count_flushes.join(change, _flush.flush_id > rolled_up))
        .where(_flush.source == name, _flush.flush_id <= select(upto.c.flush_id).scalar_subquery())
        .group_by(bucket, change.c.vod_id)
        .having(views > 0)
        # Every writer locks rows in the same order.
        .order_by(change.c.vod_id, bucket),
    )
    added = hours.on_conflict_do_update(
        index_elements=[_hour.vod_id, _hour.bucket], set_={"views": _hour.views + hours.excluded.views}
    ).cte("added")
    return (
        update(view_count_sources)
        .where(_source.source == name, _source.rolled_up_id == rolled_up, upto.c.flush_id > _source.rolled_up_id)
        .values(rolled_up_id=upto.c.flush_id)
        .returning(_source.rolled_up_id)
        .add_cte(added)
    )


_ROLL_UP = _rolling_up()
_SKIP = update(view_count_sources).where(_this).values(rolled_up_id=_source.last_flush_id)
_FORGET = delete(view_counts_hourly).where(_hour.vod_id == bindparam("vod_id"))


async def all_sources(tx: AsyncConnection) -> list[str]:
    """The names of all sources of this database: they share totals and history."""
    return list((await tx.execute(_NAMES)).scalars())


class History:
    """The part of one source in the history. Every method runs in the caller's transaction."""

    def __init__(self, source: str) -> None:
        self._name = source

    async def roll_up(self, tx: AsyncConnection, at_most: int) -> float | None:
        """Add the next flushes to their hours: those that have `at_most` ids together, but at least one flush.

        Takes the lock of the source row, and waits for it, at most the lock timeout. Returns the age in seconds of the
        first flush that is left; None: none is left.
        """
        row = (await tx.execute(_LOCK, {"name": self._name})).one_or_none()
        if row is None or row.rolled_up_id == row.last_flush_id:
            return None
        name = {"name": self._name}
        rolled_up = (await tx.execute(_ROLL_UP, {**name, "rolled_up": row.rolled_up_id, "at_most": at_most})).scalar()
        if rolled_up is None or rolled_up == row.last_flush_id:
            return None
        age = (await tx.execute(_AGE, {**name, "rolled_up": rolled_up})).scalar()
        return None if age is None else float(age)

    async def behind(self, tx: AsyncConnection) -> tuple[int, float]:
        """How many flushes are not in the history yet, and the age of the oldest of them in seconds."""
        row = (await tx.execute(_POSITIONS, {"name": self._name})).one_or_none()
        if row is None or row.rolled_up_id == row.last_flush_id:
            return 0, 0.0
        age = (await tx.execute(_AGE, {"name": self._name, "rolled_up": row.rolled_up_id})).scalar()
        return row.last_flush_id - row.rolled_up_id, float(age or 0)

    async def skip(self, tx: AsyncConnection) -> None:
        """Leave out the flushes up to the last one. Its caller has locked the source row."""
        await tx.execute(_SKIP, {"name": self._name})

    async def forget(self, tx: AsyncConnection, vod_id: str) -> None:
        """Delete the hours of an id."""
        await tx.execute(_FORGET, {"vod_id": vod_id})
