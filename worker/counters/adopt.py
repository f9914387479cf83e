"""Ends a hold by an operator's decision about the pending views."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from worker.contract.ids import InvalidId
from worker.contract.keys import parse_count
from worker.counters.flush.agreement import ANOTHER_REDIS
from worker.counters.flush.marker import Marker
from worker.counters.flush.verdict import Agreed, Behind, Hold, Missing, Returned, Verdict, compare
from worker.db.counters.source_row import NEW_ROW
from worker.errors import NothingToAdopt
from worker.observability.printable import excerpt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from worker.counters.flush.recovery import Recovery
    from worker.counters.flush.settle import Settler
    from worker.counters.stores import Stores
    from worker.db.counters.source_row import SourceState

EXAMPLES = 5
# Discarding goes through all pending keys while the row is locked.
LOCK_LIMIT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Situation:
    """Both sides of a hold. `pending`: id → views, if it was read. `hold` is None when there is nothing to decide."""

    hold: Hold | None
    row: SourceState
    marker: bytes | None
    pending: dict[str, int]

    @property
    def pending_views(self) -> int:
        return sum(self.pending.values())

    @property
    def largest(self) -> dict[str, int]:
        """The ids with the most pending views."""
        largest = sorted(self.pending, key=lambda vod_id: self.pending[vod_id], reverse=True)
        return {vod_id: self.pending[vod_id] for vod_id in largest[:EXAMPLES]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """Looks at a hold, and ends it."""

    stores: Stores
    settler: Settler
    recovery: Recovery

    async def look(self, *, reads_pending: bool = True) -> Situation:
        """Both sides, without changing anything. Pending views are read by a sweep. Raises Unavailable."""
        async with self.stores.database.transaction() as tx:
            row = await self.stores.source_row.read(tx) or NEW_ROW
            (marker,) = await self.stores.redis.read([self.stores.keys.marker])
            verdict = await compare(tx, self.stores.source_row, marker, row)
        hold = await self._hold(verdict, row)
        pending: dict[str, int] = {}
        if reads_pending:
            async for page in self._pending():
                pending.update(page)
        return Situation(hold, row, marker, pending)

    async def adopt(self, situation: Situation, *, discard: bool) -> int:
        """Continue from here under a new lineage. Pending views count as new; with `discard`, those of the situation
        are subtracted first, and views recorded since are counted.

        Returns the number of views discarded. Raises NothingToAdopt when there is no hold or when anything changed
        since `situation`; Unavailable when a server fails on the way: the hold then stays, and may be adopted again.
        """
        if situation.hold is None:
            raise NothingToAdopt("Redis and Postgres agree: there is nothing to adopt")
        source_row, redis, keys = self.stores.source_row, self.stores.redis, self.stores.keys
        discarded = 0
        async with self.stores.database.transaction() as tx:
            await source_row.ensure(tx)
            row = await source_row.lock(tx, wait=True)
            await source_row.allow_idling(tx, LOCK_LIMIT)
            (marker,) = await redis.read([keys.marker])
            if row is None or marker != situation.marker or _facts(row) != _facts(situation.row):
                raise NothingToAdopt("something changed since it was looked at: look again")
            # Until the commit this marker is foreign to every worker, so they stay on hold whatever happens here.
            adopted = Marker(uuid4(), row.last_flush_id, uuid4())
            await redis.overwrite(keys.marker, adopted.encode())
            if discard:
                adopted, discarded = await self._discard(adopted, situation.pending)
            data_set_id = await self.stores.probe_data_set()
            # The pending views may be those of any data set that was used before: none may return with its marker.
            await source_row.forget_lineages(tx)
            await source_row.start_lineage(tx, adopted.lineage, adopted.nonce, row.last_flush_id, data_set_id)
        return discarded

    async def _discard(self, adopted: Marker, pending: dict[str, int]) -> tuple[Marker, int]:
        """Subtract the pending views in Redis. Returns the marker after the last page, and the views subtracted."""
        shown, discarded = dict(pending), 0
        async for page in self._pending():
            # SCAN may return a key twice.
            gone = {vod_id: min(now, shown.pop(vod_id)) for vod_id, now in page.items() if vod_id in shown}
            following = Marker(adopted.lineage, adopted.flush_id, uuid4())
            if not await self.settler.settle(adopted, following, gone):
                raise NothingToAdopt("another adoption is running")
            adopted = following
            discarded += sum(gone.values())
        return adopted, discarded

    async def _hold(self, verdict: Verdict, row: SourceState) -> Hold | None:
        match verdict:
            case Hold() as hold:
                return hold
            case Missing():
                if (kind := await self.stores.redis.type_of(self.stores.keys.marker)) != "none":
                    return Hold(f"the marker's key holds a {kind}, not a string")
                evidence = await self.recovery.evidence(row)
                return evidence if isinstance(evidence, Hold) else None
            case Behind(marker, last_flush_id):
                return await self.recovery.replay(marker, last_flush_id, rehearse=True)
            case Returned(_, None):
                return ANOTHER_REDIS if self.recovery.agreement.forbids_another_redis(row) else None
            case Returned():
                return None
            case Agreed():
                return None

    async def _pending(self) -> AsyncIterator[dict[str, int]]:
        """The pending counts, page by page, sorted within a page."""
        keys, redis = self.stores.keys, self.stores.redis
        async for found in redis.scan(keys.pattern):
            names = sorted(set(found))
            counts: dict[str, int] = {}
            for key, value in zip(names, await redis.read(names) if names else (), strict=True):
                try:
                    vod_id = keys.vod_id(key)
                except InvalidId:
                    continue
                if value is not None and (count := parse_count(value)):
                    counts[vod_id] = count
            if counts:
                yield counts


def _facts(row: SourceState) -> tuple[object, ...]:
    """What must not have changed. A worker on hold may renew its lease and remember the marker that it refused."""
    return row.lineage, row.last_flush_id, row.last_nonce, row.settled_id


def describe_marker(marker: bytes | None) -> str:
    return "missing" if marker is None else excerpt(marker) if Marker.parse(marker) is None else marker.decode()
