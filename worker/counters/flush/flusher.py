"""One flush: commit the pending views of some ids to Postgres, then settle them in Redis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from worker.counters.flush.marker import Marker
from worker.counters.flush.recovery import Agreed, Hold, judge
from worker.counters.intake.quarantine import printable
from worker.db.counters.ledger import Flush
from worker.db.errors import LOCK_NOT_AVAILABLE, is_refused_data, sqlstate
from worker.errors import DatabaseRefused, DatabaseUnavailable
from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from worker.contract.keys import Keys
    from worker.counters.flush.reading import CounterReader, Reading
    from worker.counters.flush.recovery import Recovery
    from worker.counters.flush.settle import Settler
    from worker.counters.flush.totals import TotalsChannel
    from worker.counters.intake.announced import Announced
    from worker.counters.intake.quarantine import Quarantine
    from worker.db.counters.ledger import Change, Ledger
    from worker.db.counters.source_row import Source, SourceRow
    from worker.db.lease import Lease
    from worker.db.session import Database, Transaction
    from worker.db.target.table import TargetTable
    from worker.observability.metrics import Metrics
    from worker.redis.client import RedisClient
    from worker.runtime.clock import Clock

log = get_logger(__name__)

# A flush that finds the marker moved starts over. More often than this in a row means that others are at work.
MAX_ROUNDS = 8
LOCKS_LIMIT_S = 60.0
# Deadlock, serialization failure: this transaction was sacrificed for another, and may be tried again at once.
COLLISIONS = ("40P01", "40001")


@dataclass(frozen=True, slots=True)
class Flushed:
    """All pending views of the given ids are in Postgres. `flush_id` is None when there were none."""

    flush_id: int | None = None
    keys: int = 0
    views: int = 0

    def __add__(self, other: Flushed) -> Flushed:
        return Flushed(other.flush_id or self.flush_id, self.keys + other.keys, self.views + other.views)


@dataclass(frozen=True, slots=True)
class Busy:
    """Another worker has the lease or the lock, or keeps moving the marker. Try again in about a second."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A flush that is in Postgres and still has to be settled. `skipped`: views the target was not given, by reason."""

    before: Marker
    flush: Flush
    changes: list[Change]
    skipped: Mapping[str, int]

    @property
    def marker(self) -> Marker:
        return Marker(self.before.lineage, self.flush.flush_id, self.flush.nonce)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flusher:
    """Commit, then settle (docs/protocol.md). The row lock on the source is the fence; no clock is involved."""

    database: Database
    ledger: Ledger
    source_row: SourceRow
    target: TargetTable | None
    lease: Lease
    redis: RedisClient
    keys: Keys
    announced: Announced
    reader: CounterReader
    settler: Settler
    recovery: Recovery
    quarantine: Quarantine
    totals: TotalsChannel
    metrics: Metrics
    clock: Clock

    async def flush(self, ids: Sequence[str]) -> Flushed | Busy | Hold:
        """Flush the pending views of `ids` (sorted, no repeats). With no ids, only compare Redis and Postgres.

        Ids that Postgres refuses are quarantined, ids whose row somebody has locked are left for the next sweep; the
        others are flushed. Raises Unavailable, also when locks let nothing at all through for a minute: then it is the
        whole table. Whatever was or was not done by then, the next flush finds out.
        """
        total, parts, began = Flushed(), [ids], self.clock.monotonic()
        while parts:
            part = parts.pop()
            try:
                outcome = await self._flush(part)
            except (DatabaseRefused, DatabaseUnavailable) as error:
                locked = sqlstate(error) == LOCK_NOT_AVAILABLE
                if not part or not (locked or is_refused_data(error)):
                    raise
                if locked and self.clock.monotonic() - began > LOCKS_LIMIT_S:
                    if total.flush_id is None:
                        raise
                    log.warning("left pending, locks are in the way", keys=len(part) + sum(map(len, parts)))
                    return total
                if len(part) == 1:
                    self._leave(part[0], error, locked=locked)
                else:
                    half = len(part) // 2
                    parts += part[half:], part[:half]
                continue
            if not isinstance(outcome, Flushed):
                return outcome
            total += outcome
        return total

    async def _flush(self, ids: Sequence[str]) -> Flushed | Busy | Hold:
        started = self.clock.monotonic()
        for _ in range(MAX_ROUNDS):
            try:
                step = await self._commit(ids)
            except DatabaseUnavailable as error:
                if sqlstate(error) not in COLLISIONS:
                    raise
                log.warning("flush collided with another transaction", cause=str(error))
                continue
            if isinstance(step, Committed):
                if await self.settler.settle(step.before, step.marker, step.flush.counted):
                    return await self._finished(step, started)
                # Settled by a replay, or Redis is another one by now: look again, for these ids and for the marker.
            elif step is not None:
                return step
        return Busy()

    def _leave(self, vod_id: str, error: Exception, *, locked: bool) -> None:
        key = self.keys.counter(vod_id)
        if locked:
            log.warning("left pending, its row is locked", key=printable(key))
        else:
            self.quarantine.report(key, str(error), rest=True)

    async def _commit(self, ids: Sequence[str]) -> Committed | Flushed | Busy | Hold | None:
        """Commit one flush, or do what the marker asks for first (None: done, start over)."""
        # Before the lock is taken: a worker that is cut off from Redis must not keep it from one that is not.
        identity = self.keys.identity(await self.redis.probe())
        committed: Committed | None = None
        async with self.database.transaction() as tx:
            source = await self.source_row.lock(tx)
            if source is None:
                return Busy()
            if not self.lease.covers(source):
                self.lease.lost()
                return Busy()
            self.announced.confirm(source.announced_nonce)
            # Before Redis is read: the INCR of a view comes before its message, so it is in what is read then.
            announced = self.announced.copy(ids, source.lease_epoch)
            reading = await self.reader.read(ids)
            verdict = judge(reading.marker, source)
            if isinstance(verdict, Agreed):
                committed = await self._record(tx, source, verdict.marker, reading, announced, identity)
            elif isinstance(verdict, Hold) and verdict.refused not in (None, source.refused):
                await self.source_row.refuse(tx, str(verdict.refused))
        if committed is not None:
            self.announced.confirm(committed.flush.nonce)
            self._measure(committed)
        await self.reader.report(reading, announced)
        if isinstance(verdict, Agreed):
            return committed or Flushed()
        return await self.recovery.resolve(verdict, source)

    async def _record(
        self,
        tx: Transaction,
        source: Source,
        before: Marker,
        reading: Reading,
        announced: dict[str, int],
        identity: str | None,
    ) -> Committed | None:
        """Write what was read, in the transaction that holds the lock. None when there is nothing to take."""
        counted = reading.counted
        if self.target is not None and (ids := sorted(counted.keys() | announced.keys())):
            for vod_id in await self._locked(tx, self.target, ids):
                counted.pop(vod_id, None)
                announced.pop(vod_id, None)
        if not counted and not announced:
            if source.settled_id < source.last_flush_id or source.refused is not None:
                await self.source_row.confirm(tx)
            return None
        flush = Flush(source.last_flush_id + 1, uuid4(), before.nonce, counted, announced)
        changes = await self.ledger.record(tx, flush)
        skipped = await self.target.add(tx, changes) if self.target is not None else {}
        # The marker, read under this lock, named the flush before: that one is settled.
        await self.source_row.advance(
            tx,
            flush_id=flush.flush_id,
            nonce=flush.nonce,
            settled=source.last_flush_id,
            announced_nonce=flush.nonce if announced else None,
            identity=identity,
        )
        self.announced.sending(flush.nonce, announced)
        return Committed(before, flush, changes, skipped)

    async def _locked(self, tx: Transaction, target: TargetTable, ids: Sequence[str]) -> set[str]:
        """Ids whose row in the application's table somebody has locked: they are left for the next flush."""
        locked = await target.lock_rows(tx, ids)
        if locked:
            log.info("left pending, their rows are locked", table=str(target.names), keys=len(locked))
        return locked

    def _measure(self, committed: Committed) -> None:
        """Right after the commit: a settle that fails is made up for by a replay, which knows nothing of this."""
        self.metrics.flushes.inc()
        self.metrics.flushed_views.inc(sum(change.views for change in committed.changes))
        for reason, skipped in committed.skipped.items():
            self.metrics.target_skipped.labels(reason).inc(skipped)

    async def _finished(self, committed: Committed, started: float) -> Flushed:
        flush, seconds = committed.flush, self.clock.monotonic() - started
        keys, views = len(flush.ids), sum(change.views for change in committed.changes)
        self.metrics.flush_seconds.observe(seconds)
        log.info("batch flushed", flush_id=flush.flush_id, keys=keys, views=views, duration_s=round(seconds, 4))
        await self.totals.publish(flush.flush_id, committed.changes)
        return Flushed(flush.flush_id, keys, views)
