"""Deletes old rows of records, a little at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Interval, bindparam, column, func, select, table, text
from sqlalchemy.exc import DBAPIError

from worker.db.errors import INSUFFICIENT_PRIVILEGE, sqlstate
from worker.db.quoting import quote_identifier

if TYPE_CHECKING:
    from datetime import timedelta

    from sqlalchemy.ext.asyncio import AsyncConnection

_LOCK = 0x7669657765722D72  # "viewer-r"; any constant that nobody else uses
_IS_HYPERTABLE = text(
    """
    SELECT to_regclass('timescaledb_information.hypertables') IS NOT NULL
       AND EXISTS (SELECT FROM pg_trigger WHERE tgrelid = to_regclass(:name) AND tgname = 'ts_insert_blocker')
    """
)


async def try_lock_retention(tx: AsyncConnection) -> bool:
    """Until the end of the transaction, no other worker deletes old rows. False: another one is doing it."""
    return bool((await tx.execute(select(func.pg_try_advisory_xact_lock(_LOCK)))).scalar_one())


class RecordRetention:
    """Rows of one table that are older than `age` by their column `time`."""

    def __init__(self, name: str, time: str, age: timedelta) -> None:
        self.name = name
        self._time = time
        self._age = age
        self._drops_chunks = True

    async def prune(self, tx: AsyncConnection, at_most: int) -> bool:
        """Delete about `at_most` rows, or every chunk that is old as a whole. True when there may be more.

        In the caller's transaction.
        """
        if not (await tx.execute(_IS_HYPERTABLE, {"name": self.name})).scalar_one():
            return await self._delete_rows(tx, at_most)
        if self._drops_chunks:
            try:
                async with tx.begin_nested():
                    await self._drop_chunks(tx)
            except DBAPIError as error:
                # Only the owner of a hypertable may drop its chunks.
                if sqlstate(error) != INSUFFICIENT_PRIVILEGE:
                    raise
                self._drops_chunks = False
            else:
                return False
        return await self._delete_slice(tx)

    async def _drop_chunks(self, tx: AsyncConnection) -> None:
        dropped = func.drop_chunks(self.name, func.now() - bindparam("age", type_=Interval))
        await tx.execute(select(dropped), {"age": self._age})

    async def _delete_rows(self, tx: AsyncConnection, at_most: int) -> bool:
        name, time = quote_identifier(self.name), quote_identifier(self._time)
        # By place: these tables have no key, and no index that would find the oldest row.
        statement = text(
            f"DELETE FROM {name} WHERE ctid = ANY (ARRAY("  # noqa: S608
            f"SELECT ctid FROM {name} WHERE {time} < now() - CAST(:age AS interval) LIMIT :at_most))"
        )
        statement = statement.bindparams(bindparam("age", type_=Interval))
        return (await tx.execute(statement, {"age": self._age, "at_most": at_most})).rowcount >= at_most

    async def _delete_slice(self, tx: AsyncConnection) -> bool:
        """The oldest hour. A place is not unique in a hypertable."""
        rows = table(self.name, column(self._time))
        oldest = (await tx.execute(select(func.min(rows.c[self._time])))).scalar()
        if oldest is None:
            return False
        name, time = quote_identifier(self.name), quote_identifier(self._time)
        statement = text(
            f"DELETE FROM {name} WHERE {time} < least(now() - CAST(:age AS interval), :oldest + interval '1 hour')"  # noqa: S608
        ).bindparams(bindparam("age", type_=Interval), bindparam("oldest", oldest))
        return (await tx.execute(statement, {"age": self._age})).rowcount > 0
