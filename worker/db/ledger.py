"""The SQL of the view counters: the source row, the ledger, the totals. One statement a table, whatever the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import ARRAY, BigInteger, Text, bindparam, func, insert, literal_column, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from worker.db.tables import (
    view_count_deltas,
    view_count_flushes,
    view_count_sources,
    view_counts,
    view_counts_hourly,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

# Local to the transaction that holds the row lock. A worker that freezes in it loses the lock and the transaction
# together; a commit that later steps rely on is on disk when it is confirmed, whatever the database's default.
LOCAL_SETTINGS = {
    "synchronous_commit": "on",
    "lock_timeout": "5s",
    "statement_timeout": "30s",
    "idle_in_transaction_session_timeout": "15s",
}


@dataclass(frozen=True, slots=True)
class Source:
    """The database's side of the agreement with one Redis data set. `last_nonce` is set as soon as `lineage` is."""

    lineage: UUID | None
    last_flush_id: int
    last_nonce: UUID | None
    settled_id: int
    replid: str | None
    refused: str | None


@dataclass(frozen=True, slots=True)
class Flush:
    """A flush as the ledger has it: what it took from each counter (`deltas`: id → views), in the order of the ids."""

    flush_id: int
    nonce: UUID
    prev_nonce: UUID
    deltas: Mapping[str, int]


_source = view_count_sources.c
_SOURCE_COLUMNS = (
    _source.lineage,
    _source.last_flush_id,
    _source.last_nonce,
    _source.settled_id,
    _source.replid,
    _source.refused,
)

_ENSURE = upsert(view_count_sources).values(source=bindparam("name")).on_conflict_do_nothing()

_LOCK = (
    select(
        *_SOURCE_COLUMNS,
        *(func.set_config(name, value, True) for name, value in LOCAL_SETTINGS.items()),
    )
    .where(_source.source == bindparam("name"))
    .with_for_update(skip_locked=True)
)

_FOUND_LINEAGE = (
    update(view_count_sources)
    .where(_source.source == bindparam("name"))
    .values(lineage=bindparam("new_lineage"), last_nonce=bindparam("new_nonce"))
)

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

_ADVANCE = (
    update(view_count_sources)
    .where(_source.source == bindparam("name"))
    .values(
        last_flush_id=bindparam("flush_id"),
        last_nonce=bindparam("nonce"),
        settled_id=bindparam("settled"),
        replid=bindparam("new_replid"),
    )
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


class Ledger:
    """The rows of one source (`VIEW_SOURCE_NAME`). Every method runs in the caller's transaction."""

    def __init__(self, source: str, worker_id: str) -> None:
        self._name = source
        self._worker_id = worker_id

    async def ensure_source(self, tx: AsyncConnection) -> None:
        """Insert the source row unless it is there. Does not wait for whoever holds its lock."""
        await tx.execute(_ENSURE, {"name": self._name})

    async def lock_source(self, tx: AsyncConnection) -> Source | None:
        """Lock the source row until the end of the transaction. None: another worker has it (or it is missing)."""
        row = (await tx.execute(_LOCK, {"name": self._name})).one_or_none()
        return None if row is None else Source(*row[: len(_SOURCE_COLUMNS)])

    async def found_lineage(self, tx: AsyncConnection, lineage: UUID, nonce: UUID) -> None:
        """Record that a Redis data set and this database belong together from now on."""
        await tx.execute(_FOUND_LINEAGE, {"name": self._name, "new_lineage": lineage, "new_nonce": nonce})

    async def record(self, tx: AsyncConnection, source: Source, flush: Flush, replid: str | None) -> None:
        """Write the flush: header, deltas, totals, hourly history, source row. Deltas are sorted and above zero."""
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
        await tx.execute(
            _ADVANCE,
            {
                "name": self._name,
                "flush_id": flush.flush_id,
                "nonce": flush.nonce,
                # The marker, read under this lock, named the flush before: so that one is known to be settled.
                "settled": source.last_flush_id,
                "new_replid": replid,
            },
        )

    async def read_flush(self, tx: AsyncConnection, flush_id: int) -> Flush | None:
        """A flush as it was recorded. None when the ledger no longer has all of it (retention, manual deletes)."""
        key = {"name": self._name, "flush_id": flush_id}
        header = (await tx.execute(_READ_HEADER, key)).one_or_none()
        if header is None:
            return None
        nonce, prev_nonce, flushed_at, keys = header
        rows = (await tx.execute(_READ_DELTAS, {**key, "flushed_at": flushed_at})).all()
        return (
            Flush(flush_id, nonce, prev_nonce, {row.vod_id: row.counted for row in rows}) if len(rows) == keys else None
        )
