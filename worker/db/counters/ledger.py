"""The SQL of a flush: totals and ledger, written by one statement for any batch size."""

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
    any_,
    bindparam,
    case,
    column,
    delete,
    func,
    insert,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import array
from sqlalchemy.dialects.postgresql import insert as upsert

from worker.db.tables import view_count_flushes, view_counts
from worker.db.transaction_settings import CHECK_CONSTRAINTS_NOW

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from sqlalchemy import CTE, BindParameter, ColumnElement, FromClause, Select, TableValuedAlias
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


def _array(name: str, element: type[Text | BigInteger]) -> BindParameter[Any]:
    return bindparam(name, type_=ARRAY(element))


def _unnest(name: str, **arrays: ColumnElement[Any]) -> TableValuedAlias:
    """Arrays as rows: one column for each, of bigint unless it is `vod_id`."""
    columns = [column(each, Text if each == "vod_id" else BigInteger) for each in arrays]
    return func.unnest(*arrays.values()).table_valued(*columns, name=name).render_derived()


def _recording(count_source: CountSource) -> Select[list[int], list[int]]:
    """One statement for the whole flush: totals and ledger. It returns the changes and the totals, by position.

    It takes and gives arrays instead of rows: both sides need a fraction of the time. `views` changes by the difference
    between the result with this flush and the result without it, so the old row is not read first.
    """
    views = _VIEWS[count_source]
    ids = _array("ids", Text)
    taken = {"counted": _array("counted", BigInteger), "announced": _array("announced", BigInteger)}
    batch = _unnest("batch", vod_id=ids, **taken)
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
    # The rows come in the order of the batch. To join them by id would take longer than all else around the upsert.
    after = select(*(func.array_agg(totals.c[name]).label(name) for name in columns)).cte("after")
    pair = _unnest(
        "pair",
        counted=select(after.c.counted).scalar_subquery(),
        announced=select(after.c.announced).scalar_subquery(),
        more_counted=taken["counted"],
        more_announced=taken["announced"],
    ).c
    now, before = (
        (pair.counted, pair.announced),
        (pair.counted - pair.more_counted, pair.announced - pair.more_announced),
    )
    change = views(*now) - views(*before)
    summary = select(func.array_agg(change).label("changes"), func.sum(change).label("views")).cte("summary")
    # NULL, which the ledger refuses, where a trigger changed or left out a row.
    checked = case((after.c.vod_id == ids, summary.c.changes)).label("changes")
    changes = (
        select(checked, summary.c.views, after.c.views.label("totals")).join_from(after, summary, true()).cte("changes")
    )
    return select(changes.c.changes, changes.c.totals).add_cte(_ledger_row(changes))


def _ledger_row(changes: FromClause) -> CTE:
    """`changes` has one row: the sum of the changes as `views`, and the changes in the order of the ids."""
    given = ("source", "flush_id", "nonce", "prev_nonce", "worker_id")
    arrays = {"vod_ids": _array("ids", Text), "counted": _array("counted", BigInteger)}
    arrays["announced"] = _array("announced", BigInteger)
    row = select(
        *(bindparam(name, type_=view_count_flushes.c[name].type) for name in given),
        *arrays.values(),
        func.cardinality(arrays["vod_ids"]),
        changes.c.views,
        changes.c.changes,
    )
    return insert(view_count_flushes).from_select([*given, *arrays, "keys", "views", "changes"], row).cte("ledger")


_flush = view_count_flushes.c
_READ = select(_flush.nonce, _flush.prev_nonce, _flush.vod_ids, _flush.counted).where(
    _flush.source == bindparam("name"), _flush.flush_id == bindparam("flush_id")
)

_COUNT = select(func.count()).where(
    _flush.source == bindparam("name"), _flush.flush_id > bindparam("after"), _flush.flush_id <= bindparam("upto")
)

_LAST_AGE = (
    select(func.extract("epoch", func.now() - _flush.flushed_at))
    .where(_flush.source == bindparam("name"))
    .order_by(_flush.flush_id.desc())
    .limit(1)
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
    .where(_flush.source == bindparam("name"), _flush.flush_id <= bindparam("done"))
    .where(_flush.flushed_at < func.now() - bindparam("age", type_=Interval))
)
_OLDEST = select(func.min(_flush.flush_id)).where(_flush.source == bindparam("name"))
_PRUNE = delete(view_count_flushes).where(_flush.source == bindparam("name"), _flush.flush_id <= bindparam("upto"))


