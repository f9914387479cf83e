"""One flush: commit the pending views of some ids to Postgres, then settle them in Redis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from worker.counters.keys import parse_count
from worker.counters.marker import Marker
from worker.counters.recovery import Agreed, Behind, Hold, Unborn, judge
from worker.db.ledger import Flush
from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.clock import Clock
    from worker.counters.keys import Keys
    from worker.counters.quarantine import Quarantine
    from worker.counters.recovery import Recovery
    from worker.counters.settle import Settler
    from worker.db.ledger import Ledger
    from worker.db.session import Database
    from worker.observability.metrics import Metrics
    from worker.redis.client import RedisClient

log = get_logger(__name__)

# A flush that finds the marker moved starts over. More often than this in a row means that others are at work.
MAX_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Flushed:
    """All pending views of the given ids are in Postgres. `flush_id` is None when there were none."""

    flush_id: int | None = None
    keys: int = 0
    views: int = 0


@dataclass(frozen=True, slots=True)
class Busy:
    """Another worker has the source locked, or keeps moving the marker. Try again in about a second."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A flush that is in Postgres and still has to be settled."""

    before: Marker
    marker: Marker
    flush: Flush


class Flusher:
    """Commit, then settle (docs/protocol.md). The row lock on the source is the fence; no clock is involved."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        redis: RedisClient,
        keys: Keys,
        settler: Settler,
        recovery: Recovery,
        quarantine: Quarantine,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._redis = redis
        self._keys = keys
        self._settler = settler
        self._recovery = recovery
        self._quarantine = quarantine
        self._metrics = metrics
        self._clock = clock

    async def flush(self, ids: Sequence[str]) -> Flushed | Busy | Hold:
        """Flush the pending views of `ids` (sorted, no repeats). With no ids, only compare Redis and Postgres.

        Raises Unavailable. Whatever was or was not done by then, the next flush finds out from marker and ledger.
        """
        started = self._clock.monotonic()
        for _ in range(MAX_ROUNDS):
            step = await self._commit(ids)
            if isinstance(step, Committed):
                if await self._settler.settle(step.before, step.marker, step.flush.deltas):
                    return self._finished(step.flush, started)
                # Settled by a replay, or Redis is another one by now: look again, for these ids and for the marker.
            elif step is not None:
                return step
        return Busy()

    async def _commit(self, ids: Sequence[str]) -> Committed | Flushed | Busy | Hold | None:
        """Commit one flush, or do what the marker asks for first (None: done, start over)."""
        # Before the lock is taken: a worker that is cut off from Redis must not keep it from one that is not.
        replid = await self._redis.probe()
        async with self._database.transaction() as tx:
            source = await self._ledger.lock_source(tx)
            if source is None:
                return Busy()
            raw_marker, *values = await self._redis.read(
                [self._keys.marker, *(self._keys.counter(vod_id) for vod_id in ids)]
            )
            verdict = judge(raw_marker, source)
            if isinstance(verdict, Agreed):
                deltas = self._deltas(ids, values)
                if not deltas:
                    return Flushed()
                flush = Flush(source.last_flush_id + 1, uuid4(), verdict.marker.nonce, deltas)
                await self._ledger.record(tx, source, flush, replid)
        match verdict:
            case Agreed(before):
                return Committed(before, Marker(before.lineage, flush.flush_id, flush.nonce), flush)
            case Behind(marker):
                return await self._recovery.replay(marker, source.last_flush_id)
            case Unborn():
                return await self._recovery.give_birth()
            case Hold():
                return verdict

    def _deltas(self, ids: Sequence[str], values: Sequence[bytes | None]) -> dict[str, int]:
        """What to take from each counter: above zero only, in the order of the ids."""
        deltas: dict[str, int] = {}
        for vod_id, value in zip(ids, values, strict=True):
            if value is None:
                continue
            count = parse_count(value)
            if count is None:
                self._quarantine.report(self._keys.counter(vod_id), "the value is not a whole number from 0 to 2^63-1")
            elif count > 0:
                deltas[vod_id] = count
        return deltas

    def _finished(self, flush: Flush, started: float) -> Flushed:
        seconds = self._clock.monotonic() - started
        keys, views = len(flush.deltas), sum(flush.deltas.values())
        self._metrics.flushes.inc()
        self._metrics.flushed_views.inc(views)
        self._metrics.flush_seconds.observe(seconds)
        log.info("batch flushed", flush_id=flush.flush_id, keys=keys, views=views, duration_s=round(seconds, 4))
        return Flushed(flush.flush_id, keys, views)
