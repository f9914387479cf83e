"""Adds views to the application's own table, in the same transaction as to the worker's totals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cachetools import TTLCache
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Integer,
    Text,
    bindparam,
    cast,
    column,
    exists,
    false,
    func,
    quoted_name,
    select,
    table,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import UserDefinedType

from worker.contract.ids import MAX_ID_BYTES
from worker.db.errors import (
    COLLISIONS,
    LOCK_NOT_AVAILABLE,
    QUERY_CANCELED,
    describe,
    is_refused_by_row,
    remedy_for,
    sqlstate,
)
from worker.db.tables import view_counts
from worker.db.target.fit import fit
from worker.db.transaction_settings import CHECK_CONSTRAINTS_NOW
from worker.errors import DatabaseUnavailable
from worker.observability.logs import get_logger
from worker.runtime.bisect import bisect

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Select, Update
    from sqlalchemy.ext.asyncio import AsyncConnection

    from worker.db.counters.ledger import Change
    from worker.db.target.fit import Key
    from worker.db.target.names import TargetNames
    from worker.runtime.clock import Clock

log = get_logger(__name__)

# Why views of an id are not added: no row has it as its key; it cannot be a key; its row refuses the new total.
REASONS = UNKNOWN, NOT_A_KEY, REFUSED = "unknown", "not_a_key", "refused"
# Finding a row that refuses takes a dozen statements. Once found, the row is skipped for this long.
REST_S = 600.0
RESTING_IDS = 50_000
TABLE_LOCKED = "Wait for the CREATE INDEX, ALTER TABLE or VACUUM FULL that locks it. Views stay in Redis meanwhile."
TABLE_SLOW = "Look at the triggers of that table: they run once for each row."
# A trigger may wait for a lock of the application, which may wait for the rows that we have locked.
LOCK_LIMIT_S = 0.2
# For all rows of a statement, beyond what a statement without rows takes. Until its end they are locked.
ROWS_LIMIT_S = 5.0
# Deadlocks and serialization failures in a row after which a trigger that raises such an error is the likely cause.
MAX_COLLISIONS = 3


@dataclass(frozen=True, slots=True)
class Page:
    """One imported page: `rows` were read, up to `last_key`, and `views` were imported for `ids` of them."""

    last_key: Any
    rows: int
    ids: int
    views: int


class TargetTable:
    """Every method runs in the caller's transaction. Views that cannot be added are skipped, never an error."""

    def __init__(self, names: TargetNames, clock: Clock) -> None:
        self.names = names
        self._key: Key | None = None
        self._refused: TTLCache[str, None] = TTLCache(RESTING_IDS, REST_S, clock.monotonic)
        self._collisions = 0
        self._clock = clock
        # Seconds that the last statement without rows took, and the error if it timed out.
        self._overhead = 0.0
        self._stalled: DBAPIError | None = None

    async def check(self, tx: AsyncConnection) -> Key:
        """How ids become the table's keys. Raises TargetUnusable when the table is missing or does not fit."""
        self._key = await fit(tx, self.names)
        return self._key

    async def lock_rows(self, tx: AsyncConnection, ids: Sequence[str]) -> set[str]:
        """Lock the rows of these ids, in order, without waiting. Returns the ids whose rows are locked by others.

        Raises TargetUnusable when the table does not fit.
        """
        # Check every time: the application may have altered its table, and with it the key's type.
        key = await self.check(tx)
        keys = {vod_id: value for vod_id in ids if (value := key.of(vod_id)) is not None}
        if not keys:
            return set()
        asked = {"ids": list(keys), "keys": list(keys.values())}
        statements = _Statements(self.names, key)
        try:
            await self._enter(tx, statements)
            return set((await tx.execute(statements.lock_rows(), asked)).scalars())
        except DBAPIError as error:
            if sqlstate(error) != LOCK_NOT_AVAILABLE:
                raise
            # Locked rows are skipped, so the lock is on the table. Smaller batches would each wait as long.
            raise DatabaseUnavailable(f"the table {self.names} is locked", TABLE_LOCKED) from None

    async def _enter(self, tx: AsyncConnection, statements: _Statements) -> None:
        """Wait for a lock on the whole table. Ignore a statement trigger that refuses: `add` handles it row by row."""
        began, self._stalled = self._clock.monotonic(), None
        try:
            async with tx.begin_nested():
                await tx.execute(statements.enter())
        except DBAPIError as error:
            if not is_refused_by_row(error):
                raise
            if sqlstate(error) == QUERY_CANCELED:
                self._stalled = error
        self._overhead = self._clock.monotonic() - began

    async def add(self, tx: AsyncConnection, changes: Iterable[Change]) -> Counter[str]:
        """Add the views of each change to its row. Returns the views that were not added, by reason.

        Raises DatabaseUnavailable for locks, for a timeout of several changes, which fewer may not meet, and for
        deadlocks and serialization failures, which a new transaction may not meet.
        """
        key = self._key or await self.check(tx)
        skipped: Counter[str] = Counter()
        batch = []
        for change in changes:
            value = key.of(change.vod_id)
            if value is None:
                skipped[NOT_A_KEY] += change.views
            elif change.vod_id in self._refused:
                skipped[REFUSED] += change.views
            else:
                batch.append((change.vod_id, value, change.views))
        adding = _Adding(tx, _limits(self._overhead + ROWS_LIMIT_S), _Statements(self.names, key).add(), skipped)
        if self._stalled is not None:
            # No statement is in time, however few rows it has.
            for refused in batch:
                adding.refuse(refused, self._stalled)
        elif batch:

            async def attempt(part: Sequence[tuple[str, Any, int]]) -> None:
                try:
                    await adding.add(part)
                except DBAPIError as error:
                    self._raise_if_concerns_all(error, len(part))
                    raise

            async for _ in bisect(batch, attempt, _is_refused, adding.refuse):
                pass
        self._remember(adding.refusals)
        self._collisions = 0
        return skipped

    def _raise_if_concerns_all(self, error: DBAPIError, rows: int) -> None:
        """Raise what another transaction may heal. Where it does not, a trigger raised it."""
        state = sqlstate(error)
        if state in COLLISIONS and self._collisions < MAX_COLLISIONS:
            self._collisions += 1
            raise DatabaseUnavailable(describe(error), remedy_for(error)) from error
        if state == QUERY_CANCELED and rows > 1:
            cause = f"{rows} rows of the table {self.names} were not updated in time: {describe(error)}"
            raise DatabaseUnavailable(cause, TABLE_SLOW) from error

    def _remember(self, refusals: dict[str, str]) -> None:
        if refusals:
            self._refused.update(dict.fromkeys(refusals))
            table, cause = str(self.names), next(iter(refusals.values()))
            log.warning("rows of the application's table refuse views", table=table, rows=len(refusals), cause=cause)

    async def import_page(self, tx: AsyncConnection, after: Any | None, rows: int) -> Page:
        """Import the totals of the next `rows` rows, in key order, into `view_counts`. Each id is imported only once.

        An id's total is raised to the application's total. If it is already higher, it stays.
        """
        key = self._key or await self.check(tx)
        statement = _Statements(self.names, key).import_page(first=after is None)
        return Page(*(await tx.execute(statement, {"after": after, "at_most": rows})).one())


