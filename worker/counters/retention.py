"""Removes what the ledger no longer needs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from worker.errors import DatabaseRefused, Unavailable
from worker.observability.logs import get_logger
from worker.runtime.waiting import wait_first

if TYPE_CHECKING:
    from datetime import timedelta

    from worker.db.counters.ledger import Ledger
    from worker.db.counters.source_row import SourceRow
    from worker.db.lease import Lease
    from worker.db.session import Database
    from worker.observability.status import Status

log = get_logger(__name__)

PERIOD_S = 600.0
# A transaction's worth: of the usual hundred keys a flush, ten thousand rows.
FLUSHES_AT_ONCE = 100


class Retention:
    """Every ten minutes, the holder of the lease deletes flushes that are settled and older than `age`.

    A Redis restored from a snapshot older than that can no longer be brought up to date: it is a hold then.
    """

    def __init__(
        self, database: Database, ledger: Ledger, source_row: SourceRow, lease: Lease, status: Status, age: timedelta
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._source_row = source_row
        self._lease = lease
        self._status = status
        self._age = age

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            if self._lease.epoch is not None:
                try:
                    await self.prune(stop)
                except Unavailable as error:
                    log.warning("retention put off", cause=str(error))
                except DatabaseRefused as error:
                    # Flushing does not need it; a restart would not mend it.
                    log.error("retention refused", cause=str(error))
            self._status.expect_beat("retention", within=PERIOD_S + 120.0)
            await wait_first(PERIOD_S, stop)

    async def prune(self, stop: asyncio.Event | None = None) -> int:
        """Delete what is due, a transaction's worth at a time. Returns how many flushes went. Raises Unavailable."""
        pruned = 0
        while stop is None or not stop.is_set():
            self._status.expect_beat("retention", within=120.0)
            async with self._database.transaction() as tx:
                source = await self._source_row.read(tx)
                at_once = 0
                if source is not None:
                    at_once = await self._ledger.prune(tx, source.settled_id, self._age, FLUSHES_AT_ONCE)
            pruned += at_once
            if at_once < FLUSHES_AT_ONCE:
                break
        if pruned:
            log.info("ledger pruned", flushes=pruned)
        return pruned
