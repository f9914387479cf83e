"""The loop of the view counters: sweep, flush until nothing is pending, wait, repeat. Read this first."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from worker.counters.flush.outcome import Busy, Flushed, FlushOutcome
from worker.counters.flush.verdict import Hold
from worker.errors import DatabaseRefused, Unavailable, ViewerWorkerError, cause_of
from worker.observability.logs import get_logger
from worker.observability.status import SERVERS, STEP_LIMIT_S, VIEW_COUNTS
from worker.runtime.backoff import Backoff
from worker.runtime.waiting import wait_first

if TYPE_CHECKING:
    from worker.counters.flush.batch_size import BatchSize
    from worker.counters.flush.flusher import Flusher
    from worker.counters.history import RollUp
    from worker.counters.intake.backlog import Backlog
    from worker.counters.standby import Standby
    from worker.db.lease import Lease
    from worker.observability.metrics import Metrics
    from worker.observability.status import Status
    from worker.runtime.clock import Clock

log = get_logger(__name__)

BUSY_RETRY_S = 1.0
BUSY_LIMIT_S = 30.0
# A worker that fails for longer than this lets another try.
FAILING_LIMIT_S = 60.0
STANDBY_LOOK_S = 10.0
UNEXPECTED = "Nothing is lost: the views stay in Redis. The log has the details."


class FlushLoop:
    """`interval` is seconds between two cycles.

    After the stop it waits up to `drain_timeout` seconds for the last messages.
    """

    def __init__(
        self,
        *,
        lease: Lease[int],
        backlog: Backlog,
        flusher: Flusher,
        roll_up: RollUp,
        standby: Standby,
        batch_size: BatchSize,
        interval: float,
        drain_timeout: float,
        status: Status,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._lease = lease
        self._backlog = backlog
        self._flusher = flusher
        self._roll_up = roll_up
        self._standby = standby
        self._batch_size = batch_size
        self._interval = interval
        self._drain_timeout = drain_timeout
        self._status = status
        self._metrics = metrics
        self._clock = clock
        self._backoff = Backoff(first=0.2, cap=10.0)
        self._look_again = Backoff(first=1.0, cap=30.0)
        self._wake = asyncio.Event()
        self._busy_since: float | None = None
        self._failing_since: float | None = None
        # On hold, or failing for long: another worker may have another Redis, or other rights.
        self._lets_others_try = False
        # What this worker sees while another has the lease.
        self._seen: Hold | None = None
        metrics.pending_keys.set_function(backlog.count)
        metrics.oldest_pending_seconds.set_function(backlog.oldest_seconds)
        metrics.quarantined_keys.set_function(lambda: len(backlog.quarantine))

    async def run(self, stop: asyncio.Event) -> None:
        """While this worker holds the lease: flush every interval until `stop`, and once more after it."""
        self._status.expect_beat(VIEW_COUNTS, within=STEP_LIMIT_S)
        while not stop.is_set():
            if await self._wait_for_lease(stop):
                delay = await self._guarded_cycle()
                if self._lets_others_try:
                    await self._yield_lease(stop)
                    continue
                self._status.expect_beat(VIEW_COUNTS, within=delay + STEP_LIMIT_S)
                await wait_first(delay, stop, self._wake, self._lease.changed)
        self._status.expect_beat(VIEW_COUNTS, within=STEP_LIMIT_S)
        await self._drain()

    async def _drain(self) -> None:
        announced = self._backlog.announced
        if not self._status.is_ok(*SERVERS):
            log.warning("stopping without a last flush: pending views stay in Redis")
        elif self._lease.token is not None:
            await wait_first(self._drain_timeout, announced.ended)
            self._backlog.sweep.request()
            await self._guarded_cycle(draining=True)
            await self._release_lease()
        if announced:
            log.warning("views that were only published are lost", ids=len(announced))

    def sweep_soon(self) -> None:
        """Look at once: messages may have been missed, or Redis has other keys than before."""
        self._backlog.sweep.request()
        self._wake.set()

    def flush_soon(self) -> None:
        """Do not wait for the interval: much is pending."""
        self._wake.set()

    async def cycle(self, *, draining: bool = False) -> FlushOutcome:
        """Sweep if it is due, flush until nothing is pending, then bring the history up to date. Raises Unavailable.

        When `draining`, flush the known ids before the sweep: there may not be time for all.
        """
        total = Flushed()
        self._wake.clear()
        await self._backlog.add_announced()
        if draining and self._backlog.pending:
            outcome = await self._flush_pending()
            if not isinstance(outcome, Flushed):
                return outcome
            total += outcome
        async for _ in self._backlog.sweep_pages():
            self._status.expect_beat(VIEW_COUNTS, within=STEP_LIMIT_S)
            if self._backlog.pending and (draining or self._backlog.is_overdue(self._interval)):
                outcome = await self._flush_pending()
                if not isinstance(outcome, Flushed):
                    return outcome
                total += outcome
        outcome = await self._flush_pending()
        if not isinstance(outcome, Flushed):
            return outcome
        await self._roll_up.catch_up(self._is_calm)
        return total + outcome

    def _is_calm(self) -> bool:
        """Views to flush come before the history."""
        self._status.expect_beat(VIEW_COUNTS, within=STEP_LIMIT_S)
        return not self._wake.is_set()

    async def _flush_pending(self) -> FlushOutcome:
        """Flush until nothing is pending, then flush nothing: that compares Redis with Postgres, and confirms that the
        last flush is settled."""
        total, pending = Flushed(), self._backlog.pending
        while True:
            self._status.expect_beat(VIEW_COUNTS, within=STEP_LIMIT_S)
            ids = pending.oldest(self._batch_size.keys)
            began = self._clock.monotonic()
            if ids:
                self._roll_up.may_be_behind()
            outcome = await self._flusher.flush(ids)
            if not isinstance(outcome, Flushed):
                return outcome
            self._status.ok(VIEW_COUNTS, role="working")
            if not ids:
                self._metrics.last_agreement.set_to_current_time()
                return total
            pending.remove(ids)
            self._batch_size.flushed(self._clock.monotonic() - began, left=len(pending))
            total += outcome

    async def _guarded_cycle(self, *, draining: bool = False) -> float:
        """Run one cycle and report its outcome. Returns the seconds to wait before the next."""
        try:
            outcome = await self.cycle(draining=draining)
        except Exception as error:
            return self._failed(error)
        self._backoff.reset()
        self._failing_since = None
        self._lets_others_try = isinstance(outcome, Hold)
        self._metrics.holds.set(self._lets_others_try)
        if isinstance(outcome, Busy):
            return self._on_busy()
        self._busy_since = None
        if isinstance(outcome, Hold):
            self._status.hold(VIEW_COUNTS, outcome.cause, outcome.remedy)
        else:
            self._look_again.reset()
        return self._interval

    def _on_busy(self) -> float:
        now = self._clock.monotonic()
        self._busy_since = self._busy_since or now
        if now - self._busy_since > BUSY_LIMIT_S and self._lease.token is not None:
            self._status.failing(
                VIEW_COUNTS,
                "another session keeps the row in view_count_sources locked",
                "Find it in pg_locks and pg_stat_activity, and end it.",
            )
        return BUSY_RETRY_S * random.uniform(0.5, 1.5)

    def _failed(self, error: Exception) -> float:
        self._metrics.flush_failures.inc()
        self._batch_size.failed()
        cause = cause_of(error)
        remedy = error.remedy if isinstance(error, ViewerWorkerError) else UNEXPECTED
        # One line is enough where a retry may succeed. Anything else needs its traceback, but not at every try.
        unexpected = not isinstance(error, Unavailable) and cause != self._status.checks[VIEW_COUNTS].cause
        log.error("flush failed", cause=cause, exc_info=error if unexpected else None)
        self._status.failing(VIEW_COUNTS, cause, remedy)
        now = self._clock.monotonic()
        self._failing_since = self._failing_since or now
        self._lets_others_try = now - self._failing_since > FAILING_LIMIT_S
        return self._backoff.next()

    async def _yield_lease(self, stop: asyncio.Event) -> None:
        """Let another replica try, and look again after a while."""
        delay = self._look_again.next()
        await self._release_lease(pause=True)
        self._status.expect_beat(VIEW_COUNTS, within=delay + STEP_LIMIT_S)
        await wait_first(delay, stop)
        self._lease.resume()

    async def _wait_for_lease(self, stop: asyncio.Event) -> bool:
        """True as soon as the lease is held and both servers can be used; False when stopped before that."""
        if self._lease.is_usable:
            return True
        self._roll_up.stand_by()
        looking = asyncio.create_task(self._look_on(), name="standby")
        try:
            held = await self._lease.wait(stop, VIEW_COUNTS, self._standing_by)
        finally:
            looking.cancel()
            await asyncio.wait({looking})
            self._seen = None
        # The former holder of the lease knew what was pending; this worker does not.
        self._backlog.restart()
        if held:
            self._roll_up.may_be_behind()
        return held

    async def _look_on(self) -> None:
        """While this worker stands by, see whether the one with the lease flushes the same Redis."""
        while True:
            if self._status.is_ok(*SERVERS):
                try:
                    self._seen = await self._standby.look()
                except (Unavailable, DatabaseRefused) as error:
                    log.debug("standby could not look", cause=str(error))
            await asyncio.sleep(STANDBY_LOOK_S)

    def _standing_by(self, holder: str) -> None:
        # Pending keys are the holder's to flush: this worker no longer knows of any.
        self._backlog.restart()
        if self._seen is not None:
            self._metrics.holds.set(1)
            self._status.hold(VIEW_COUNTS, self._seen.cause, self._seen.remedy)
        # Between two looks at a hold the lease is free, and another replica may have it: for one look, or to keep it.
        elif not self._lets_others_try or self._lease.is_kept_elsewhere:
            self._metrics.holds.set(0)
            self._status.ok(VIEW_COUNTS, role="standing by", holder=holder)

    async def _release_lease(self, *, pause: bool = False) -> None:
        try:
            await self._lease.release(pause=pause)
        except (Unavailable, DatabaseRefused) as error:
            log.warning("lease not released, it will expire", cause=str(error))
