"""What to do when the marker in Redis does or does not fit the ledger in Postgres."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from worker.counters.marker import Marker
from worker.observability.logs import get_logger
from worker.redis.scripts import LuaScript

if TYPE_CHECKING:
    from worker.counters.keys import Keys
    from worker.counters.settle import Settler
    from worker.db.ledger import Ledger, Source
    from worker.db.session import Database
    from worker.redis.client import RedisClient

log = get_logger(__name__)

BIRTH = LuaScript.load(Path(__file__).with_name("birth.lua"))
PROBE_LIFETIME_S = 60
RUNBOOK = "See 'When flushing is on hold' in docs/protocol.md. Views keep accumulating in Redis; nothing is lost."


@dataclass(frozen=True, slots=True)
class Agreed:
    """Redis and Postgres name the same last flush: the next one may follow."""

    marker: Marker


@dataclass(frozen=True, slots=True)
class Unborn:
    """No marker, and nothing was ever flushed: the first one may be written."""


@dataclass(frozen=True, slots=True)
class Behind:
    """Postgres has flushes that Redis has not settled yet: settle them from the ledger."""

    marker: Marker


@dataclass(frozen=True, slots=True)
class Hold:
    """Not certain what happened: stop flushing, stay up, say why."""

    cause: str
    remedy: str = RUNBOOK


Verdict = Agreed | Unborn | Behind | Hold


def judge(raw: bytes | None, source: Source) -> Verdict:
    """Compare the marker, as read under the row lock, with the source row."""
    if raw is None:
        if source.last_flush_id == 0 and source.refused is None:
            return Unborn()
        return Hold(f"the marker is missing in Redis, and Postgres has {source.last_flush_id} flushes")
    marker = Marker.parse(raw)
    if marker is None:
        return Hold("the marker in Redis cannot be read")
    if marker.lineage != source.lineage:
        return Hold("the marker in Redis belongs to another database (or this one was created anew)")
    ahead = marker.flush_id - source.last_flush_id
    if ahead > 0:
        return Hold(f"Postgres lacks {ahead} flushes that Redis has settled (restored, failed over or cloned)")
    if ahead < 0:
        return Behind(marker)
    if marker.nonce != source.last_nonce:
        return Hold(f"Redis settled another flush {marker.flush_id} than the one Postgres has")
    return Agreed(marker)


class Recovery:
    """Brings Redis to where the ledger is: gives birth to the marker, replays settles."""

    def __init__(self, database: Database, ledger: Ledger, redis: RedisClient, keys: Keys, settler: Settler) -> None:
        self._database = database
        self._ledger = ledger
        self._redis = redis
        self._keys = keys
        self._settler = settler

    async def replay(self, marker: Marker, last_flush_id: int) -> Hold | None:
        """Settle, in order, every flush after `marker`. Runs without the row lock: each settle names its predecessor.

        None when there is nothing left to settle from here, or when somebody else moved the marker meanwhile.
        """
        for flush_id in range(marker.flush_id + 1, last_flush_id + 1):
            async with self._database.transaction() as tx:
                flush = await self._ledger.read_flush(tx, flush_id)
            if flush is None:
                return Hold(f"flush {flush_id} is no longer complete in the ledger, and Redis has not settled it")
            if flush.prev_nonce != marker.nonce:
                return Hold(f"Redis settled another flush {marker.flush_id} than the one before {flush_id} in Postgres")
            settled = Marker(marker.lineage, flush_id, flush.nonce)
            if not await self._settler.settle(marker, settled, flush.deltas, replay=True):
                return None
            marker = settled
        return None

    async def give_birth(self) -> Hold | None:
        """Write the first marker. None when it is written, or when somebody else is at it: look again."""
        nonce = uuid4().hex.encode()
        await self._redis.set_expiring(self._keys.probe, nonce, PROBE_LIFETIME_S)
        kind = await self._redis.type_of(self._keys.marker)
        if kind != "none":
            return None if kind == "string" else Hold(f"the marker's key holds a {kind}, not a string")
        async with self._database.transaction() as tx:
            source = await self._ledger.lock_source(tx)
            if source is None or source.last_flush_id != 0 or source.refused is not None:
                return None
            # A lineage that never flushed is taken over: of two workers that start at once, both mean the same one.
            lineage, first_nonce = source.lineage or uuid4(), source.last_nonce or uuid4()
            if source.lineage is None:
                await self._ledger.found_lineage(tx, lineage, first_nonce)
        marker = Marker(lineage, 0, first_nonce)
        keys = (self._keys.marker, self._keys.probe)
        outcome: bytes = await self._redis.run(BIRTH, keys, (nonce, marker.encode()))
        if outcome == b"born":
            log.info("marker born", lineage=str(lineage))
        return None
