"""The Postgres half of a flush: one transaction that writes what Redis has, and does not touch Redis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias
from uuid import uuid4

from worker.counters.flush.marker import Marker
from worker.counters.flush.outcome import Busy
from worker.counters.flush.verdict import Agreed, Hold, Verdict, compare
from worker.db.counters.ledger import Flush
from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from worker.counters.flush.agreement import Agreement
    from worker.counters.flush.reading import CounterReader, Reading
    from worker.counters.intake.announced import Announced
    from worker.counters.stores import Stores
    from worker.db.counters.ledger import Change
    from worker.db.counters.source_row import SourceState
    from worker.db.lease import Lease
    from worker.db.session import Transaction
    from worker.db.target.table import TargetTable
    from worker.observability.metrics import Metrics

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Committed:
    """A flush that is in Postgres and still has to be settled. `skipped`: reason → views not added to the target."""

    before: Marker
    flush: Flush
    changes: list[Change]
    skipped: Mapping[str, int]

    @property
    def marker(self) -> Marker:
        return self.before.after(self.flush)


@dataclass(frozen=True, slots=True)
class NothingPending:
    """Redis and Postgres agree, and none of the ids has a view to flush."""


@dataclass(frozen=True, slots=True)
class Disagreed:
    """Nothing was written: the verdict on this source row has to be resolved first."""

    verdict: Verdict
    row: SourceState


CommitOutcome: TypeAlias = Committed | NothingPending | Disagreed | Busy


@dataclass(frozen=True, slots=True, kw_only=True)
class Committer:
    """The row lock on the source row is the fence between workers; no clock is involved."""

    stores: Stores
    target: TargetTable | None
    lease: Lease[int]
    announced: Announced
    reader: CounterReader
    agreement: Agreement
    metrics: Metrics

    async def commit(self, ids: Sequence[str]) -> CommitOutcome:
        """Commit the pending views of `ids` as one flush. Raises Unavailable, DatabaseRefused."""
        # Before the lock is taken: a worker that is cut off from Redis must not keep the lock from one that is not.
        data_set_id = await self.stores.probe_data_set()
        committed: Committed | None = None
        async with self.stores.database.transaction() as tx:
            row = await self.stores.source_row.lock(tx)
            if row is None:
                return Busy()
            if not self.lease.covers(row.lease_holder, row.lease_epoch):
                self.lease.lost()
                return Busy()
            self.announced.resolve_sent(row.announced_nonce)
            # Before Redis is read: the INCR of a view precedes its message, so the read that follows includes it.
            announced = self.announced.copy(ids, row.lease_epoch)
            reading = await self.reader.read(ids)
            verdict = await compare(tx, self.stores.source_row, reading.marker, row)
            if isinstance(verdict, Agreed):
                self.agreement.lineage = row.lineage
                committed = await self._record(tx, row, verdict.marker, reading, announced, data_set_id)
            elif isinstance(verdict, Hold) and verdict.refused not in (None, row.refused):
                await self.stores.source_row.refuse(tx, str(verdict.refused))
        if committed is not None:
            self.announced.resolve_sent(committed.flush.nonce)
            self._measure(committed)
        await self.reader.report(reading, announced)
        if not isinstance(verdict, Agreed):
            return Disagreed(verdict, row)
        return committed or NothingPending()

    async def _record(
        self,
        tx: Transaction,
        row: SourceState,
        before: Marker,
        reading: Reading,
        announced: dict[str, int],
        data_set_id: str | None,
    ) -> Committed | None:
        """Write what was read, in the transaction that holds the lock. None when there is nothing to write."""
        counted = reading.counted
        if self.target is not None and (ids := sorted(counted.keys() | announced.keys())):
            for vod_id in await self._locked(tx, self.target, ids):
                counted.pop(vod_id, None)
                announced.pop(vod_id, None)
        source_row = self.stores.source_row
        if not counted and not announced:
            agreed = row.settled_id, row.data_set_id, row.refused, row.agreed_minutes_ago
            if agreed != (row.last_flush_id, data_set_id, None, 0):
                await source_row.confirm(tx, data_set_id)
            return None
        flush = Flush(row.last_flush_id + 1, uuid4(), before.nonce, counted, announced)
        changes = await self.stores.ledger.record(tx, flush)
        skipped = await self.target.add(tx, changes) if self.target is not None else {}
        # The marker, read under this lock, names the flush before: that one is settled.
        await source_row.advance(
            tx,
            flush_id=flush.flush_id,
            nonce=flush.nonce,
            settled=row.last_flush_id,
            announced_nonce=flush.nonce if announced else None,
            data_set_id=data_set_id,
        )
        self.announced.mark_sent(flush.nonce, announced)
        return Committed(before, flush, changes, skipped)

    async def _locked(self, tx: Transaction, target: TargetTable, ids: Sequence[str]) -> set[str]:
        """Ids whose row in the application's table another session has locked: they wait for the next flush."""
        locked = await target.lock_rows(tx, ids)
        if locked:
            log.info("flush incomplete: rows locked", table=str(target.names), keys=len(locked))
        return locked

    def _measure(self, committed: Committed) -> None:
        """Right after the commit: if the settle fails, a replay makes up for it, and does not measure."""
        self.metrics.flushes.inc()
        self.metrics.flushed_views.inc(sum(change.views for change in committed.changes))
        for reason, skipped in committed.skipped.items():
            self.metrics.target_skipped.labels(reason).inc(skipped)
