"""The loop of the view counters: sweep, flush until nothing is pending, wait, again."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from worker.counters.flush import Busy, Flushed
from worker.counters.keys import InvalidId
from worker.counters.recovery import Hold
from worker.db.errors import describe
from worker.engine.retry import Backoff
from worker.engine.waiting import wait_first
from worker.errors import Unavailable, ViewerWorkerError
from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from worker.counters.flush import Flusher
    from worker.counters.keys import Keys
    from worker.counters.pending import Pending, Sweep
    from worker.counters.quarantine import Quarantine
    from worker.db.ledger import Ledger
    from worker.db.session import Database
    from worker.observability.metrics import Metrics
    from worker.observability.status import Status

log = get_logger(__name__)

CHECK = "view_counts"
NEEDS = ("redis", "postgres", "schema")
# Ids kept in memory at most; a sweep that finds more lets them be flushed before it goes on.
PENDING_LIMIT = 50_000
BUSY_RETRY_S = 1.0
# Longer than any single step may take with all its timeouts.
STEP_LIMIT_S = 120.0


class FlushLoop:
    """`interval` is seconds between two cycles, `batch_size` keys a flush."""

    def __init__(
        self,
        *,
        database: Database,
        ledger: Ledger,
        flusher: Flusher,
        pending: Pending,
        sweep: Sweep,
        quarantine: Quarantine,
        keys: Keys,
        status: Status,
        metrics: Metrics,
        interval: float,
        batch_size: int,
        rng: random.Random | None = None,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._flusher = flusher
        self._pending = pending
        self._sweep = sweep
        self._quarantine = quarantine
        self._keys = keys
        self._status = status
        self._metrics = metrics
        self._interval = interval
        self._batch_size = batch_size
        self._rng = rng or random.Random()
        self._backoff = Backoff(first=0.2, cap=10.0, rng=self._rng)
        self._wake = asyncio.Event()
        metrics.pending_keys.set_function(lambda: len(pending))
        metrics.oldest_pending_seconds.set_function(pending.oldest_seconds)
        metrics.quarantined_keys.set_function(lambda: len(quarantine))

    async def run(self, stop: asyncio.Event) -> None:
        """Flush every interval until `stop`, and once more after it."""
        while not stop.is_set():
            if await self._wait_for_servers(stop):
                delay = await self._guarded_cycle()
                self._status.expect_beat(CHECK, within=delay + STEP_LIMIT_S)
                await wait_first(delay, stop, self._wake)
                self._wake.clear()
        self._status.expect_beat(CHECK, within=STEP_LIMIT_S)
        if self._status.is_ok(*NEEDS):
            self._sweep.request()
            await self._guarded_cycle()
        else:
            log.warning("stopping without a last flush: pending views stay in Redis")

    def reconnected(self) -> None:
        """Redis is back, and may hold other keys than before: look at once."""
        self._sweep.request()
        self._wake.set()

    async def cycle(self) -> Flushed | Busy | Hold:
        """Sweep if it is due, then flush until nothing is pending. Raises Unavailable."""
        async with self._database.transaction() as tx:
            await self._ledger.ensure_source(tx)
        total = Flushed()
        if self._sweep.is_due:
            async for page in self._sweep.pages():
                self._status.expect_beat(CHECK, within=STEP_LIMIT_S)
                self._add(page)
                if len(self._pending) >= PENDING_LIMIT or self._pending.oldest_seconds() >= self._interval:
                    outcome = await self._flush_pending()
                    if not isinstance(outcome, Flushed):
                        return outcome
                    total = _sum(total, outcome)
            self._quarantine.next_sweep()
        outcome = await self._flush_pending()
        return _sum(total, outcome) if isinstance(outcome, Flushed) else outcome

    async def _flush_pending(self) -> Flushed | Busy | Hold:
        """At least one flush, even of nothing: it finds out whether Redis and Postgres still agree."""
        total = Flushed()
        while True:
            self._status.expect_beat(CHECK, within=STEP_LIMIT_S)
            ids = self._pending.oldest(self._batch_size)
            outcome = await self._flusher.flush(ids)
            if not isinstance(outcome, Flushed):
                return outcome
            self._pending.remove(ids)
            total = _sum(total, outcome)
            if not self._pending:
                return total

    def _add(self, page: list[bytes]) -> None:
        ids = []
        for key in page:
            try:
                ids.append(self._keys.vod_id(key))
            except InvalidId as error:
                self._quarantine.report(key, str(error))
        self._pending.add(ids)

    async def _guarded_cycle(self) -> float:
        """Run one cycle and report how it went. Returns the seconds to wait before the next."""
        try:
            outcome = await self.cycle()
        except Exception as error:
            return self._failed(error)
        self._backoff.reset()
        if isinstance(outcome, Busy):
            return BUSY_RETRY_S * self._rng.uniform(0.5, 1.5)
        self._metrics.holds.set(isinstance(outcome, Hold))
        if isinstance(outcome, Hold):
            self._status.hold(CHECK, outcome.cause, outcome.remedy)
        else:
            self._status.ok(CHECK)
        return self._interval

    def _failed(self, error: Exception) -> float:
        self._metrics.flush_failures.inc()
        cause = str(error) if isinstance(error, ViewerWorkerError) else describe(error)
        remedy = error.remedy if isinstance(error, ViewerWorkerError) else UNEXPECTED
        # What heals by waiting is told in a line; anything else needs the traceback.
        log.error("flush failed", cause=cause, exc_info=None if isinstance(error, Unavailable) else error)
        self._status.failing(CHECK, cause, remedy)
        # Whatever was pending may have been settled by a replica before this worker is back.
        self._sweep.request()
        return min(self._backoff.next(), self._interval)

    async def _wait_for_servers(self, stop: asyncio.Event) -> bool:
        """True as soon as both servers can be used; False when stopped before that."""
        if self._status.is_ok(*NEEDS):
            return True
        while not self._status.is_ok(*NEEDS) and not stop.is_set():
            self._status.expect_beat(CHECK, within=STEP_LIMIT_S)
            await wait_first(5.0, stop, self._status.changed)
        self._sweep.request()
        return not stop.is_set()


UNEXPECTED = "Nothing is lost: the views stay in Redis. The log has the details."


def _sum(a: Flushed, b: Flushed) -> Flushed:
    return Flushed(b.flush_id or a.flush_id, a.keys + b.keys, a.views + b.views)
