"""The SQL of a flush: the ledger, the totals, the hourly history. One statement a table, whatever the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import ARRAY, BigInteger, Interval, Text, bindparam, delete, func, insert, literal_column, select
from sqlalchemy.dialects.postgresql import insert as upsert

from worker.db.tables import view_count_deltas, view_count_flushes, view_counts, view_counts_hourly

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import timedelta

    from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True, slots=True)
class Flush:
    """A flush as the ledger has it: what it took from each counter (`deltas`: id → views), in the order of the ids."""

    flush_id: int
    nonce: UUID
    prev_nonce: UUID
    deltas: Mapping[str, int]


_INSERT_HEADER = insert(view_count_flushes).values(
    {
        column: bindparam(column)
        for column in ("source", "flush_id", "nonce", "prev_nonce", "keys", "views", "worker_id")
    }
)

# unnest of two arrays in one select walks them in step: five parameters, however many rows.
_id = func.unnest(bindparam("ids", type_=ARRAY(Text)))
_count = func.unnest(bindparam("counts", type_=ARRAY(BigInteger)))

_batch = select(_id.label("vod_id"), _count.label("counted")).subquery("batch")

_INSERT_DELTAS = insert(view_count_deltas).from_select(
    ["source", "flush_id", "vod_id", "counted", "announced", "views"],
    select(
        bindparam("source", type_=Text),
        bindparam("flush_id", type_=BigInteger),
        _batch.c.vod_id,
        _batch.c.counted,
        literal_column("0"),
        _batch.c.counted,
    ),
)

_totals = upsert(view_counts).from_select(
    ["vod_id", "views", "counted"], select(_batch.c.vod_id, _batch.c.counted, _batch.c.counted)
)
_counted = view_counts.c.counted + _totals.excluded.counted
_UPSERT_TOTALS = _totals.on_conflict_do_update(
    index_elements=[view_counts.c.vod_id],
    set_={
        "views": func.greatest(_counted, view_counts.c.announced),
        "counted": _counted,
        "updated_at": func.now(),
    },
)

_hourly = upsert(view_counts_hourly).from_select(
    ["bucket", "vod_id", "views"],
    select(func.date_trunc("hour", func.now(), "UTC"), _batch.c.vod_id, _batch.c.counted),
)
_UPSERT_HOURLY = _hourly.on_conflict_do_update(
    index_elements=[view_counts_hourly.c.vod_id, view_counts_hourly.c.bucket],
    set_={"views": view_counts_hourly.c.views + _hourly.excluded.views},
)

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
        # The same instant as the header's; with it a hypertable looks into one chunk only.
        _delta.flushed_at == bindparam("flushed_at"),
    )
    .order_by(_delta.vod_id)
)


# Flushes that no marker can need any more: settled, and older than what snapshots of Redis are kept for.
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


class Ledger:
    """What was flushed from one source (`VIEW_SOURCE_NAME`). Every method runs in the caller's transaction."""

    def __init__(self, source: str, worker_id: str) -> None:
        self._name = source
        self._worker_id = worker_id

    async def record(self, tx: AsyncConnection, flush: Flush) -> None:
        """Write the flush: header, deltas, totals, hourly history. Its deltas are sorted and above zero."""
        batch = {"ids": list(flush.deltas), "counts": list(flush.deltas.values())}
        header = {
            "source": self._name,
            "flush_id": flush.flush_id,
            "nonce": flush.nonce,
            "prev_nonce": flush.prev_nonce,
            "keys": len(flush.deltas),
            "views": sum(flush.deltas.values()),
            "worker_id": self._worker_id,
        }
        await tx.execute(_INSERT_HEADER, header)
        await tx.execute(_INSERT_DELTAS, {"source": self._name, "flush_id": flush.flush_id, **batch})
        await tx.execute(_UPSERT_TOTALS, batch)
        await tx.execute(_UPSERT_HOURLY, batch)

    async def read_flush(self, tx: AsyncConnection, flush_id: int) -> Flush | None:
        """A flush as it was recorded. None when the ledger no longer has all of it (retention, manual deletes)."""
        key = {"name": self._name, "flush_id": flush_id}
        header = (await tx.execute(_READ_HEADER, key)).one_or_none()
        if header is None:
            return None
        nonce, prev_nonce, flushed_at, keys = header
        rows = (await tx.execute(_READ_DELTAS, {**key, "flushed_at": flushed_at})).all()
        if len(rows) != keys:
            return None
        return Flush(flush_id, nonce, prev_nonce, {row.vod_id: row.counted for row in rows})

    async def prune(self, tx: AsyncConnection, settled_id: int, age: timedelta, at_most: int) -> int:
        """Delete the oldest flushes, at most so many, that are below `settled_id` and older than `age`.

        Header and rows of a flush go together, oldest first: what is left is always gapless. Returns how many went.
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
