"""One flush: commit the pending views of some ids to Postgres, then settle them in Redis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import uuid4

from sqlalchemy.exc import SQLAlchemyError

from worker.counters.keys import parse_count
from worker.counters.lease import TTL
from worker.counters.marker import Marker
from worker.counters.quarantine import printable
from worker.counters.recovery import Agreed, Behind, Hold, Missing, Verdict, judge
from worker.db.errors import describe, sqlstate
from worker.db.ledger import Flush
from worker.errors import DatabaseUnavailable
from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from worker.clock import Clock
    from worker.counters.keys import Keys
    from worker.counters.lease import Lease
    from worker.counters.quarantine import Quarantine
    from worker.counters.recovery import Recovery
    from worker.counters.settle import Settler
    from worker.db.ledger import Ledger
    from worker.db.session import Database
    from worker.db.sources import Source, SourceRow
    from worker.observability.metrics import Metrics
    from worker.redis.client import RedisClient

log = get_logger(__name__)

# A flush that finds the marker moved starts over. More often than this in a row means that others are at work.
MAX_ROUNDS = 8
LONG_VALUE = 100
# Data that the tables do not take: out of range, not in the database's encoding, against a constraint or trigger.
REFUSED_CLASSES = ("22", "23", "P0")
LOCK_NOT_AVAILABLE = "55P03"


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
    """A flush that is in Postgres and still has to be settled."""

    before: Marker
    marker: Marker
    flush: Flush


@dataclass(slots=True)
class Reading:
    """Marker and counters as Redis had them at one instant.

    `deltas`: what can be taken, id → views above zero. `unusable`: ids whose value is no count, id → bytes it has.
    `absent`: ids without a value, because they were settled or reset since they were found, or the key is no string.
    """

    marker: bytes | None
    deltas: dict[str, int] = field(default_factory=dict)
    unusable: dict[str, int] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flusher:
    """Commit, then settle (docs/protocol.md). The row lock on the source is the fence; no clock is involved."""

    database: Database
    ledger: Ledger
    source_row: SourceRow
    lease: Lease
    redis: RedisClient
    keys: Keys
    settler: Settler
    recovery: Recovery
    quarantine: Quarantine
    metrics: Metrics
    clock: Clock

    async def flush(self, ids: Sequence[str]) -> Flushed | Busy | Hold:
        """Flush the pending views of `ids` (sorted, no repeats). With no ids, only compare Redis and Postgres.

        Ids that Postgres refuses are quarantined, ids whose row somebody has locked are left for the next sweep; the
        others are flushed. Raises Unavailable. Whatever was or was not done by then, the next flush finds out.
        """
        try:
            return await self._flush(ids)
        except (SQLAlchemyError, DatabaseUnavailable) as error:
            state = sqlstate(error) or ""
            if not ids or not (state.startswith(REFUSED_CLASSES) or state == LOCK_NOT_AVAILABLE):
                raise
            if len(ids) == 1:
                self._leave(ids[0], error, locked=state == LOCK_NOT_AVAILABLE)
                return Flushed()
        half = len(ids) // 2
        first = await self.flush(ids[:half])
        if not isinstance(first, Flushed):
            return first
        second = await self.flush(ids[half:])
        return first + second if isinstance(second, Flushed) else second

    async def _flush(self, ids: Sequence[str]) -> Flushed | Busy | Hold:
        started = self.clock.monotonic()
        for _ in range(MAX_ROUNDS):
            step = await self._commit(ids)
            if isinstance(step, Committed):
                if await self.settler.settle(step.before, step.marker, step.flush.deltas):
                    return self._finished(step.flush, started)
                # Settled by a replay, or Redis is another one by now: look again, for these ids and for the marker.
            elif step is not None:
                return step
        return Busy()

    def _leave(self, vod_id: str, error: Exception, *, locked: bool) -> None:
        key = self.keys.counter(vod_id)
        if locked:
            log.warning("left pending, its row is locked", key=printable(key))
        else:
            self.quarantine.report(key, f"Postgres refuses it: {describe(error)}", rest=True)

    async def _commit(self, ids: Sequence[str]) -> Committed | Flushed | Busy | Hold | None:
        """Commit one flush, or do what the marker asks for first (None: done, start over)."""
        # Before the lock is taken: a worker that is cut off from Redis must not keep it from one that is not.
        identity = self.keys.identity(await self.redis.probe())
        flush: Flush | None = None
        async with self.database.transaction() as tx:
            source = await self.source_row.lock(tx)
            if source is None:
                return Busy()
            if not self.lease.covers(source):
                self.lease.lost()
                return Busy()
            reading = await self._read(ids)
            verdict = judge(reading.marker, source)
            if isinstance(verdict, Agreed):
                flush = await self._record(tx, source, reading, identity)
            elif isinstance(verdict, Hold) and verdict.refused not in (None, source.refused):
                await self.source_row.refuse(tx, str(verdict.refused))
        await self._report(reading)
        return await self._continue(verdict, source, flush)

    async def _record(
        self, tx: AsyncConnection, source: Source, reading: Reading, identity: str | None
    ) -> Flush | None:
        """Write what was read, in the transaction that holds the lock. None when there is nothing to take."""
        if not reading.deltas:
            if source.settled_id < source.last_flush_id or source.refused is not None:
                await self.source_row.confirm(tx)
            return None
        assert source.last_nonce is not None  # a marker that agrees names it  # noqa: S101
        flush = Flush(source.last_flush_id + 1, uuid4(), source.last_nonce, reading.deltas)
        await self.ledger.record(tx, flush)
        # The marker, read under this lock, named the flush before: that one is settled.
        settled = source.last_flush_id
        await self.source_row.advance(
            tx, flush_id=flush.flush_id, nonce=flush.nonce, settled=settled, replid=identity, ttl=TTL
        )
        return flush

    async def _continue(
        self, verdict: Verdict, source: Source, flush: Flush | None
    ) -> Committed | Flushed | Hold | None:
        match verdict:
            case Agreed(before):
                if flush is None:
                    return Flushed()
                return Committed(before, Marker(before.lineage, flush.flush_id, flush.nonce), flush)
            case Behind(marker):
                return await self.recovery.replay(marker, source.last_flush_id)
            case Missing():
                return await self.recovery.give_birth(source)
            case Hold():
                return verdict

    async def _read(self, ids: Sequence[str]) -> Reading:
        marker, *values = await self.redis.read([self.keys.marker, *map(self.keys.counter, ids)])
        reading = Reading(marker)
        for vod_id, value in zip(ids, values, strict=True):
            count = None if value is None else parse_count(value)
            if value is None:
                reading.absent.append(vod_id)
            elif count is None:
                reading.unusable[vod_id] = len(value)
            elif count > 0:
                reading.deltas[vod_id] = count
        return reading

    async def _report(self, reading: Reading) -> None:
        for vod_id, size in reading.unusable.items():
            # What is far too long for a number is not fetched again every time.
            self.quarantine.report(
                self.keys.counter(vod_id), "the value is not a whole number from 0 to 2^63-1", rest=size > LONG_VALUE
            )
        absent = [self.keys.counter(vod_id) for vod_id in reading.absent]
        for key, kind in zip(absent, await self.redis.types_of(absent) if absent else (), strict=True):
            if kind not in ("none", "string"):
                self.quarantine.report(key, f"the key holds a {kind}, not a number")

    def _finished(self, flush: Flush, started: float) -> Flushed:
        seconds = self.clock.monotonic() - started
        keys, views = len(flush.deltas), sum(flush.deltas.values())
        self.metrics.flushes.inc()
        self.metrics.flushed_views.inc(views)
        self.metrics.flush_seconds.observe(seconds)
        log.info("batch flushed", flush_id=flush.flush_id, keys=keys, views=views, duration_s=round(seconds, 4))
        return Flushed(flush.flush_id, keys, views)
