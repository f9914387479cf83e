"""The SQL of a flush: ledger, totals and hourly history, written by one statement for any batch size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Integer,
    Interval,
    Text,
    bindparam,
    delete,
    func,
    insert,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import insert as upsert

from worker.db.tables import view_count_deltas, view_count_flushes, view_counts, view_counts_hourly
from worker.db.transaction_settings import CHECK_CONSTRAINTS_NOW

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from sqlalchemy import CTE, ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from worker.db.counters.count_source import CountSource


@dataclass(frozen=True, slots=True)
class Flush:
    """What one flush takes from counters (`counted`) and from messages (`announced`): id → views, above zero."""

    flush_id: int
    nonce: UUID
    prev_nonce: UUID
    counted: Mapping[str, int]
    announced: Mapping[str, int] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        """All ids of the flush, sorted, so that every writer locks rows in the same order."""
        return sorted(self.counted.keys() | self.announced.keys())


@dataclass(frozen=True, slots=True)
class Change:
    """A flush's change to one id: `views` (above zero) were added, `total` is the new total."""

    vod_id: str
    views: int
    total: int


# (counted, announced) → views, as `count_source.VIEWS` but in SQL.
_VIEWS: dict[CountSource, Callable[[Any, Any], ColumnElement[int]]] = {
    "both": func.greatest,
    "counters": lambda counted, _: counted,
    "messages": lambda _, announced: announced,
    "sum": lambda counted, announced: counted + announced,
}
_TAKEN = ("vod_id", "counted", "announced")


def _recording(count_source: CountSource) -> Select[str, int, int]:
    """One statement for the whole flush: totals, ledger, hourly history, header. It returns the changes.

    It takes arrays instead of rows, so that the number of parameters does not grow with the batch. `views` changes by
    the difference between the result with this flush and the result without it, so the old row is not read first.
    """
    views = _VIEWS[count_source]
    batch = select(
        func.unnest(bindparam("ids", type_=ARRAY(Text))).label("vod_id"),
        func.unnest(bindparam("counted", type_=ARRAY(BigInteger))).label("counted"),
        func.unnest(bindparam("announced", type_=ARRAY(BigInteger))).label("announced"),
    ).cte("batch")
    old, columns = view_counts.c, ("vod_id", "views", "counted", "announced")
    insertion = upsert(view_counts).from_select(
        columns,
        select(batch.c.vod_id, views(batch.c.counted, batch.c.announced), batch.c.counted, batch.c.announced),
    )
    counted, announced = old.counted + insertion.excluded.counted, old.announced + insertion.excluded.announced
    totals = (
        insertion.on_conflict_do_update(
            index_elements=[old.vod_id],
            set_={
                "views": old.views + views(counted, announced) - views(old.counted, old.announced),
                "counted": counted,
                "announced": announced,
                "updated_at": func.now(),
            },
        )
        .returning(*(old[name] for name in columns))
        .cte("totals")
    )
    before = views(totals.c.counted - batch.c.counted, totals.c.announced - batch.c.announced)
    change = (
        select(
            batch,
            (views(totals.c.counted, totals.c.announced) - before).label("views"),
            totals.c.views.label("total"),
        )
        .join_from(batch, totals, batch.c.vod_id == totals.c.vod_id)
        .cte("change")
    )
    return (
        select(change.c.vod_id, change.c.views, change.c.total)
        .where(change.c.views > 0)
        .add_cte(_ledger_rows(change), _hourly_rows(change), _header(change))
    )


def _ledger_rows(change: CTE) -> CTE:
    source, flush_id = bindparam("source", type_=Text), bindparam("flush_id", type_=BigInteger)
    rows = select(source, flush_id, *(change.c[name] for name in _TAKEN), change.c.views)
    return insert(view_count_deltas).from_select(["source", "flush_id", *_TAKEN, "views"], rows).cte("ledger")


def _hourly_rows(change: CTE) -> CTE:
    rows = select(func.date_trunc("hour", func.now(), "UTC"), change.c.vod_id, change.c.views).where(change.c.views > 0)
    hourly = upsert(view_counts_hourly).from_select(["bucket", "vod_id", "views"], rows)
    return hourly.on_conflict_do_update(
        index_elements=[view_counts_hourly.c.vod_id, view_counts_hourly.c.bucket],
        set_={"views": view_counts_hourly.c.views + hourly.excluded.views},
    ).cte("hourly")


def _header(change: CTE) -> CTE:
    given = ("source", "flush_id", "nonce", "prev_nonce", "worker_id")
    row = select(
        *(bindparam(name, type_=view_count_flushes.c[name].type) for name in given),
        func.count(),
        func.coalesce(func.sum(change.c.views), 0),
    ).select_from(change)
    return insert(view_count_flushes).from_select([*given, "keys", "views"], row).cte("header")


_flush = view_count_flushes.c
_delta = view_count_deltas.c
_READ_HEADER = select(_flush.nonce, _flush.prev_nonce, _flush.flushed_at, _flush["keys"]).where(
    _flush.source == bindparam("name"), _flush.flush_id == bindparam("flush_id")
)
_READ_DELTAS = (
    select(_delta.vod_id, _delta.counted)
    .where(
        _delta.source == bindparam("name"),
        _delta.flush_id == bindparam("flush_id"),
        # The same time as the header's. With this condition a hypertable reads one chunk only.
        _delta.flushed_at == bindparam("flushed_at"),
    )
    .order_by(_delta.vod_id)
)