@dataclass(frozen=True, slots=True)
class _Adding:
    """Adds changes to rows, each batch in a savepoint.

    `skipped` counts the views that were not added, by reason. `refusals` has the ids whose rows refuse the change,
    with Postgres's message.
    """

    tx: AsyncConnection
    limits: Select[str, str]
    statement: Select[str]
    skipped: Counter[str]
    refusals: dict[str, str] = field(default_factory=dict)

    async def add(self, batch: Sequence[tuple[str, Any, int]]) -> None:
        """Add a batch of (id, key, views); all of it or nothing."""
        ids, keys, views = (list(column) for column in zip(*batch, strict=True))
        async with self.tx.begin_nested():
            await self.tx.execute(self.limits)
            found = await self.tx.execute(self.statement, {"ids": ids, "keys": keys, "views": views})
            added = set(found.scalars())
            # A deferred constraint would otherwise fail at the commit and undo our own totals too.
            await self.tx.execute(CHECK_CONSTRAINTS_NOW)
        self.skipped[UNKNOWN] += sum(count for vod_id, _, count in batch if vod_id not in added)

    def refuse(self, change: tuple[str, Any, int], error: Exception) -> None:
        vod_id, _, views = change
        self.skipped[REFUSED] += views
        self.refusals[vod_id] = describe(error)


