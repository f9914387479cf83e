"""Forgetting an id: a flush that takes its pending views and sets its total to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from worker.counters.flush.verdict import Agreed, compare
from worker.counters.history import IDS_AT_ONCE
from worker.db.counters.history import History, all_sources
from worker.db.counters.ledger import Flush
from worker.db.counters.reads import is_stored
from worker.db.counters.source_row import lock_all_sources
from worker.errors import NotEncodable, OnHold

if TYPE_CHECKING:
    from worker.counters.flush.reading import CounterReader
    from worker.counters.flush.recovery import Recovery
    from worker.counters.flush.settle import Settler
    from worker.counters.stores import Stores


@dataclass(frozen=True, slots=True)
class Forgotten:
    """`stored` views were in Postgres, `pending` in Redis."""

    stored: int
    pending: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgetting:
    """Needs no lease: it waits for the flushes that are running, and keeps others from starting.

    That is for all sources, since they share totals and history.
    """

    stores: Stores
    reader: CounterReader
    settler: Settler
    recovery: Recovery

    async def knows(self, vod_id: str) -> bool:
        """Whether the id has a total, history or a counter, also one that cannot be counted. Raises Unavailable."""
        if await self.stores.redis.type_of(self.stores.keys.counter(vod_id)) != "none":
            return True
        try:
            async with self.stores.database.transaction() as tx:
                return await is_stored(tx, vod_id)
        except NotEncodable:
            return False

    async def forget(self, vod_id: str) -> Forgotten:
        """Delete total, history and pending views of the id; later views count from zero.

        The holder of the lease restarts without sums of messages, so views of other ids that were only published
        since the last flush are lost. The id's rows in the ledger stay until retention deletes them: they bring a
        Redis that returns from a snapshot up to date. Raises Unavailable, OnHold; after either it may be repeated.
        """
        source_row, history = self.stores.source_row, History(self.stores.source_row.name)
        stored = pending = 0
        while True:
            data_set_id = await self.stores.probe_data_set()
            flush: Flush | None = None
            await self._roll_up_in_steps()
            async with self.stores.database.transaction() as tx:
                await source_row.ensure(tx)
                await lock_all_sources(tx)
                row = await source_row.lock(tx, wait=True)
                assert row is not None  # `ensure` inserted it  # noqa: S101
                reading = await self.reader.read([vod_id])
                verdict = await compare(tx, source_row, reading.marker, row)
                if isinstance(verdict, Agreed):
                    flush = Flush(row.last_flush_id + 1, uuid4(), verdict.marker.nonce, reading.counted)
                    # Views of the id that are in the ledger must not come into the history later.
                    for source in await all_sources(tx):
                        while await History(source).roll_up(tx, IDS_AT_ONCE) is not None:
                            pass
                    stored += await self.stores.ledger.forget(tx, flush, vod_id)
                    await history.forget(tx, vod_id)
                    await source_row.advance(
                        tx,
                        flush_id=flush.flush_id,
                        nonce=flush.nonce,
                        settled=row.last_flush_id,
                        announced_nonce=None,
                        data_set_id=data_set_id,
                    )
                    await history.skip(tx)
                    # The holder of the lease then drops the messages about the id that it has not written.
                    await source_row.revoke_lease(tx)
            if isinstance(verdict, Agreed) and flush is not None:
                pending += sum(flush.counted.values())
                if await self.settler.settle(verdict.marker, verdict.marker.after(flush), flush.counted):
                    return Forgotten(stored, pending)
            if (hold := await self.recovery.resolve(verdict, row)) is not None:
                raise OnHold(hold.cause, hold.remedy)

    async def _roll_up_in_steps(self) -> None:
        """So that little is left to do under the lock of all sources."""
        transaction = self.stores.database.transaction
        async with transaction() as tx:
            sources = await all_sources(tx)
        for source in sources:
            age: float | None = 0.0
            while age is not None:
                async with transaction() as tx:
                    age = await History(source).roll_up(tx, IDS_AT_ONCE)
