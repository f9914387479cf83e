"""Deletes old rows and old dead letters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from worker.db.dead_letters import LetterFilter, purge_letters
from worker.errors import DatabaseRefused, Unavailable
from worker.observability.logs import get_logger
from worker.runtime.waiting import wait_first

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import timedelta

    from worker.db.lease import Lease
    from worker.db.record_retention import RecordRetention
    from worker.db.session import Database, Transaction
    from worker.observability.status import Status

log = get_logger(__name__)

LOOP = "record retention"
PERIOD_S = 600.0
ROWS_AT_ONCE = 10_000
LETTERS_AT_ONCE = 1000
BEAT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRetention:
    """Every ten minutes, where this worker holds the lease of one of the pipeline's streams.

    `tables`: the lease that divides the work, and the table of each pipeline that does not keep its rows for ever.
    """

    database: Database
    status: Status
    tables: Sequence[tuple[Lease[Any], RecordRetention]]
    leases: Sequence[Lease[Any]]
    letters: timedelta

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                for lease, table in self.tables:
                    if lease.token is not None:
                        await self._repeat(stop, partial(table.prune, at_most=ROWS_AT_ONCE))
                if any(lease.token is not None for lease in self.leases):
                    await self._repeat(stop, self._purge_letters)
            except Unavailable as error:
                log.warning("retention postponed", cause=str(error))
            except DatabaseRefused as error:
                # Carrying does not need retention, and a restart would not help.
                log.error("retention refused", cause=str(error))
            self.status.expect_beat(LOOP, within=PERIOD_S + BEAT_S)
            await wait_first(PERIOD_S, stop)

    async def _repeat(self, stop: asyncio.Event, prune: Callable[[Transaction], Awaitable[bool]]) -> None:
        """In small transactions, until nothing is left to delete."""
        more = True
        while more and not stop.is_set():
            self.status.expect_beat(LOOP, within=BEAT_S)
            async with self.database.transaction() as tx:
                more = await prune(tx)

    async def _purge_letters(self, tx: Transaction) -> bool:
        return await purge_letters(tx, LetterFilter(older_than=self.letters), LETTERS_AT_ONCE) >= LETTERS_AT_ONCE