_KNOWN_IDS = (
    select(view_counts.c.vod_id)
    .where(view_counts.c.vod_id != bindparam("other_than", type_=Text))
    .limit(bindparam("at_most", type_=Integer))
    .with_for_update(skip_locked=True)
)

# Flushes that no marker can need any more: settled, and older than any snapshot of Redis that may be restored.
_PRUNABLE = (
    select(func.max(_flush.flush_id))
    .where(_flush.source == bindparam("name"), _flush.flush_id < bindparam("settled"))
    .where(_flush.flushed_at < func.now() - bindparam("age", type_=Interval))
)
_OLDEST = select(func.min(_flush.flush_id)).where(_flush.source == bindparam("name"))
_PRUNE_DELTAS = delete(view_count_deltas).where(
    _delta.source == bindparam("name"), _delta.flush_id <= bindparam("upto")
)
_PRUNE_FLUSHES = delete(view_count_flushes).where(
    _flush.source == bindparam("name"), _flush.flush_id <= bindparam("upto")
)


def _forgetting() -> Select[int]:
    """Delete the id's rows and add a compensating row to the ledger, so that the id's rows there add up to zero."""
    vod_id = bindparam("vod_id", type_=Text)
    gone = delete(view_counts).where(view_counts.c.vod_id == vod_id).returning(view_counts).cte("gone")
    stored = func.coalesce(select(gone.c.views).scalar_subquery(), 0)
    change = select(
        vod_id.label("vod_id"),
        bindparam("pending", type_=BigInteger).label("counted"),
        literal_column("0", BigInteger).label("announced"),
        (func.coalesce(select(gone.c.imported).scalar_subquery(), 0) - stored).label("views"),
    ).cte("change")
    hours = delete(view_counts_hourly).where(view_counts_hourly.c.vod_id == vod_id).cte("hours")
    return select(stored).add_cte(hours, _ledger_rows(change), _header(change))


_FORGET = _forgetting()


class Ledger:
    """The flushes of one source (`VIEW_SOURCE_NAME`). Every method runs in the caller's transaction."""

    def __init__(self, source: str, worker_id: str, count_source: CountSource = "both") -> None:
        self._name = source
        self._worker_id = worker_id
        self._record = _recording(count_source)

    async def record(self, tx: AsyncConnection, flush: Flush) -> list[Change]:
        """Write the flush: header, ledger, totals, hourly history. Returns a change for each id with new `views`."""
        ids = flush.ids
        batch = {
            "ids": ids,
            "counted": [flush.counted.get(vod_id, 0) for vod_id in ids],
            "announced": [flush.announced.get(vod_id, 0) for vod_id in ids],
        }
        return [Change(*row) for row in await tx.execute(self._record, self._header(flush) | batch)]

    async def rehearse(self, tx: AsyncConnection, flush: Flush) -> None:
        """Write the flush and undo that: it fails where `record`, or the commit after it, would fail."""
        async with tx.begin_nested() as savepoint:
            await self.record(tx, flush)
            await tx.execute(CHECK_CONSTRAINTS_NOW)
            await savepoint.rollback()

    async def known_ids(self, tx: AsyncConnection, other_than: str, at_most: int) -> list[str]:
        """Some ids that have a total and that no other session has locked."""
        return list((await tx.execute(_KNOWN_IDS, {"other_than": other_than, "at_most": at_most})).scalars())

    def _header(self, flush: Flush) -> dict[str, object]:
        return {
            "source": self._name,
            "worker_id": self._worker_id,
            "flush_id": flush.flush_id,
            "nonce": flush.nonce,
            "prev_nonce": flush.prev_nonce,
        }

    async def forget(self, tx: AsyncConnection, flush: Flush, vod_id: str) -> int:
        """Delete one id's rows, and write a flush that cancels its views in the ledger. Returns the views it had."""
        parameters = self._header(flush) | {"vod_id": vod_id, "pending": flush.counted.get(vod_id, 0)}
        return int((await tx.execute(_FORGET, parameters)).scalar_one())

    async def read_flush(self, tx: AsyncConnection, flush_id: int) -> Flush | None:
        """A flush as it was recorded, without `announced`: messages are not settled in Redis.

        None when the ledger no longer has all of it (retention, manual deletes).
        """
        key = {"name": self._name, "flush_id": flush_id}
        header = (await tx.execute(_READ_HEADER, key)).one_or_none()
        if header is None:
            return None
        nonce, prev_nonce, flushed_at, keys = header
        rows = (await tx.execute(_READ_DELTAS, {**key, "flushed_at": flushed_at})).all()
        if len(rows) != keys:
            return None
        return Flush(flush_id, nonce, prev_nonce, {row.vod_id: row.counted for row in rows if row.counted})

    async def prune(self, tx: AsyncConnection, settled_id: int, age: timedelta, at_most: int) -> int:
        """Delete the oldest flushes that are below `settled_id` and older than `age`, but no more than `at_most`.

        A flush's header and rows are deleted together, oldest first, so the rest has no gaps. Returns the number of
        deleted flushes.
        """
        name = {"name": self._name}
        last = (await tx.execute(_PRUNABLE, {**name, "settled": settled_id, "age": age})).scalar()
        if last is None:
            return 0
        oldest = (await tx.execute(_OLDEST, name)).scalar_one()
        upto = min(last, oldest + at_most - 1)
        await tx.execute(_PRUNE_DELTAS, {**name, "upto": upto})
        await tx.execute(_PRUNE_FLUSHES, {**name, "upto": upto})
        return int(upto - oldest + 1)
