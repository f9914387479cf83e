"""Ending a hold by decision: an operator says what the pending views are, and Redis and Postgres go on together."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from worker.contract.ids import InvalidId
from worker.contract.keys import parse_count
from worker.counters.flush.marker import Marker
from worker.counters.flush.recovery import Agreed, Behind, Hold, Missing, judge
from worker.counters.intake.quarantine import printable
from worker.db.counters.source_row import NEW_SOURCE
from worker.errors import NothingToAdopt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from worker.contract.keys import Keys
    from worker.counters.flush.recovery import Recovery
    from worker.counters.flush.settle import Settler
    from worker.db.counters.source_row import Source, SourceRow
    from worker.db.session import Database
    from worker.redis.client import RedisClient

EXAMPLES = 5
# Discarding goes through all pending keys while the row is locked.
PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Situation:
    """What both sides say, and what is pending: views by id. `hold` is None when there is nothing to decide."""

    hold: Hold | None
    source: Source
    marker: bytes | None
    pending: dict[str, int]

    @property
    def pending_views(self) -> int:
        return sum(self.pending.values())

    @property
    def largest(self) -> dict[str, int]:
        """Those with the most views."""
        largest = sorted(self.pending, key=lambda vod_id: self.pending[vod_id], reverse=True)
        return {vod_id: self.pending[vod_id] for vod_id in largest[:EXAMPLES]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """Looks at a hold, and ends it."""

    database: Database
    source_row: SourceRow
    redis: RedisClient
    keys: Keys
    settler: Settler
    recovery: Recovery

    async def look(self) -> Situation:
        """Both sides, without changing anything. Raises Unavailable."""
        async with self.database.transaction() as tx:
            source = await self.source_row.read(tx) or NEW_SOURCE
        (marker,) = await self.redis.read([self.keys.marker])
        hold = await self._hold(marker, source)
        pending: dict[str, int] = {}
        async for page in self._pending():
            pending.update(page)
        return Situation(hold, source, marker, pending)

    async def adopt(self, situation: Situation, *, discard: bool) -> int:
        """Go on from here under a new lineage: pending views count as new, or with `discard` those of the situation are
        subtracted first. What came since is counted.

        Returns the number of views discarded. Raises NothingToAdopt when there is no hold or when anything changed
        since `situation` was looked at, Unavailable when a server fails on the way: then it is still on hold, and
        may be adopted again.
        """
        if situation.hold is None:
            raise NothingToAdopt("Redis and Postgres agree: there is nothing to adopt")
        discarded = 0
        async with self.database.transaction() as tx:
            await self.source_row.ensure(tx)
            source = await self.source_row.lock(tx, wait=True)
            await self.source_row.allow_idling(tx, PATIENCE)
            (marker,) = await self.redis.read([self.keys.marker])
            if source is None or marker != situation.marker or _facts(source) != _facts(situation.source):
                raise NothingToAdopt("something changed since it was looked at: look again")
            # Until the commit this marker is foreign to every worker, so they stay on hold whatever happens here.
            adopted = Marker(uuid4(), source.last_flush_id, uuid4())
            await self.redis.overwrite(self.keys.marker, adopted.encode())
            if discard:
                shown = dict(situation.pending)
                async for page in self._pending():
                    # SCAN may name a key twice.
                    gone = {vod_id: min(now, shown.pop(vod_id)) for vod_id, now in page.items() if vod_id in shown}
                    following = Marker(adopted.lineage, adopted.flush_id, uuid4())
                    if not await self.settler.settle(adopted, following, gone):
                        raise NothingToAdopt("another adoption is at work")
                    adopted = following
                    discarded += sum(gone.values())
            identity = self.keys.identity(await self.redis.probe())
            await self.source_row.start_lineage(tx, adopted.lineage, adopted.nonce, source.last_flush_id, identity)
        return discarded

    async def _hold(self, marker: bytes | None, source: Source) -> Hold | None:
        match judge(marker, source):
            case Hold() as hold:
                return hold
            case Missing():
                if (kind := await self.redis.type_of(self.keys.marker)) != "none":
                    return Hold(f"the marker's key holds a {kind}, not a string")
                evidence = await self.recovery.evidence(source)
                return evidence if isinstance(evidence, Hold) else None
            case Behind(behind):
                return await self.recovery.replay(behind, source.last_flush_id, rehearse=True)
            case Agreed():
                return None

    async def _pending(self) -> AsyncIterator[dict[str, int]]:
        """The pending counts, page by page, sorted within a page."""
        async for found in self.redis.scan(self.keys.pattern):
            names = sorted(set(found))
            counts: dict[str, int] = {}
            for key, value in zip(names, await self.redis.read(names) if names else (), strict=True):
                try:
                    vod_id = self.keys.vod_id(key)
                except InvalidId:
                    continue
                if value is not None and (count := parse_count(value)):
                    counts[vod_id] = count
            if counts:
                yield counts


def _facts(source: Source) -> tuple[object, ...]:
    """What must not have changed; a worker on hold may renew its lease and remember the marker it refused."""
    return source.lineage, source.last_flush_id, source.last_nonce, source.settled_id


def describe_marker(marker: bytes | None) -> str:
    return "missing" if marker is None else printable(marker) if Marker.parse(marker) is None else marker.decode()
