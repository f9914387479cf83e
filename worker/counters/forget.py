"""Forgetting an id: a flush that takes its pending views and brings its total to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from worker.counters.flush.marker import Marker
from worker.counters.flush.recovery import Agreed, judge
from worker.db.counters.ledger import Flush
from worker.errors import OnHold

if TYPE_CHECKING:
    from worker.contract.keys import Keys
    from worker.counters.flush.reading import CounterReader
    from worker.counters.flush.recovery import Recovery
    from worker.counters.flush.settle import Settler
    from worker.db.counters.ledger import Ledger
    from worker.db.counters.source_row import SourceRow
    from worker.db.session import Database
    from worker.redis.client import RedisClient


@dataclass(frozen=True, slots=True)
class Forgotten:
    """`stored` views were in Postgres, `pending` in Redis."""

    stored: int
    pending: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgetting:
    """Needs no lease: the row lock keeps it apart from the flushes of the worker that has it."""

    database: Database
    ledger: Ledger
    source_row: SourceRow
    redis: RedisClient
    keys: Keys
    reader: CounterReader
    settler: Settler
    recovery: Recovery

    async def forget(self, vod_id: str) -> Forgotten:
        """Total, history and pending views of the id are gone; what is viewed later counts anew.

        The holder of the lease begins anew, with no sums of messages: views of other ids that were only published since
        the last flush are lost by it. The id's rows in the ledger stay until retention removes them: they bring a Redis
        that comes back from a snapshot up to date. Raises Unavailable, OnHold; whatever was done by then, it may be
        repeated.
        """
        stored = pending = 0
        while True:
            identity = self.keys.identity(await self.redis.probe())
            flush: Flush | None = None
            async with self.database.transaction() as tx:
                await self.source_row.ensure(tx)
                source = await self.source_row.lock(tx, wait=True)
                assert source is not None  # it was just made sure of  # noqa: S101
                reading = await self.reader.read([vod_id])
                verdict = judge(reading.marker, source)
                if isinstance(verdict, Agreed):
                    flush = Flush(source.last_flush_id + 1, uuid4(), verdict.marker.nonce, reading.counted)
                    stored += await self.ledger.forget(tx, flush, vod_id)
                    await self.source_row.advance(
                        tx,
                        flush_id=flush.flush_id,
                        nonce=flush.nonce,
                        settled=source.last_flush_id,
                        announced_nonce=None,
                        identity=identity,
                    )
                    # What the holder of the lease has heard of the id and not written is forgotten by this.
                    await self.source_row.revoke_lease(tx)
            if isinstance(verdict, Agreed) and flush is not None:
                settled = Marker(verdict.marker.lineage, flush.flush_id, flush.nonce)
                pending += sum(flush.counted.values())
                if await self.settler.settle(verdict.marker, settled, flush.counted):
                    return Forgotten(stored, pending)
            if (hold := await self.recovery.resolve(verdict, source)) is not None:
                raise OnHold(hold.cause, hold.remedy)
