"""Writes batches to Postgres: claim, rows and dead letters in one transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from worker.db.dead_letters import write_letters
from worker.db.errors import ErrorClass, classify, describe, sqlstate
from worker.db.transaction_settings import CHECK_CONSTRAINTS_NOW
from worker.errors import DatabaseRefused, DatabaseUnavailable, TableRefused, UnknownFailure
from worker.pipelines.model import Letter, NotClaimed, Written
from worker.runtime.bisect import bisect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from worker.db.session import Database, Transaction
    from worker.db.upsert import RecordTable
    from worker.pipelines.model import Batch, Item, RecordType, WriteOutcome

R = TypeVar("R")

# From the next one in a row on, it is a fault of the table and not of the records.
MAX_REFUSED_IN_A_ROW = 1000
TABLE_FIX = "Run viewer-worker check, and look at the table and its rights. Writing resumes by itself."


class PostgresSink(Generic[R]):
    """Into one table. One write at a time."""

    def __init__(self, database: Database, record: RecordType[R], table: RecordTable) -> None:
        self._database = database
        self._record = record
        self._table = table
        self._refused_in_a_row = 0

    async def write(self, batch: Batch[R]) -> WriteOutcome:
        """Raises DatabaseUnavailable, TableRefused, UnknownFailure. After the first, the claim finds out what was done.

        All records in one statement; if one of them is refused, again, by halves in savepoints.
        """
        try:
            try:
                return await self._write(batch, self._insert_all)
            except (DatabaseRefused, DatabaseUnavailable) as error:
                if classify(error, self._table.columns) is not ErrorClass.ROW:
                    raise
            return await self._write(batch, self._insert_by_halves)
        except (DatabaseRefused, DatabaseUnavailable) as error:
            match classify(error, self._table.columns):
                case ErrorClass.HOLD:
                    raise TableRefused(str(error), TABLE_FIX) from error
                case ErrorClass.WAIT if isinstance(error, DatabaseUnavailable):
                    raise
                case ErrorClass.WAIT:
                    raise DatabaseUnavailable(str(error)) from error
            raise UnknownFailure(str(error)) from error

    async def _write(
        self, batch: Batch[R], insert: Callable[[Transaction, Batch[R]], Awaitable[list[Letter]]]
    ) -> WriteOutcome:
        refused_before = self._refused_in_a_row
        try:
            async with self._database.transaction() as tx:
                if not await batch.claim.take(tx):
                    return NotClaimed()
                refused = await insert(tx, batch) if batch.items else []
                await write_letters(tx, self._record.name, [*batch.letters, *refused])
        except BaseException:
            self._refused_in_a_row = refused_before
            raise
        return Written(len(batch.items) - len(refused), len(batch.letters) + len(refused))

    async def _insert_all(self, tx: Transaction, batch: Batch[R]) -> list[Letter]:
        await self._table.insert(tx, self._rows(batch.items))
        self._refused_in_a_row = 0
        return []

    async def _insert_by_halves(self, tx: Transaction, batch: Batch[R]) -> list[Letter]:
        letters: list[Letter] = []

        async def attempt(part: Sequence[Item[R]]) -> None:
            async with tx.begin_nested():
                await self._table.insert(tx, self._rows(part))
                # A deferred constraint would otherwise fail at the commit, where no record can be blamed.
                await tx.execute(CHECK_CONSTRAINTS_NOW)
            self._refused_in_a_row = 0

        def reject(item: Item[R], error: Exception) -> None:
            self._refused_in_a_row += 1
            if self._refused_in_a_row > MAX_REFUSED_IN_A_ROW:
                raise TableRefused(f"the table refuses every record: {describe(error)}", TABLE_FIX) from error
            origin = f"{batch.origin}/{item.key}"
            letters.append(Letter(origin, "refused", describe(error), item.payload, sqlstate(error)))

        async for _ in bisect(batch.items, attempt, self._concerns_a_row, reject):
            pass
        return letters

    def _concerns_a_row(self, error: Exception) -> bool:
        return classify(error, self._table.columns) is ErrorClass.ROW

    def _rows(self, items: Sequence[Item[R]]) -> list[tuple[Any, ...]]:
        row = self._record.row
        return [row(item.record) for item in items]
