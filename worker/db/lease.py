"""The lease: of any number of replicas one works, the others stand by.

It divides the work and guards nothing: if two believe they hold it, the row lock and the epoch that is checked under
it keep the counts right.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from worker.errors import DatabaseRefused, Unavailable
from worker.observability.logs import get_logger
from worker.runtime.waiting import wait_first
from worker.runtime.worker_id import has_died_here

if TYPE_CHECKING:
    from worker.db.counters.source_row import LeaseState, Source, SourceRow
    from worker.db.session import Database
    from worker.observability.status import Status

log = get_logger(__name__)

RENEW_S = 2.0
STANDBY_S = 1.0
NEEDS = ("redis", "postgres", "schema")


class Lease:
    """Held when `epoch` is a number. Taken only while both servers can be used from here: who cannot work must not."""

    def __init__(
        self,
        database: Database,
        source_row: SourceRow,
        worker_id: str,
        status: Status,
    ) -> None:
        self._database = database
        self._source_row = source_row
        self._worker_id = worker_id
        self._status = status
        self._looked = False
        self.epoch: int | None = None
        self.changed = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Take the lease when it can be had, and keep it, until `stop`. Whoever does the last work releases it."""
        while not stop.is_set():
            if self._status.is_ok(*NEEDS):
                try:
                    await self.take()
                except Unavailable as error:
                    log.debug("lease not renewed", cause=str(error))
                except DatabaseRefused as error:
                    # A table that is missing for a moment: nothing that a restart mends.
                    log.warning("lease not renewed", cause=str(error))
            delay = RENEW_S if self.epoch is not None else STANDBY_S * random.uniform(0.5, 1.0)
            self._status.expect_beat("lease", within=delay + 60.0)
            await wait_first(delay, stop, self._status.changed)

    async def take(self) -> bool:
        """Take or renew it. True when it is held afterwards. Raises DatabaseUnavailable."""
        if self.epoch is None:
            async with self._database.transaction() as tx:
                await self._source_row.ensure(tx)
        state = await self._ask(dead=None)
        if (dead := self._crashed_before(state)) is not None:
            state = await self._ask(dead)
        if state is not None and state.holder == self._worker_id:
            self._become(state.epoch)
        else:
            self.lost()
        return self.epoch is not None

    async def _ask(self, dead: str | None) -> LeaseState | None:
        async with self._database.transaction() as tx:
            return await self._source_row.take_lease(tx, self._worker_id, dead)

    def _crashed_before(self, state: LeaseState | None) -> str | None:
        """Whose restart this may be: then nobody waits until the lease expires.

        Looked for once, at the start: where hosts share a name, two workers would take it from each other for ever.
        """
        if self._looked or state is None:
            return None
        self._looked = True
        return state.holder if state.holder is not None and has_died_here(state.holder) else None

    def covers(self, source: Source) -> bool:
        """True when the row, read under its lock, still names this worker and this epoch."""
        return source.lease_holder == self._worker_id and source.lease_epoch == self.epoch

    def lost(self) -> None:
        """Somebody else holds it."""
        self._become(None)

    async def release(self) -> None:
        """Let another worker have it at once. Raises DatabaseUnavailable."""
        async with self._database.transaction() as tx:
            await self._source_row.release_lease(tx, self._worker_id)
        self._become(None, "lease released")

    def _become(self, epoch: int | None, event: str = "lease lost") -> None:
        if epoch == self.epoch:
            return
        before, self.epoch = self.epoch, epoch
        log.info("lease taken" if epoch is not None else event, epoch=epoch or before)
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()
