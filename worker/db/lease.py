"""The lease: of any number of replicas, one works and the others stand by.

It divides the work and guards nothing: two workers may believe that they hold it. What they write is checked against
the row's token, which every takeover changes, in the same transaction.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from worker.errors import DatabaseRefused, DatabaseUnavailable, Unavailable, ViewerWorkerError
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
# For each lease that a worker holds, it leaves a free one so long to workers that hold fewer; at most so long.
SHARE_S = 0.5
MAX_SHARE_S = 2.0
# Longer than the TTL, so the holder is alive. One that is on hold releases the lease after its look.
KEPT_S = 10.0
# A free lease that cannot be taken for longer than this is a failure. A flush may keep the row locked for as long.
LOCKED_S = 30.0
LOCKED = "nobody holds the lease, but another session keeps its row locked"
LOCKED_REMEDY = "Find the session in pg_locks and pg_stat_activity, and end it."
LOOP = "lease"
BEAT_S = 60.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LeaseState(Generic[T]):
    """`token` is the fencing token of the holder. `is_free`: the worker that asks may take the lease.

    `is_renewed`: it has just taken or renewed it.
    """

    holder: str | None
    token: T
    is_free: bool
    is_renewed: bool = False


class LeasedRow(Protocol[T]):
    """The row that has the lease. Every method runs in the caller's transaction."""

    async def ensure(self, tx: Transaction) -> None:
        """Insert the row unless it exists."""

    async def take_lease(self, tx: Transaction, worker_id: str, dead: str | None = None) -> LeaseState[T] | None:
        """Take the lease if it is free, expired, our own, or held by `dead`. Returns who has it now."""

    async def read_lease(self, tx: Transaction, worker_id: str) -> LeaseState[T] | None:
        """Who has the lease; None: no row, or nobody ever had it."""

    async def release_lease(self, tx: Transaction, worker_id: str) -> None: ...