def _forgetting() -> Select[int]:
    """Delete the id's total and record a compensating flush, so that the id's changes in the ledger add up to zero."""
    gone = delete(view_counts).where(view_counts.c.vod_id == any_(_array("ids", Text))).returning(view_counts)
    deleted = gone.cte("gone")
    stored = func.coalesce(select(deleted.c.views).scalar_subquery(), 0)
    change = (func.coalesce(select(deleted.c.imported).scalar_subquery(), 0) - stored).label("change")
    changes = select(change.label("views"), array([change]).label("changes")).subquery("changes")
    return select(stored).add_cte(_ledger_row(changes))


_FORGET = _forgetting()


class Ledger:
    """The flushes of one source (`VIEW_SOURCE_NAME`). Every method runs in the caller's transaction."""

    def __init__(self, source: str, worker_id: str, count_source: CountSource = "both") -> None:
        self._name = source
        self._worker_id = worker_id
        self._record = _recording(count_source)

    async def record(self, tx: AsyncConnection, flush: Flush) -> list[Change]:
        """Write the flush: totals and ledger. Returns a change for each id with new `views`."""
        ids = flush.ids
        changes, totals = (await tx.execute(self._record, self._parameters(flush, ids))).one()
        return [Change(*each) for each in zip(ids, changes, totals, strict=True) if each[1] > 0]

    async def rehearse(self, tx: AsyncConnection, flush: Flush) -> None:
        """Write the flush and undo that: it fails where `record`, or the commit after it, would fail."""
        async with tx.begin_nested() as savepoint:
            await self.record(tx, flush)
            await tx.execute(CHECK_CONSTRAINTS_NOW)
            await savepoint.rollback()

    async def known_ids(self, tx: AsyncConnection, other_than: str, at_most: int) -> list[str]:
        """Some ids that have a total and that no other session has locked."""
        return list((await tx.execute(_KNOWN_IDS, {"other_than": other_than, "at_most": at_most})).scalars())

    def _parameters(self, flush: Flush, ids: list[str]) -> dict[str, object]:
        return {
            "source": self._name,
            "worker_id": self._worker_id,
            "flush_id": flush.flush_id,
            "nonce": flush.nonce,
            "prev_nonce": flush.prev_nonce,
            "ids": ids,
            "counted": [flush.counted.get(vod_id, 0) for vod_id in ids],
            "announced": [flush.announced.get(vod_id, 0) for vod_id in ids],
        }

    async def forget(self, tx: AsyncConnection, flush: Flush, vod_id: str) -> int:
        """Delete one id's total, and write a flush that cancels its views in the ledger. Returns the views it had."""
        return int((await tx.execute(_FORGET, self._parameters(flush, [vod_id]))).scalar_one())

    async def read_flush(self, tx: AsyncConnection, flush_id: int) -> Flush | None:
        """A flush as it was recorded, without `announced`: messages are not settled in Redis.

        None when the ledger no longer has it (retention, manual deletes).
        """
        row = (await tx.execute(_READ, {"name": self._name, "flush_id": flush_id})).one_or_none()
        if row is None:
            return None
        counted = {vod_id: count for vod_id, count in zip(row.vod_ids, row.counted, strict=True) if count}
        return Flush(flush_id, row.nonce, row.prev_nonce, counted)

    async def last_flush_age(self, tx: AsyncConnection) -> float | None:
        """Seconds since the last flush that the ledger has, by the database's clock; None: it has none."""
        age = (await tx.execute(_LAST_AGE, {"name": self._name})).scalar_one_or_none()
        return None if age is None else float(age)

    async def has_all(self, tx: AsyncConnection, after: int, upto: int) -> bool:
        """Whether no flush above `after`, up to `upto`, was deleted."""
        found: int = (await tx.execute(_COUNT, {"name": self._name, "after": after, "upto": upto})).scalar_one()
        return found == upto - after

    async def prune(self, tx: AsyncConnection, done_id: int, age: timedelta, at_most: int) -> int:
        """Delete the oldest flushes up to `done_id` that are older than `age`, but no more than `at_most`.

        Oldest first, so the rest has no gaps. Returns the number of deleted flushes.
        """
        name = {"name": self._name}
        last = (await tx.execute(_PRUNABLE, {**name, "done": done_id, "age": age})).scalar()
        if last is None:
            return 0
        oldest = (await tx.execute(_OLDEST, name)).scalar_one()
        upto = min(last, oldest + at_most - 1)
        await tx.execute(_PRUNE, {**name, "upto": upto})
        return int(upto - oldest + 1)
