"""Finds out whether the tables refuse one id or every id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from worker.counters.flush.outcome import Busy
from worker.db.counters.ledger import Flush
from worker.db.errors import QUERY_CANCELED, database_errors, sqlstate
from worker.errors import DatabaseRefused, DatabaseUnavailable, TableRefused, WriteTooSlow

if TYPE_CHECKING:
    from worker.counters.stores import Stores

# So many ids that have a total are tried: the row of one may have a fault of its own.
KNOWN_IDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Flushes ids that are not suspected, and rolls that back."""

    stores: Stores

    async def run(self, suspect: str) -> Busy | None:
        """None when the tables take another id, so that `suspect` is the cause.

        Tries an id that nobody uses, then some that have a total: a constraint may allow only known ids. Raises
        TableRefused when the tables refuse all of these, too; WriteTooSlow and other Unavailable when the database
        cannot be used.
        """
        try:
            return await self._flush_others(suspect)
        except DatabaseRefused as error:
            raise TableRefused(str(error)) from error
        except DatabaseUnavailable as error:
            # Without its cause, so that its SQLSTATE is not taken for an error of the suspect.
            if sqlstate(error) == QUERY_CANCELED:
                raise WriteTooSlow(str(error)) from None
            raise DatabaseUnavailable(str(error), error.remedy) from None

    async def _flush_others(self, suspect: str) -> Busy | None:
        ledger = self.stores.ledger
        async with self.stores.database.transaction() as tx:
            row = await self.stores.source_row.lock(tx)
            if row is None:
                return Busy()
            others = [f"trial-{uuid4()}", *await ledger.known_ids(tx, suspect, KNOWN_IDS)]
            for vod_id in others:
                # The next flush's number: its header may be what is refused.
                flush = Flush(row.last_flush_id + 1, uuid4(), uuid4(), {vod_id: 1}, {vod_id: 1})
                try:
                    with database_errors():
                        await ledger.rehearse(tx, flush)
                except (DatabaseRefused, DatabaseUnavailable):
                    if vod_id == others[-1]:
                        raise
                else:
                    return None
        return None
