"""One flush: commit the pending views of some ids to Postgres, then settle them in Redis. See docs/protocol.md."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.counters.flush.commit import Committed, Disagreed, NothingPending
from worker.counters.flush.outcome import Busy, Flushed, FlushOutcome
from worker.db.errors import LOCK_NOT_AVAILABLE, is_refused_data, sqlstate
from worker.errors import DatabaseRefused, DatabaseUnavailable
from worker.observability.logs import get_logger
from worker.observability.printable import excerpt
from worker.runtime.bisect import bisect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.counters.flush.commit import Committer
    from worker.counters.flush.recovery import Recovery
    from worker.counters.flush.settle import Settler
    from worker.counters.flush.totals import TotalsChannel
    from worker.counters.intake.quarantine import Quarantine
    from worker.counters.stores import Stores
    from worker.observability.metrics import Metrics
    from worker.runtime.clock import Clock

log = get_logger(__name__)

# A flush that finds the marker moved starts over. More often than this in a row: other workers are moving it.
MAX_ROUNDS = 8
LOCKS_LIMIT_S = 60.0
# Deadlock, serialization failure: Postgres chose this transaction as the victim; it may be tried again at once.
COLLISIONS = ("40P01", "40001")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flusher:
    """Commits, then settles; where Redis and Postgres disagree, it first brings them together."""

    stores: Stores
    committer: Committer
    settler: Settler
    recovery: Recovery
    quarantine: Quarantine
    totals: TotalsChannel
    metrics: Metrics
    clock: Clock

    async def flush(self, ids: Sequence[str]) -> FlushOutcome:
        """Flush the pending views of `ids` (sorted, no repeats). With no ids, only compare Redis and Postgres.

        Ids that Postgres refuses are quarantined; ids whose row another session has locked wait for the next sweep;
        the others are flushed. Raises Unavailable, also when locks let nothing through for a minute: then the whole
        table is locked. The next flush finds out what was done before the error.
        """
        total, began = Flushed(), self.clock.monotonic()

        def concerns_an_id(error: Exception) -> bool:
            if _is_locked(error):
                return self.clock.monotonic() - began <= LOCKS_LIMIT_S
            return isinstance(error, DatabaseRefused | DatabaseUnavailable) and is_refused_data(error)

        try:
            async with aclosing(bisect(ids, self._flush, concerns_an_id, self._skip_id)) as outcomes:
                async for outcome in outcomes:
                    if not isinstance(outcome, Flushed):
                        return outcome
                    total += outcome
        except (DatabaseRefused, DatabaseUnavailable) as error:
            if total.flush_id is None or not _is_locked(error):
                raise
            log.warning("flush incomplete: rows locked", keys=len(ids) - total.keys)
        return total

    async def _flush(self, ids: Sequence[str]) -> FlushOutcome:
        started = self.clock.monotonic()
        for _ in range(MAX_ROUNDS):
            try:
                step = await self.committer.commit(ids)
            except DatabaseUnavailable as error:
                if sqlstate(error) not in COLLISIONS:
                    raise
                log.warning("flush collided with another transaction", cause=str(error))
                continue
            match step:
                case Committed():
                    if await self.settler.settle(step.before, step.marker, step.flush.counted):
                        return await self._finished(step, started)
                    # Settled by a replay, or Redis is another one now: look again, at these ids and at the marker.
                case NothingPending():
                    return Flushed()
                case Busy():
                    return step
                case Disagreed(verdict, row):
                    if (hold := await self.recovery.resolve(verdict, row)) is not None:
                        return hold
        return Busy()

    def _skip_id(self, vod_id: str, error: Exception) -> None:
        key = self.stores.keys.counter(vod_id)
        if _is_locked(error):
            log.warning("flush incomplete: row locked", key=excerpt(key))
        else:
            self.quarantine.report(key, str(error), rest=True)

    async def _finished(self, committed: Committed, started: float) -> Flushed:
        flush, seconds = committed.flush, self.clock.monotonic() - started
        keys, views = len(flush.ids), sum(change.views for change in committed.changes)
        self.metrics.flush_seconds.observe(seconds)
        log.info("batch flushed", flush_id=flush.flush_id, keys=keys, views=views, duration_s=round(seconds, 4))
        await self.totals.publish(flush.flush_id, committed.changes)
        return Flushed(flush.flush_id, keys, views)


def _is_locked(error: Exception) -> bool:
    return isinstance(error, DatabaseUnavailable | DatabaseRefused) and sqlstate(error) == LOCK_NOT_AVAILABLE
