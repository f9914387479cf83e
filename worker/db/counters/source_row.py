"""The source row: Postgres's side of the agreement with one Redis data set, with its lock and its lease."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Text,
    Uuid,
    bindparam,
    case,
    cast,
    delete,
    exists,
    false,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert

from worker.db.lease import LeaseState
from worker.db.lease_sql import NOW, UNTIL, is_free, is_mine
from worker.db.tables import view_count_lineages, view_count_sources
from worker.db.transaction_settings import APPLY_SETTINGS, SETTINGS

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True, slots=True)
class SourceState:
    """A source row, read under its lock. `last_nonce` is set as soon as `lineage` is.

    `settled_id`: the last flush that is known to be settled. `data_set_id`: the Redis data set at that time (its
    `master_replid` and the key prefix). `refused`: a marker that did not belong to this database. `announced_nonce`:
    the nonce of the last flush that wrote sums of messages. `agreed_minutes_ago`: whole minutes since a marker last
    named the last flush, by the database's clock; None if none ever did. `rolled_up_id`: the last flush that is in the
    history.
    """

    lineage: UUID | None
    last_flush_id: int
    last_nonce: UUID | None
    settled_id: int
    data_set_id: str | None
    refused: str | None
    announced_nonce: UUID | None
    lease_holder: str | None
    lease_epoch: int
    agreed_minutes_ago: int | None
    rolled_up_id: int = 0


# A row that was just inserted.
NEW_ROW = SourceState(None, 0, None, 0, None, None, None, None, 0, None)


@dataclass(frozen=True, slots=True)
class PastLineage:
    """A lineage before the current one, with its last flush.

    `successor`: the marker that replaces that of the last flush; None if the data set of this lineage did not return.
    """

    last_flush_id: int
    last_nonce: UUID
    successor: str | None


_row = view_count_sources.c
_COLUMNS = (
    _row.lineage,
    _row.last_flush_id,
    _row.last_nonce,
    _row.settled_id,
    _row.data_set_id,
    _row.refused,
    _row.announced_nonce,
    _row.lease_holder,
    _row.lease_epoch,
    cast(func.floor(func.extract("epoch", NOW - _row.agreed_at) / 60), BigInteger),
    _row.rolled_up_id,
)
_this = _row.source == bindparam("name")

# Look for the row first: ON CONFLICT alone waits for a session that is updating it.
_ENSURE = (
    upsert(view_count_sources)
    .from_select(
        ["source"],
        select(bindparam("name", type_=Text)).where(~exists().where(_row.source == bindparam("name"))),
    )
    .on_conflict_do_nothing()
)

_READ = select(*_COLUMNS).where(_this)
# The lock and its limits in one round trip.
_LOCK = select(*_COLUMNS, *SETTINGS).where(_this).with_for_update(skip_locked=True)
_LOCK_PATIENTLY = select(*_COLUMNS, *SETTINGS).where(_this).with_for_update()
_LOCK_ALL = text(f"LOCK TABLE {view_count_sources.name} IN EXCLUSIVE MODE")

_ADVANCE = (
    update(view_count_sources)
    .where(_this)
    .values(
        last_flush_id=bindparam("flush_id"),
        last_nonce=bindparam("nonce"),
        settled_id=bindparam("settled"),
        data_set_id=bindparam("new_data_set_id"),
        announced_nonce=func.coalesce(bindparam("new_announced_nonce", type_=Uuid), _row.announced_nonce),
        refused=None,
        lease_until=UNTIL,
        agreed_at=NOW,
    )
)
_CONFIRM = (
    update(view_count_sources)
    .where(_this)
    .values(settled_id=_row.last_flush_id, data_set_id=bindparam("new_data_set_id"), refused=None, agreed_at=NOW)
)
_REVOKE_LEASE = (
    update(view_count_sources)
    .where(_this)
    .values(lease_holder=None, lease_until=None, lease_epoch=_row.lease_epoch + 1)
)
_REFUSE = update(view_count_sources).where(_this).values(refused=bindparam("marker"))
_START_LINEAGE = (
    update(view_count_sources)
    .where(_this)
    .values(
        lineage=bindparam("new_lineage"),
        last_nonce=bindparam("new_nonce"),
        settled_id=bindparam("settled"),
        data_set_id=bindparam("new_data_set_id"),
        refused=None,
    )
)

_past = view_count_lineages.c
_of_this = _past.source == bindparam("name")
_that = _past.lineage == bindparam("that")
_KEEP_LINEAGE = insert(view_count_lineages).from_select(
    ["source", "lineage", "last_flush_id", "last_nonce", "data_set_id"],
    select(_row.source, _row.lineage, _row.last_flush_id, _row.last_nonce, _row.data_set_id).where(
        _this, _row.lineage.is_not(None)
    ),
)
_READ_LINEAGE = select(_past.last_flush_id, _past.last_nonce, _past.successor).where(_of_this, _that)
_CONTINUE_LINEAGE = update(view_count_lineages).where(_of_this, _that).values(successor=bindparam("marker"))
_FORGET_LINEAGES = delete(view_count_lineages).where(_of_this)
_IS_PAST = select(exists().where(_of_this, _past.data_set_id == bindparam("data_set_id")))

_mine, _free = is_mine(view_count_sources), is_free(view_count_sources)
_TAKE_LEASE = (
    update(view_count_sources)
    # A locked row is in use by a flush: do not wait for it here.
    .where(_row.source == select(_row.source).where(_this, _free).with_for_update(skip_locked=True).scalar_subquery())
    .values(
        lease_holder=bindparam("me"),
        lease_epoch=case((_mine, _row.lease_epoch), else_=_row.lease_epoch + 1),
        lease_until=UNTIL,
    )
)
_READ_LEASE = select(_row.lease_holder, _row.lease_epoch, func.coalesce(_free, false())).where(_this)
_RELEASE_LEASE = update(view_count_sources).where(_this, _mine).values(lease_holder=None, lease_until=None)


async def lock_all_sources(tx: AsyncConnection) -> None:
    """Keep every worker from flushing until the end of the transaction; wait for flushes that are running."""
    await tx.execute(APPLY_SETTINGS)
    # The table and not its rows: a worker that starts for the first time inserts a row.
    await tx.execute(_LOCK_ALL)


class SourceRow:
    """The row of one source (`VIEW_SOURCE_NAME`). Every method runs in the caller's transaction."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def ensure(self, tx: AsyncConnection) -> None:
        """Insert the row unless it exists. Does not wait for its lock."""
        await tx.execute(APPLY_SETTINGS)
        await tx.execute(_ENSURE, {"name": self.name})

    async def read(self, tx: AsyncConnection) -> SourceState | None:
        """The row without its lock: to show, not to act upon."""
        row = (await tx.execute(_READ, {"name": self.name})).one_or_none()
        return None if row is None else SourceState(*row)

    async def lock(self, tx: AsyncConnection, *, wait: bool = False) -> SourceState | None:
        """Lock the row until the end of the transaction. None: another worker has the lock, or the row is missing.

        With `wait`, wait for the other worker, at most the lock timeout.
        """
        row = (await tx.execute(_LOCK_PATIENTLY if wait else _LOCK, {"name": self.name})).one_or_none()
        return None if row is None else SourceState(*row[: len(_COLUMNS)])

    async def allow_idling(self, tx: AsyncConnection, duration: timedelta) -> None:
        """Keep the lock although no statement is sent for so long."""
        idle = f"{int(duration.total_seconds())}s"
        await tx.execute(select(func.set_config("idle_in_transaction_session_timeout", idle, True)))

    async def advance(
        self,
        tx: AsyncConnection,
        *,
        flush_id: int,
        nonce: UUID,
        settled: int,
        announced_nonce: UUID | None,
        data_set_id: str | None,
    ) -> None:
        """Record that a flush was written; `settled` is the one before it. Renews the lease.

        `announced_nonce` is the flush's nonce if it wrote sums of messages; None leaves the column as it is.
        """
        values = {"flush_id": flush_id, "nonce": nonce, "settled": settled, "new_data_set_id": data_set_id}
        values["new_announced_nonce"] = announced_nonce
        await tx.execute(_ADVANCE, {"name": self.name, **values})

    async def revoke_lease(self, tx: AsyncConnection) -> None:
        """The holder has to take the lease again, under another epoch."""
        await tx.execute(_REVOKE_LEASE, {"name": self.name})

    async def confirm(self, tx: AsyncConnection, data_set_id: str | None) -> None:
        """Record that the last flush is settled in this data set: the marker, read under the lock, names it."""
        await tx.execute(_CONFIRM, {"name": self.name, "new_data_set_id": data_set_id})

    async def refuse(self, tx: AsyncConnection, marker: str) -> None:
        """Remember a marker that does not belong to this database: from now on only `adopt` may create one."""
        await tx.execute(_REFUSE, {"name": self.name, "marker": marker})

    async def start_lineage(
        self, tx: AsyncConnection, lineage: UUID, nonce: UUID, settled: int, data_set_id: str | None
    ) -> None:
        """From now on this lineage names the Redis data set that belongs to this database."""
        values = {"new_lineage": lineage, "new_nonce": nonce, "settled": settled, "new_data_set_id": data_set_id}
        await tx.execute(_START_LINEAGE, {"name": self.name, **values})

    async def keep_lineage(self, tx: AsyncConnection) -> None:
        """Remember the row's lineage, if it has one, before another starts: its data set may return."""
        await tx.execute(_KEEP_LINEAGE, {"name": self.name})

    async def past_lineage(self, tx: AsyncConnection, lineage: UUID) -> PastLineage | None:
        row = (await tx.execute(_READ_LINEAGE, {"name": self.name, "that": lineage})).one_or_none()
        return None if row is None else PastLineage(*row)

    async def continue_lineage(self, tx: AsyncConnection, lineage: UUID, successor: str) -> None:
        """From now on a marker of the past lineage's last flush is replaced by `successor`."""
        await tx.execute(_CONTINUE_LINEAGE, {"name": self.name, "that": lineage, "marker": successor})

    async def forget_lineages(self, tx: AsyncConnection) -> None:
        """From now on a marker of any past lineage is a hold."""
        await tx.execute(_FORGET_LINEAGES, {"name": self.name})

    async def is_past(self, tx: AsyncConnection, data_set_id: str) -> bool:
        """Whether this is the data set of a past lineage."""
        return bool((await tx.execute(_IS_PAST, {"name": self.name, "data_set_id": data_set_id})).scalar_one())

    async def take_lease(self, tx: AsyncConnection, worker_id: str, dead: str | None = None) -> LeaseState[int] | None:
        """Take the lease if it is free, expired, our own, or held by `dead`. Returns who has it now; None: no row.

        A takeover raises the epoch, a renewal does not. A locked row stays as it is.
        """
        # A worker that freezes right after this must not keep the row locked.
        await tx.execute(APPLY_SETTINGS)
        await tx.execute(_TAKE_LEASE, {"name": self.name, "me": worker_id, "dead": dead})
        return await self.read_lease(tx, worker_id)

    async def read_lease(self, tx: AsyncConnection, worker_id: str) -> LeaseState[int] | None:
        """Who has the lease; None: no row."""
        row = (await tx.execute(_READ_LEASE, {"name": self.name, "me": worker_id, "dead": None})).one_or_none()
        return None if row is None else LeaseState(*row)

    async def release_lease(self, tx: AsyncConnection, worker_id: str) -> None:
        await tx.execute(APPLY_SETTINGS)
        await tx.execute(_RELEASE_LEASE, {"name": self.name, "me": worker_id})