def _limits(seconds: float) -> Select[str, str]:
    """Limit each of the statements that follow in this transaction to `seconds`, or to the usual limit if less."""
    limit = f"{min(round(seconds * 1000), 30_000)}ms"
    return select(
        func.set_config("lock_timeout", f"{round(LOCK_LIMIT_S * 1000)}ms", True),
        func.set_config("statement_timeout", limit, True),
    )


def _is_refused(error: Exception) -> bool:
    return isinstance(error, DBAPIError) and is_refused_by_row(error)


class _Statements:
    """The statements for a table whose keys are of one type."""

    def __init__(self, names: TargetNames, key: Key) -> None:
        target = table(
            quoted_name(names.table, quote=True),
            *(column(quoted_name(name, quote=True)) for name in (names.key, names.column)),
            schema=None if names.schema is None else quoted_name(names.schema, quote=True),
        )
        ids, keys, views = (
            func.unnest(bindparam(name, type_=ARRAY(kind)))
            for name, kind in (("ids", Text()), ("keys", key.kind), ("views", BigInteger()))
        )
        self._target = target
        self._key, self._total = target.c[names.key], target.c[names.column]
        self._named = ids.label("vod_id"), cast(keys, _Named(key.cast)).label("key")
        self._views = views.label("views")
        self._after = cast(bindparam("after", type_=key.kind), _Named(key.cast))

    def enter(self) -> Update:
        """Change nothing, but wait for any lock that keeps the table from being changed."""
        return update(self._target).values({self._total: self._total}).where(false())

    def lock_rows(self) -> Select[str]:
        wanted = select(*self._named).cte("wanted")
        free = (
            select(self._key.label("key"))
            .where(self._key.in_(select(wanted.c.key)))
            .order_by(self._key)
            # Foreign keys that refer to the row lock it for key share, which does not block this lock.
            .with_for_update(key_share=True, skip_locked=True)
            .cte("free")
        )
        return (
            select(wanted.c.vod_id)
            .join_from(wanted, self._target, self._key == wanted.c.key)
            .where(~exists().where(free.c.key == wanted.c.key))
        )

    def add(self) -> Select[str]:
        wanted = select(*self._named, self._views).cte("wanted")
        # Several ids may map to one row (07 and 7, upper and lower case): add their sum.
        sums = (
            select(self._key.label("key"), func.sum(wanted.c.views).label("views"))
            .join_from(wanted, self._target, self._key == wanted.c.key)
            .group_by(self._key)
            .cte("sums")
        )
        added = (
            update(self._target)
            .where(self._key == sums.c.key)
            .values({self._total: func.coalesce(self._total, 0) + sums.c.views})
            .returning(self._key.label("key"))
            .cte("added")
        )
        return select(wanted.c.vod_id).join_from(wanted, added, added.c.key == wanted.c.key)

    def import_page(self, *, first: bool) -> Select[Any, int, int, int]:
        page = select(self._key.label("key"), cast(self._key, Text).label("vod_id"), self._total.label("views"))
        page = page if first else page.where(self._key > self._after)
        rows = page.order_by(self._key).limit(bindparam("at_most", type_=Integer)).cte("page")
        usable = (
            select(rows.c.vod_id, rows.c.views, rows.c.views)
            .where(rows.c.views > 0, func.octet_length(rows.c.vod_id).between(1, MAX_ID_BYTES))
            .order_by(rows.c.vod_id)
        )
        ours = upsert(view_counts).from_select(["vod_id", "views", "imported"], usable)
        imported = func.greatest(ours.excluded.views - view_counts.c.views, 0)
        taken = (
            ours.on_conflict_do_update(
                index_elements=[view_counts.c.vod_id],
                set_={"views": view_counts.c.views + imported, "imported": imported, "updated_at": func.now()},
                where=view_counts.c.imported.is_(None),
            )
            .returning(view_counts.c.imported)
            .cte("taken")
        )
        return select(
            select(rows.c.key).order_by(rows.c.key.desc()).limit(1).scalar_subquery(),
            select(func.count()).select_from(rows).scalar_subquery(),
            select(func.count()).select_from(taken).scalar_subquery(),
            select(cast(func.coalesce(func.sum(taken.c.imported), 0), BigInteger)).scalar_subquery(),
        )


class _Named(UserDefinedType[Any]):
    """A database type by its name. It has no length, because a cast would cut longer ids down to another id's key."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        return self.name
