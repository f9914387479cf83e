"""One flush: commit the pending views of some ids to Postgres, then settle them in Redis. See docs/protocol.md."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from worker.counters.flush.commit import Committed, Disagreed, NothingPending
from worker.counters.flush.outcome import Busy, Flushed, FlushOutcome
from worker.db.errors import COLLISIONS, LOCK_NOT_AVAILABLE, QUERY_CANCELED, ErrorClass, classify, sqlstate
from worker.errors import DatabaseRefused, DatabaseUnavailable, TableRefused
from worker.observability.logs import get_logger
from worker.observability.printable import excerpt
from worker.runtime.bisect import bisect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.counters.flush.batch_size import BatchSize
    from worker.counters.flush.commit import Committer
    from worker.counters.flush.recovery import Recovery
    from worker.counters.flush.settle import Settler
    from worker.counters.flush.totals import TotalsChannel
    from worker.counters.flush.trial import Trial
    from worker.counters.intake.quarantine import Quarantine
    from worker.counters.stores import Stores
    from worker.observability.metrics import Metrics
    from worker.runtime.clock import Clock

log = get_logger(__name__)

# A flush that finds the marker moved starts over. More often than this in a row: other workers are moving it.
MAX_ROUNDS = 8
# Ids that wait for locks, or that take too long, hold up the others so long.
HOLDUP_LIMIT_S = 60.0


@dataclass(slots=True)
class _Progress:
    """`began`: monotonic seconds. `tables_work`: they took an id, so an id that they refuse has a fault of its own."""

    began: float
    done: Flushed = field(default_factory=Flushed)
    tables_work: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Flusher:
    """Commits, then settles; where Redis and Postgres disagree, it first brings them together."""

    stores: Stores
    committer: Committer
    settler: Settler
    recovery: Recovery
    trial: Trial
    batch_size: BatchSize
    quarantine: Quarantine
    totals: TotalsChannel
    metrics: Metrics
    clock: Clock

    async def flush(self, ids: Sequence[str]) -> FlushOutcome:
        """Flush the pending views of `ids` (sorted, no repeats). With no ids, only compare Redis and Postgres.

        Ids that Postgres refuses, or that take too long even alone, are quarantined; ids whose row another session has
        locked wait for the next sweep; the others are flushed. Raises TableRefused when the tables refuse every id;
        Unavailable, also when nothing gets through for a minute. The next flush finds out what was done before the
        error.
        """
        progress = _Progress(self.clock.monotonic())

        async def attempt(part: Sequence[str]) -> FlushOutcome:
            return await self._attempt(part, progress)

        def concerns_an_id(error: Exception) -> bool:
            if _is_held_up(error):
                return self.clock.monotonic() - progress.began <= HOLDUP_LIMIT_S
            return isinstance(error, DatabaseRefused) and classify(error, ()) is ErrorClass.ROW

        try:
            async with aclosing(bisect(ids, attempt, concerns_an_id, self._skip_id)) as outcomes:
                async for outcome in outcomes:
                    if not isinstance(outcome, Flushed):
                        return outcome
                    progress.done += outcome
        except (DatabaseRefused, DatabaseUnavailable) as error:
            if progress.done.flush_id is None or not _is_held_up(error):
                raise
            log.warning("flush incomplete", keys=len(ids) - progress.done.keys, cause=str(error))
        return progress.done

    async def _attempt(self, ids: Sequence[str], progress: _Progress) -> FlushOutcome:
        """Flush, and where a single id fails before any other was flushed, find out whether it is the cause."""
        try:
            outcome = await self._flush(ids)
        except (DatabaseRefused, DatabaseUnavailable) as error:
            # No value that we write is NULL, so a missing one is of a column that we do not know.
            kind, too_slow = classify(error, ()), sqlstate(error) == QUERY_CANCELED
            if isinstance(error, DatabaseRefused) and kind is ErrorClass.HOLD:
                raise TableRefused(str(error)) from error
            if too_slow and ids:
                self.batch_size.timed_out(len(ids))
            if len(ids) == 1 and (too_slow or kind is ErrorClass.ROW) and not progress.tables_work:
                if (busy := await self.trial.run(ids[0])) is not None:
                    return busy
                progress.tables_work = True
            raise
        if isinstance(outcome, Flushed) and outcome.flush_id is not None:
            progress.tables_work = True
        return outcome

    async def _flush(self, ids: Sequence[str]) -> FlushOutcome:
        started = self.clock.monotonic()
        for attempts_left in reversed(range(MAX_ROUNDS)):
            try:
                step = await self.committer.commit(ids)
            except DatabaseUnavailable as error:
                if sqlstate(error) not in COLLISIONS or attempts_left == 0:
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
        if sqlstate(error) == LOCK_NOT_AVAILABLE:
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


def _is_held_up(error: Exception) -> bool:
    """True when a statement waited for a lock, or took, for too long: a smaller flush may get through."""
    return isinstance(error, DatabaseUnavailable | DatabaseRefused) and sqlstate(error) in (
        LOCK_NOT_AVAILABLE,
        QUERY_CANCELED,
    )