class Lease(Generic[T]):
    """Held when `token` is not None.

    A worker that cannot reach both servers must not hold the lease, so it is taken only while it can.

    `held`: the leases that a process holds of those that replicas share out. They have one set, and the more are in it,
    the longer they leave another free lease to other workers.

    `patience`: seconds for which a worker leaves the lease to its holder after a server was away, during which no lease
    can be renewed.
    """

    def __init__(
        self,
        database: Database,
        row: LeasedRow[T],
        worker_id: str,
        status: Status,
        loop: str = LOOP,
        held: set[Lease[T]] | None = None,
        patience: float = 0.0,
    ) -> None:
        self._database = database
        self._row = row
        self._worker_id = worker_id
        self._status = status
        self._loop = loop
        self._held: set[Lease[T]] = set() if held is None else held
        self._patience = patience
        self._away_at = float("-inf")
        self._looked = False
        self._is_paused = False
        self._is_yielding = False
        self._free_since: float | None = None
        # Another worker's lease, and when it was first seen.
        self._other: LeaseState[T] | None = None
        self._other_since = 0.0
        self._locked_since: float | None = None
        self._sure_until = float("-inf")
        self._wake = asyncio.Event()
        # Set, and replaced, when `failure` or the other holder changes.
        self._news = asyncio.Event()
        self.token: T | None = None
        # Why it could not be asked for, taken or renewed at the last try.
        self.failure: ViewerWorkerError | None = None
        self.changed = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Take the lease when it is free, and keep it, until `stop`. The loop that ends last releases it."""
        while not stop.is_set():
            if not self._status.is_ok(*SERVERS):
                if self._looked:
                    self._away_at = monotonic()
            elif not self._is_paused and not self._leaves_it_to_its_holder():
                try:
                    await self._look()
                except (Unavailable, DatabaseRefused) as error:
                    # A right or the table is missing, for example: a restart would not help.
                    self._failed(error)
            delay = self._delay()
            self._status.expect_beat(self._loop, within=delay + BEAT_S)
            await wait_first(delay, stop, self._status.changed, self._wake)
            self._wake.clear()

    def _leaves_it_to_its_holder(self) -> bool:
        return self.token is None and monotonic() - self._away_at < self._patience

    async def _look(self) -> None:
        """Renew the lease, or take it if it is free and this worker's turn. Raises as `take`."""
        if self.token is None and self._held and not await self._is_my_turn():
            return
        # It counts before it is taken: the other leases of this process look at the same time.
        self._held.add(self)
        self._free_since = None
        try:
            await self.take()
        finally:
            if self.token is None:
                self._held.discard(self)

    async def _is_my_turn(self) -> bool:
        async with self._database.transaction() as tx:
            state = await self._row.read_lease(tx, self._worker_id)
        if state is not None and state.holder == self._worker_id:
            return True
        if state is not None and not state.is_free:
            self._free_since = None
            self._seen(state)
            # Its holder may have died on this host: `take` finds out.
            return not self._looked
        now = monotonic()
        if self._free_since is None:
            self._free_since = now
        return now - self._free_since >= min(MAX_SHARE_S, SHARE_S * len(self._held))

    def _delay(self) -> float:
        if self.token is not None:
            return RENEW_S
        # Workers that wait for their turn look in a random order, so that none of them gets all.
        return (STANDBY_S if self._free_since is None else SHARE_S / 2) * random.uniform(0.5, 1.0)

    async def wait(self, stop: asyncio.Event, loop: str, standing_by: Callable[[str], None]) -> bool:
        """Wait until the lease is held and both servers can be used; False when stopped before that.

        `loop` is the name of the waiting loop and of its check, which fails while the lease cannot be asked for.
        `standing_by` is called with the id of the worker that holds the lease.
        """
        while not self.is_usable and not stop.is_set():
            if self.failure is not None:
                self._status.failing(loop, str(self.failure), self.failure.remedy)
            elif self._other is not None and self._other.holder is not None and self._status.is_ok(*SERVERS):
                standing_by(self._other.holder)
            self._status.expect_beat(loop, within=BEAT_S)
            await wait_first(5.0, stop, self._status.changed, self.changed, self._news)
        return not stop.is_set()

    @property
    def is_usable(self) -> bool:
        """Held, while both servers can be used."""
        return self.token is not None and self._status.is_ok(*SERVERS)

    @property
    def is_sure(self) -> bool:
        """Held, and not renewed so long ago that another worker may have taken it. Only of a StreamPosition."""
        return self.token is not None and monotonic() < self._sure_until

    @property
    def is_kept_elsewhere(self) -> bool:
        """Another worker has it, and keeps it: it is not on hold."""
        return self._other is not None and monotonic() - self._other_since > KEPT_S

    async def take(self) -> bool:
        """Take or renew it. True when it is held afterwards. Raises DatabaseUnavailable."""
        if self.token is None:
            async with self._database.transaction() as tx:
                await self._row.ensure(tx)
        state = await self._take(dead=None)
        if (dead := self._dead_holder(state)) is not None:
            state = await self._take(dead)
        self._seen(state)
        return self.token is not None

    def _seen(self, state: LeaseState[T] | None) -> None:
        is_mine = state is not None and state.holder == self._worker_id
        other = None if state is None or state.is_free else state
        now = monotonic()
        if other != self._other:
            self._other, self._other_since = other, now
            self._spread_news()
        if is_mine or other is not None:
            self._locked_since = None
        elif self._locked_since is None:
            self._locked_since = now
        if self._locked_since is None or now - self._locked_since <= LOCKED_S:
            self.failure = None
        else:
            self._failed(DatabaseUnavailable(LOCKED, LOCKED_REMEDY))
        self._become(state.token if state is not None and is_mine else None)

    def _failed(self, error: ViewerWorkerError) -> None:
        is_news = self.failure is None or str(self.failure) != str(error)
        self.failure = error
        if is_news:
            log.warning("lease not renewed", loop=self._loop, cause=str(error))
            self._spread_news()

    def _spread_news(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _take(self, dead: str | None) -> LeaseState[T] | None:
        asked = monotonic()
        async with self._database.transaction() as tx:
            state = await self._row.take_lease(tx, self._worker_id, dead)
        if state is not None and state.is_renewed:
            self._sure_until = asked + LEASE_TTL.total_seconds()
        return state

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
        self._is_yielding = pause
        async with self._database.transaction() as tx:
            await self._row.release_lease(tx, self._worker_id)
        self._become(None, released=True)

    async def release_or_expire(self, *, pause: bool = False) -> None:
        """As `release`, if it is held. A failure is only logged: the lease expires."""
        if self.token is None:
            return
        try:
            await self.release(pause=pause)
        except (Unavailable, DatabaseRefused) as error:
            log.warning("lease not released, it will expire", loop=self._loop, cause=str(error))

    def resume(self) -> None:
        """Take the lease again when it is free."""
        self._is_paused = False
        self._wake.set()

    def _become(self, token: T | None, *, released: bool = False) -> None:
        if token == self.token:
            # Kept, or another worker's: what comes next is news.
            self._is_yielding = False
            return
        before, self.token = self.token, token
        if token is None:
            self._held.discard(self)
        else:
            self._held.add(self)
        log.log(
            # A worker that waits for a stream, or is on hold, takes and releases the lease at each look.
            logging.DEBUG if self._is_yielding else logging.INFO,
            "lease taken" if token is not None else "lease released" if released else "lease lost",
            loop=self._loop,
            token=str(before if token is None else token),
        )
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()
