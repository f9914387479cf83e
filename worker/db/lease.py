"""The lease: of any number of replicas, one works and the others stand by.

It divides the work and guards nothing: two workers may believe that they hold it. What they write is checked against
the row's token, which every takeover changes, in the same transaction.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from worker.errors import DatabaseRefused, Unavailable, ViewerWorkerError
from worker.observability.logs import get_logger
from worker.observability.status import SERVERS
from worker.runtime.waiting import wait_first
from worker.runtime.worker_id import has_died_here

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.db.session import Database, Transaction
    from worker.observability.status import Status

log = get_logger(__name__)

# By the database's clock. A holder that renews every two seconds is given up after eight.
LEASE_TTL = timedelta(seconds=8)
RENEW_S = 2.0
STANDBY_S = 1.0
LOOP = "lease"
BEAT_S = 60.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LeaseState(Generic[T]):
    """`token` is the fencing token of the holder."""

    holder: str | None
    token: T


class LeasedRow(Protocol[T]):
    """The row that has the lease. Every method runs in the caller's transaction."""

    async def ensure(self, tx: Transaction) -> None:
        """Insert the row unless it exists."""

    async def take_lease(self, tx: Transaction, worker_id: str, dead: str | None = None) -> LeaseState[T] | None:
        """Take the lease if it is free, expired, our own, or held by `dead`. Returns who has it now."""

    async def release_lease(self, tx: Transaction, worker_id: str) -> None: ...


class Lease(Generic[T]):
    """Held when `token` is not None.

    A worker that cannot reach both servers must not hold the lease, so it is taken only while it can.
    """

    def __init__(self, database: Database, row: LeasedRow[T], worker_id: str, status: Status, loop: str = LOOP) -> None:
        self._database = database
        self._row = row
        self._worker_id = worker_id
        self._status = status
        self._loop = loop
        self._looked = False
        self._is_paused = False
        self._wake = asyncio.Event()
        self.token: T | None = None
        # Why it could not be taken or renewed at the last try.
        self.failure: ViewerWorkerError | None = None
        self.changed = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Take the lease when it is free, and keep it, until `stop`. The loop that ends last releases it."""
        while not stop.is_set():
            if self._status.is_ok(*SERVERS) and not self._is_paused:
                try:
                    await self.take()
                except (Unavailable, DatabaseRefused) as error:
                    # A right or the table is missing, for example: a restart would not help.
                    self._failed(error)
            delay = RENEW_S if self.token is not None else STANDBY_S * random.uniform(0.5, 1.0)
            self._status.expect_beat(self._loop, within=delay + BEAT_S)
            await wait_first(delay, stop, self._status.changed, self._wake)
            self._wake.clear()

    async def wait(self, stop: asyncio.Event, loop: str, standing_by: Callable[[], None]) -> bool:
        """Wait until the lease is held and both servers can be used; False when stopped before that.

        `loop` is the name of the waiting loop. `standing_by` is called while only the lease is missing.
        """
        while not self.is_usable and not stop.is_set():
            if self.failure is not None:
                self._status.failing(loop, str(self.failure), self.failure.remedy)
            elif self._status.is_ok(*SERVERS):
                standing_by()
            self._status.expect_beat(loop, within=BEAT_S)
            await wait_first(5.0, stop, self._status.changed, self.changed)
        return not stop.is_set()

    @property
    def is_usable(self) -> bool:
        """Held, while both servers can be used."""
        return self.token is not None and self._status.is_ok(*SERVERS)

    async def take(self) -> bool:
        """Take or renew it. True when it is held afterwards. Raises DatabaseUnavailable."""
        if self.token is None:
            async with self._database.transaction() as tx:
                await self._row.ensure(tx)
        state = await self._take(dead=None)
        self.failure = None
        if (dead := self._dead_holder(state)) is not None:
            state = await self._take(dead)
        if state is not None and state.holder == self._worker_id:
            self._become(state.token)
        else:
            self.lost()
        return self.token is not None

    def _failed(self, error: ViewerWorkerError) -> None:
        if self.failure is None or str(self.failure) != str(error):
            log.warning("lease not renewed", loop=self._loop, cause=str(error))
        self.failure = error

    async def _take(self, dead: str | None) -> LeaseState[T] | None:
        async with self._database.transaction() as tx:
            return await self._row.take_lease(tx, self._worker_id, dead)

    def _dead_holder(self, state: LeaseState[T] | None) -> str | None:
        """The holder, if it was a process of this host that has died: its restart need not wait for the expiry.

        Checked once, at the start: where hosts share a name, two workers would take the lease from each other for ever.
        """
        if self._looked or state is None:
            return None
        self._looked = True
        return state.holder if state.holder is not None and has_died_here(state.holder) else None

    def covers(self, holder: str | None, token: T) -> bool:
        """True when holder and token in the row, read under its lock, are still this worker's."""
        return holder == self._worker_id and token == self.token

    def lost(self) -> None:
        """Another worker holds it."""
        self._become(None)

    async def release(self, *, pause: bool = False) -> None:
        """Let another worker take it at once. Raises DatabaseUnavailable.

        With `pause`, this worker does not take it before `resume`.
        """
        self._is_paused = pause
        async with self._database.transaction() as tx:
            await self._row.release_lease(tx, self._worker_id)
        self._become(None, "lease released")

    def resume(self) -> None:
        """Take the lease again when it is free."""
        self._is_paused = False
        self._wake.set()

    def _become(self, token: T | None, event: str = "lease lost") -> None:
        if token == self.token:
            return
        before, self.token = self.token, token
        shown = str(before if token is None else token)
        log.info("lease taken" if token is not None else event, loop=self._loop, token=shown)
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()
