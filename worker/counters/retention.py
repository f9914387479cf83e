"""Deletes old flushes from the ledger."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from worker.errors import DatabaseRefused, Unavailable
from worker.observability.logs import get_logger
from worker.runtime.waiting import wait_first

if TYPE_CHECKING:
    from datetime import timedelta

    from worker.counters.stores import Stores
    from worker.db.lease import Lease
    from worker.observability.status import Status

log = get_logger(__name__)

LOOP = "retention"
PERIOD_S = 600.0
# Of one transaction.
FLUSHES_AT_ONCE = 1000
BEAT_S = 120.0


class Retention:
    """Every ten minutes, the holder of the lease deletes flushes older than `age` that are settled and in the history.

    A Redis restored from a snapshot older than that can no longer be brought up to date: it is a hold then.
    """

    def __init__(self, stores: Stores, lease: Lease[int], status: Status, age: timedelta) -> None:
        self._stores = stores
        self._lease = lease
        self._status = status
        self._age = age

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            if self._lease.token is not None:
                try:
                    await self.prune(stop)
                except Unavailable as error:
                    log.warning("retention postponed", cause=str(error))
                except DatabaseRefused as error:
                    # Flushing does not need retention, and a restart would not help.
                    log.error("retention refused", cause=str(error))
            self._status.expect_beat(LOOP, within=PERIOD_S + BEAT_S)
            await wait_first(PERIOD_S, stop)

    async def prune(self, stop: asyncio.Event | None = None) -> int:
        """Delete what is due, in small transactions. Returns the number of flushes deleted. Raises Unavailable."""
        pruned = 0
        while stop is None or not stop.is_set():
            self._status.expect_beat(LOOP, within=BEAT_S)
            async with self._stores.database.transaction() as tx:
                row = await self._stores.source_row.read(tx)
                at_once = 0
                if row is not None:
                    done = min(row.settled_id - 1, row.rolled_up_id)
                    at_once = await self._stores.ledger.prune(tx, done, self._age, FLUSHES_AT_ONCE)
            pruned += at_once
            if at_once < FLUSHES_AT_ONCE:
                break
        if pruned:
            log.info("ledger pruned", flushes=pruned)
        return pruned
