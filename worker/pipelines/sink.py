"""Writes batches to Postgres: claim, rows and dead letters in one transaction."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from worker.db.dead_letters import write_letters
from worker.db.errors import QUERY_CANCELED, ErrorClass, classify, describe, remedy_for, sqlstate
from worker.db.transaction_settings import CHECK_CONSTRAINTS_NOW
from worker.errors import DatabaseRefused, DatabaseUnavailable, TableRefused, UnknownFailure, WriteTooSlow
from worker.pipelines.model import CommitUnanswered, Letter, NotClaimed, Written
from worker.runtime.bisect import bisect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from worker.db.session import Database, Transaction
    from worker.db.upsert import RecordTable
    from worker.pipelines.model import Batch, Item, RecordType, WriteOutcome

R = TypeVar("R")

# From the next one in a row on, it is a fault of the table and not of the records.
MAX_REFUSED_IN_A_ROW = 1000
ROW = frozenset({ErrorClass.ROW})
ROW_OR_UNKNOWN = frozenset({ErrorClass.ROW, ErrorClass.UNKNOWN})


class PostgresSink(Generic[R]):
    """Into one table. One write at a time."""

    def __init__(self, database: Database, record: RecordType[R], table: RecordTable) -> None:
        self._database = database
        self._record = record
        self._table = table
        self._refused_in_a_row = 0

    async def write(
        self, batch: Batch[R], *, isolate: bool = False, before_commit: Callable[[], None] = lambda: None
    ) -> WriteOutcome:
        """As `Sink.write`; Unavailable is DatabaseUnavailable, and WriteTooSlow where a smaller batch may be written.

        All records in one statement; if one of them is refused, again, by halves in savepoints.
        """
        try:
            try:
                if not isolate:
                    return await self._write(batch, self._insert_all, before_commit)
            except (DatabaseRefused, DatabaseUnavailable) as error:
                if isinstance(error, CommitUnanswered) or self._classify(error) is not ErrorClass.ROW:
                    raise
            return await self._write(batch, self._isolate if isolate else self._insert_by_halves, before_commit)
        except CommitUnanswered:
            raise
        except (DatabaseRefused, DatabaseUnavailable) as error:
            match self._classify(error):
                case ErrorClass.HOLD:
                    raise TableRefused(str(error)) from error
                case ErrorClass.WAIT if sqlstate(error) == QUERY_CANCELED:
                    raise WriteTooSlow(str(error)) from error
                case ErrorClass.WAIT if isinstance(error, DatabaseUnavailable):
                    raise
                case ErrorClass.WAIT:
                    raise DatabaseUnavailable(str(error), remedy_for(error)) from error
            raise UnknownFailure(str(error)) from error

    async def _write(
        self,
        batch: Batch[R],
        insert: Callable[[Transaction, Batch[R]], Awaitable[Written]],
        before_commit: Callable[[], None],
    ) -> WriteOutcome:
        refused_before = self._refused_in_a_row
        written: Written | None = None
        try:
            async with self._database.transaction() as tx:
                if not await batch.claim.take(tx):
                    return NotClaimed()
                written = await insert(tx, batch)
                before_commit()
        except BaseException as error:
            self._refused_in_a_row = refused_before
            if written is not None and isinstance(error, DatabaseUnavailable):
                raise CommitUnanswered(str(error), written) from error
            raise
        return written

    async def _insert_all(self, tx: Transaction, batch: Batch[R]) -> Written:
        rows = await self._table.insert(tx, self._rows(batch.items)) if batch.items else 0
        await write_letters(tx, self._record.name, batch.letters)
        if batch.items:
            self._refused_in_a_row = 0
        return Written(rows, len(batch.letters), repeated=len(batch.items) - rows)

    async def _insert_by_halves(self, tx: Transaction, batch: Batch[R]) -> Written:
        written, letters = await self._bisect(tx, batch, ROW)
        await write_letters(tx, self._record.name, letters)
        return written

    async def _isolate(self, tx: Transaction, batch: Batch[R]) -> Written:
        written, letters = await self._bisect(tx, batch, ROW_OR_UNKNOWN)
        dropped: list[Letter] = []

        async def attempt(part: Sequence[Letter]) -> None:
            async with tx.begin_nested():
                await write_letters(tx, self._record.name, part)

        def is_refused(error: Exception) -> bool:
            return self._classify(error) in ROW_OR_UNKNOWN

        async for _ in bisect(letters, attempt, is_refused, lambda letter, _: dropped.append(letter)):
            pass
        return replace(written, letters=written.letters - len(dropped), dropped=len(dropped))

    async def _bisect(
        self, tx: Transaction, batch: Batch[R], concerns: frozenset[ErrorClass]
    ) -> tuple[Written, list[Letter]]:
        """Insert the records, but for those whose own insertion fails with an error of these classes.

        Returns the batch's letters with theirs, which the caller writes.
        """
        letters = list(batch.letters)

        async def attempt(part: Sequence[Item[R]]) -> int:
            async with tx.begin_nested():
                rows = await self._table.insert(tx, self._rows(part)) if part else 0
                # A deferred constraint would otherwise fail at the commit, where no record can be blamed.
                await tx.execute(CHECK_CONSTRAINTS_NOW)
            self._refused_in_a_row = 0
            return rows

        def reject(item: Item[R], error: Exception) -> None:
            self._refused_in_a_row += 1
            origin = f"{batch.origin}/{item.key}"
            letters.append(Letter(origin, "refused", describe(error), item.payload, sqlstate(error)))

        inserted = bisect(batch.items, attempt, lambda error: self._classify(error) in concerns, reject)
        rows = sum([rows async for rows in inserted])
        if self._refused_in_a_row > MAX_REFUSED_IN_A_ROW:
            raise TableRefused(f"the table refuses every record: {letters[-1].error}")
        refused = len(letters) - len(batch.letters)
        return Written(rows, len(letters), repeated=len(batch.items) - refused - rows), letters

    def _classify(self, error: BaseException) -> ErrorClass:
        return classify(error, self._table.columns)

    def _rows(self, items: Sequence[Item[R]]) -> list[tuple[Any, ...]]:
        row = self._record.row
        return [row(item.record) for item in items]
