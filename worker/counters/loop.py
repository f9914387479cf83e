"""The loop of the view counters: sweep, flush until nothing is pending, wait, again."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from worker.contract.ids import InvalidId
from worker.counters.flush.flusher import Busy, Flushed
from worker.counters.flush.recovery import Hold
from worker.db.lease import NEEDS
from worker.errors import DatabaseRefused, Unavailable, ViewerWorkerError, cause_of
from worker.observability.logs import get_logger
from worker.observability.status import STEP_LIMIT_S
from worker.runtime.backoff import Backoff
from worker.runtime.waiting import wait_first

if TYPE_CHECKING:
    from worker.contract.keys import Keys
    from worker.counters.flush.batch_size import BatchSize
    from worker.counters.flush.flusher import Flusher
    from worker.counters.intake.announced import Announced
    from worker.counters.intake.pending import Pending, Sweep
    from worker.counters.intake.quarantine import Quarantine
    from worker.db.lease import Lease
    from worker.observability.metrics import Metrics
    from worker.observability.status import Status
    from worker.runtime.clock import Clock

log = get_logger(__name__)

CHECK = "view_counts"
# Ids kept in memory at most; a sweep that finds more lets them be flushed before it goes on.
PENDING_LIMIT = 50_000
BUSY_RETRY_S = 1.0
INTAKE_END_S = 2.0
BUSY_LIMIT_S = 30.0


class FlushLoop:
    """`interval` is seconds between two cycles; `intake_ended` is set when no more messages come."""

    def __init__(
        self,
        *,
        lease: Lease,
        flusher: Flusher,
        pending: Pending,
        sweep: Sweep,
        announced: Announced,
        intake_ended: asyncio.Event,
        quarantine: Quarantine,
        keys: Keys,
        status: Status,
        metrics: Metrics,
        clock: Clock,
        interval: float,
        batch_size: BatchSize,
    ) -> None:
        self._lease = lease
        self._clock = clock
        self._flusher = flusher
        self._pending = pending
        self._sweep = sweep
        self._announced = announced
        self._intake_ended = intake_ended
        self._quarantine = quarantine
        self._keys = keys
        self._status = status
        self._metrics = metrics
        self._interval = interval
        self._batch_size = batch_size
        self._backoff = Backoff(first=0.2, cap=10.0)
        self._wake = asyncio.Event()
        self._busy_since: float | None = None
        metrics.pending_keys.set_function(lambda: len(pending))
        metrics.oldest_pending_seconds.set_function(pending.oldest_seconds)
        metrics.quarantined_keys.set_function(lambda: len(quarantine))

    async def run(self, stop: asyncio.Event) -> None:
        """While this worker holds the lease: flush every interval until `stop`, and once more after it."""
        self._status.expect_beat(CHECK, within=STEP_LIMIT_S)
        while not stop.is_set():
            if await self._wait_for_work(stop):
                self._wake.clear()
                delay = await self._guarded_cycle()
                self._status.expect_beat(CHECK, within=delay + STEP_LIMIT_S)
                await wait_first(delay, stop, self._wake, self._lease.changed)
        self._status.expect_beat(CHECK, within=STEP_LIMIT_S)
        await self._drain()

    async def _drain(self) -> None:
        if not self._status.is_ok(*NEEDS):
            log.warning("stopping without a last flush: pending views stay in Redis")
        elif self._lease.epoch is not None:
            await wait_first(INTAKE_END_S, self._intake_ended)
            self._sweep.request()
            await self._guarded_cycle(draining=True)
            await self._release_lease()
        if self._announced:
            log.warning("views that were only published are lost", ids=len(self._announced))

    def sweep_soon(self) -> None:
        """Something may have been missed, or Redis holds other keys than before: look at once."""
        self._sweep.request()
        self._wake.set()

    def flush_soon(self) -> None:
        """More is waiting than should wait for the interval."""
        self._wake.set()

    async def cycle(self, *, draining: bool = False) -> Flushed | Busy | Hold:
        """Sweep if it is due, then flush until nothing is pending. Raises Unavailable.

        When `draining`, what is known is flushed before more is looked for: there may not be time for all of it.
        """
        total = Flushed()
        self._add_announced()
        if draining and self._pending:
            outcome = await self._flush_pending()
            if not isinstance(outcome, Flushed):
                return outcome
            total += outcome
        if self._sweep.is_due:
            async for page in self._sweep.pages():
                self._status.expect_beat(CHECK, within=STEP_LIMIT_S)
                self._add(page)
                if self._pending and (draining or self._is_overdue()):
                    outcome = await self._flush_pending()
                    if not isinstance(outcome, Flushed):
                        return outcome
                    total += outcome
            self._quarantine.next_sweep()
        outcome = await self._flush_pending()
        return total + outcome if isinstance(outcome, Flushed) else outcome

    def _is_overdue(self) -> bool:
        """Whether flushing should not wait for the end of the sweep."""
        return len(self._pending) >= PENDING_LIMIT or self._pending.oldest_seconds() >= self._interval

    async def _flush_pending(self) -> Flushed | Busy | Hold:
        """Flush until nothing is pending, and then nothing: that finds out whether Redis and Postgres still agree,
        and confirms that the last flush is settled."""
        total = Flushed()
        while True:
            self._status.expect_beat(CHECK, within=STEP_LIMIT_S)
            ids = self._pending.oldest(self._batch_size.keys)
            began = self._clock.monotonic()
            outcome = await self._flusher.flush(ids)
            if not isinstance(outcome, Flushed):
                return outcome
            self._status.ok(CHECK, role="working")
            if not ids:
                self._metrics.last_agreement.set_to_current_time()
                return total
            self._pending.remove(ids)
            self._batch_size.flushed(self._clock.monotonic() - began, left=len(self._pending))
            total += outcome

    def _add_announced(self) -> None:
        resting = self._quarantine.is_resting
        self._pending.add(vod_id for vod_id in self._announced.ids() if not resting(self._keys.counter(vod_id)))

    def _add(self, page: list[bytes]) -> None:
        ids = []
        for key in page:
            if self._quarantine.is_resting(key):
                continue
            try:
                ids.append(self._keys.vod_id(key))
            except InvalidId as error:
                self._quarantine.report(key, str(error))
        self._pending.add(ids)

    async def _guarded_cycle(self, *, draining: bool = False) -> float:
        """Run one cycle and report how it went. Returns the seconds to wait before the next."""
        try:
            outcome = await self.cycle(draining=draining)
        except Exception as error:
            return self._failed(error)
        self._backoff.reset()
        self._metrics.holds.set(isinstance(outcome, Hold))
        if isinstance(outcome, Busy):
            return self._kept_out()
        self._busy_since = None
        if isinstance(outcome, Hold):
            self._status.hold(CHECK, outcome.cause, outcome.remedy)
        return self._interval

    def _kept_out(self) -> float:
        now = self._clock.monotonic()
        self._busy_since = self._busy_since or now
        if now - self._busy_since > BUSY_LIMIT_S and self._lease.epoch is not None:
            self._status.failing(
                CHECK,
                "another session keeps the row in view_count_sources locked",
                "Find it in pg_locks and pg_stat_activity, and end it.",
            )
        return BUSY_RETRY_S * random.uniform(0.5, 1.5)

    def _failed(self, error: Exception) -> float:
        self._metrics.flush_failures.inc()
        self._batch_size.failed()
        cause = cause_of(error)
        remedy = error.remedy if isinstance(error, ViewerWorkerError) else UNEXPECTED
        # What heals by waiting is told in a line. Anything else needs the traceback, but not at every try.
        unexpected = not isinstance(error, Unavailable) and cause != self._status.checks[CHECK].cause
        log.error("flush failed", cause=cause, exc_info=error if unexpected else None)
        self._status.failing(CHECK, cause, remedy)
        return self._backoff.next()

    async def _wait_for_work(self, stop: asyncio.Event) -> bool:
        """True as soon as both servers can be used and the lease is held; False when stopped before that."""
        if self._may_work():
            return True
        while not self._may_work() and not stop.is_set():
            if self._status.is_ok(*NEEDS):
                self._metrics.holds.set(0)
                self._status.ok(CHECK, role="standing by")
            self._status.expect_beat(CHECK, within=STEP_LIMIT_S)
            await wait_first(5.0, stop, self._status.changed, self._lease.changed)
        # Whoever held the lease before knew what was pending; this worker does not.
        self._pending.clear()
        self._sweep.request()
        return not stop.is_set()

    def _may_work(self) -> bool:
        return self._status.is_ok(*NEEDS) and self._lease.epoch is not None

    async def _release_lease(self) -> None:
        try:
            await self._lease.release()
        except (Unavailable, DatabaseRefused) as error:
            log.warning("lease not released, it will expire", cause=str(error))


UNEXPECTED = "Nothing is lost: the views stay in Redis. The log has the details."
