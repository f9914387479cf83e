"""The numbers that a page shows: totals in Postgres plus pending views in Redis."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from worker.contract.keys import parse_count
from worker.counters.flush.marker import Marker
from worker.counters.flush.verdict import Agreed, Behind, Missing, compare
from worker.counters.long_values import split_by_length
from worker.db.counters.count_source import VIEWS
from worker.db.counters.reads import Shown, Stored, Top, TopEntry, read_history, read_top, read_totals
from worker.db.counters.source_row import NEW_ROW
from worker.errors import NotEncodable
from worker.runtime.bisect import bisect

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta

    from worker.counters.stores import Stores
    from worker.db.counters.count_source import CountSource
    from worker.db.counters.reads import Bucket
    from worker.db.read_limit import ReadLimit
    from worker.db.session import Transaction


class Display:
    """Exact (see Shown), except for views that were only announced since the last flush: those are not included.

    Every method raises Unavailable when a server cannot be used, is too slow, or too many readers ask at once, and
    DatabaseRefused when the tables do not exist.
    """

    def __init__(self, stores: Stores, count_source: CountSource, limit: ReadLimit) -> None:
        self._stores = stores
        self._views = VIEWS[count_source]
        self._limit = limit

    async def views(self, ids: Sequence[str]) -> list[Shown]:
        """The numbers of these ids, in their order; zero for an unknown id."""
        async with self._limit.turn():
            return await self._look_up(ids)

    async def top(self, window: timedelta, limit: int) -> Top:
        """The `limit` most-viewed ids of the window, counted in whole hours."""
        async with self._limit.turn():
            async with self._stores.database.transaction() as tx:
                since, as_of, ranked = await read_top(tx, window, limit)
            totals = await self._look_up([entry.vod_id for entry in ranked])
        entries = [TopEntry(entry.vod_id, entry.views, now.views) for entry, now in zip(ranked, totals, strict=True)]
        return Top(since, as_of, entries, all(now.is_exact for now in totals))

    async def history(
        self, vod_id: str, bucket: str, first: datetime, last: datetime
    ) -> tuple[datetime, Sequence[Bucket]]:
        """As `read_history`."""
        async with self._limit.turn():
            try:
                async with self._stores.database.transaction() as tx:
                    return await read_history(tx, vod_id, bucket, first, last)
            except NotEncodable:
                async with self._stores.database.transaction() as tx:
                    return await read_history(tx, "", bucket, first, last)  # nobody has this id

    async def _look_up(self, ids: Sequence[str]) -> list[Shown]:
        shown = await self._read(ids)
        if not all(number.is_exact for number in shown):
            # Perhaps the marker was created in between: then the first flush may be seen on both sides.
            shown = await self._read(ids)
        return shown

    async def _read(self, ids: Sequence[str]) -> list[Shown]:
        if not ids:
            return []
        keys = self._stores.keys
        # Redis first: a flush in between is then seen on both sides, and the ledger says what it took. In the other
        # order it could be seen on neither.
        counters = list(map(keys.counter, ids))
        readable, _ = await split_by_length(self._stores.redis, counters)
        raw, *found = await self._stores.redis.read([keys.marker, *readable])
        values = dict(zip(readable, found, strict=True))
        storable = list(filter(self._stores.database.can_store, ids))
        totals: dict[str, Stored] = {}
        is_exact = True
        # An id that only Postgres knows to be impossible must not fail the others. No row has it.
        parts = bisect(storable, partial(self._read_stored, raw), _is_not_encodable, lambda *_: None)
        async for part_is_exact, part in parts:
            is_exact = is_exact and part_is_exact
            totals |= part
        if not totals:  # no part was read, perhaps
            is_exact, _ = await self._read_stored(raw, [])
        stored = [totals.get(vod_id, Stored(vod_id)) for vod_id in ids]
        return [self._shown(total, values.get(key), is_exact) for total, key in zip(stored, counters, strict=True)]

    async def _read_stored(self, raw: bytes | None, ids: Sequence[str]) -> tuple[bool, dict[str, Stored]]:
        """Whether the ledger says what of the counters is in the totals, and the totals of these ids.

        `raw`: the marker, read together with the counters. Raises NotEncodable.
        """
        marker = None if raw is None else Marker.parse(raw)
        lineage, settled = (None, 0) if marker is None else (marker.lineage, marker.flush_id)
        async with self._stores.database.transaction() as tx:
            is_exact = await self._is_exact(tx, raw)
            return is_exact, await read_totals(tx, ids, self._stores.source_row.name, lineage, settled)

    async def _is_exact(self, tx: Transaction, raw: bytes | None) -> bool:
        row = await self._stores.source_row.read(tx) or NEW_ROW
        match await compare(tx, self._stores.source_row, raw, row):
            case Agreed():
                return True
            case Behind(marker, last_flush_id):
                return await self._stores.ledger.has_all(tx, marker.flush_id, last_flush_id)
            case Missing():
                return row.lineage is None
        return False

    def _shown(self, stored: Stored, value: bytes | None, is_exact: bool) -> Shown:
        value_now = (parse_count(value) if value is not None else 0) or 0
        pending = max(0, value_now - stored.unsettled)
        # As a flush would add it: messages may have announced the pending views already.
        more = self._views(stored.counted + pending, stored.announced) - self._views(stored.counted, stored.announced)
        return Shown(stored.vod_id, stored.views + more, pending, stored.views, is_exact)


def _is_not_encodable(error: Exception) -> bool:
    return isinstance(error, NotEncodable)
