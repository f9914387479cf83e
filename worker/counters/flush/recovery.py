"""What to do when the marker in Redis does or does not fit the ledger in Postgres. docs/protocol.md has the table."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from worker.counters.flush.marker import Marker
from worker.counters.intake.quarantine import printable
from worker.observability.logs import get_logger
from worker.observability.status import STEP_LIMIT_S
from worker.redis.scripts import LuaScript

if TYPE_CHECKING:
    from worker.contract.keys import Keys
    from worker.counters.flush.settle import Settler
    from worker.db.counters.ledger import Ledger
    from worker.db.counters.source_row import Source, SourceRow
    from worker.db.session import Database, Transaction
    from worker.observability.metrics import Metrics
    from worker.observability.status import Status
    from worker.redis.client import History, RedisClient

log = get_logger(__name__)

PROBE = LuaScript.load(Path(__file__).with_name("probe.lua"))
BIRTH = LuaScript.load(Path(__file__).with_name("birth.lua"))
REMEDY = "Nothing is lost: views keep accumulating in Redis. `viewer-worker adopt` shows both sides and the ways out."


@dataclass(frozen=True, slots=True)
class Agreed:
    """Redis and Postgres name the same last flush: the next one may follow."""

    marker: Marker


@dataclass(frozen=True, slots=True)
class Missing:
    """There is no marker. Whether one may be written is a matter of evidence."""


@dataclass(frozen=True, slots=True)
class Behind:
    """Postgres has flushes that Redis has not settled yet: settle them from the ledger."""

    marker: Marker


@dataclass(frozen=True, slots=True)
class Hold:
    """Not certain what happened: stop flushing, stay up, say why. `refused` is a marker to be remembered."""

    cause: str
    remedy: str = REMEDY
    refused: str | None = None


Verdict = Agreed | Missing | Behind | Hold


@dataclass(frozen=True, slots=True)
class Evidence:
    """Why a missing marker may be written anew, and the data set (`identity`) that this was found out about."""

    reason: str
    identity: str | None


def judge(raw: bytes | None, source: Source) -> Verdict:
    """Compare the marker, as read under the row lock, with the source row."""
    if raw is None:
        if source.refused is not None:
            return Hold(f"this database refused a marker before ({source.refused}); now there is none")
        return Missing()
    marker = Marker.parse(raw)
    if marker is None:
        return Hold("the marker in Redis cannot be read", refused=printable(raw) or "(empty)")
    if marker.lineage != source.lineage:
        return Hold(
            "the marker in Redis belongs to another database (or this one was created anew)", refused=printable(raw)
        )
    ahead = marker.flush_id - source.last_flush_id
    if ahead > 0:
        return Hold(f"Postgres lacks {ahead} flushes that Redis has settled (restored, failed over or cloned)")
    if ahead < 0:
        return Behind(marker)
    if marker.nonce != source.last_nonce:
        return Hold(f"Redis settled another flush {marker.flush_id} than the one Postgres has")
    return Agreed(marker)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Brings Redis to where the ledger is: gives birth to the marker, replays settles.

    With `trust_lost_marker` (VIEW_ON_LOST_MARKER=fresh) a missing marker always means a new data set.
    """

    database: Database
    ledger: Ledger
    source_row: SourceRow
    redis: RedisClient
    keys: Keys
    settler: Settler
    metrics: Metrics
    status: Status
    trust_lost_marker: bool = False

    async def resolve(self, verdict: Verdict, source: Source) -> Hold | None:
        """Do what the verdict asks for. None when that was done, or is being done by somebody else: look again."""
        match verdict:
            case Agreed():
                return None
            case Behind(marker):
                return await self.replay(marker, source.last_flush_id)
            case Missing():
                return await self.give_birth(source)
            case Hold():
                return verdict

    async def replay(self, marker: Marker, last_flush_id: int, *, rehearse: bool = False) -> Hold | None:
        """Settle, in order, every flush after `marker`. Runs without the row lock: each settle names its predecessor.

        None when there is nothing left to settle from here, or when somebody else moved the marker meanwhile. With
        `rehearse`, only find out whether the ledger is complete.
        """
        for flush_id in range(marker.flush_id + 1, last_flush_id + 1):
            self.status.expect_beat("view_counts", within=STEP_LIMIT_S)
            async with self.database.transaction() as tx:
                flush = await self.ledger.read_flush(tx, flush_id)
            if flush is None:
                return Hold(f"flush {flush_id} is no longer complete in the ledger, and Redis has not settled it")
            if flush.prev_nonce != marker.nonce:
                return Hold(f"Redis settled another flush {marker.flush_id} than the one before {flush_id} in Postgres")
            settled = Marker(marker.lineage, flush_id, flush.nonce)
            if not rehearse and not await self.settler.settle(marker, settled, flush.counted, replay=True):
                return None
            marker = settled
        return None

    async def give_birth(self, judged: Source) -> Hold | None:
        """Write a marker where there is none, if the evidence allows it.

        None when it is written, or when somebody else is at it: look again.
        """
        # The probe first: a copy that is put in place after this has none, and birth then fails.
        nonce = uuid4().hex.encode()
        await self.redis.run(PROBE, (self.keys.probe,), (nonce,))
        kind = await self.redis.type_of(self.keys.marker)
        if kind == "string":
            return None
        if kind != "none":
            return await self._refuse(f"the marker's key holds a {kind}, not a string", f"({kind})")
        evidence = await self.evidence(judged)
        if isinstance(evidence, Hold):
            return evidence
        if judged.last_flush_id > 0:
            self.metrics.marker_losses.inc()
            log.error("marker lost", flushes=judged.last_flush_id, going_on_because=evidence.reason)
        # The identity is that of the evidence: asked for anew, it could be that of a copy put in place since, and the
        # next look would take the copy for a data set whose marker was deleted in place.
        marker = await self._start_lineage(judged, evidence.identity)
        if not isinstance(marker, Marker):
            return marker
        outcome: bytes = await self.redis.run(BIRTH, (self.keys.marker, self.keys.probe), (nonce, marker.encode()))
        if outcome == b"born":
            log.info("marker born", lineage=str(marker.lineage), flush_id=marker.flush_id)
        return None

    async def evidence(self, judged: Source) -> Hold | Evidence:
        """Why it is certain that what is pending was not counted, although there is no marker; a hold if it is not."""
        history = await self.redis.history()
        identity = self.keys.identity(history.replid) if history is not None else None
        reason = await self._reason(judged, history, identity)
        if reason is not None:
            return Evidence(reason, identity)
        return Hold(
            f"the marker is missing in Redis, and Postgres has {judged.last_flush_id} flushes; "
            "pending counters may or may not be counted already"
        )

    async def _reason(self, judged: Source, history: History | None, identity: str | None) -> str | None:
        if judged.last_flush_id == 0:
            return "nothing was ever flushed"
        if identity is not None and identity == judged.identity:
            return "Redis is the same as at the last flush: the marker was deleted in place (FLUSHALL, DEL, eviction)"
        if history is not None and await self._started_empty(history):
            return "Redis started without any data"
        if not await self._any_counter():
            return "Redis has no pending counter at all"
        if self.trust_lost_marker:
            return "VIEW_ON_LOST_MARKER=fresh"
        return None

    async def _started_empty(self, history: History) -> bool:
        return history.started_empty and (not history.by_its_aof or await self.redis.writes_a_base())

    async def _any_counter(self) -> bool:
        async with aclosing(self.redis.scan(self.keys.pattern)) as pages:
            async for page in pages:
                if page:
                    return True
        return False

    async def _start_lineage(self, judged: Source, identity: str | None) -> Marker | Hold | None:
        """Commit the lineage that the new marker will name, at the last flush that is known to be settled.

        What follows that flush is replayed: if the marker alone was lost, it may not be settled yet. The lineage is
        always a new one, or two data sets could share it. Two workers cannot end up with two: who founds later left its
        probe before, and with that took the birth from who founded earlier.
        """
        async with self.database.transaction() as tx:
            source = await self.source_row.lock(tx)
            if source != judged:
                return None
            lineage, nonce, last_nonce = uuid4(), uuid4(), source.last_nonce
            if source.last_flush_id == 0:
                last_nonce = nonce
            else:
                settled_nonce = await self._nonce_of(tx, source)
                if settled_nonce is None or last_nonce is None:
                    return Hold(f"flush {source.settled_id + 1} is no longer complete in the ledger")
                nonce = settled_nonce
            await self.source_row.start_lineage(tx, lineage, last_nonce, source.settled_id, identity)
        return Marker(lineage, source.settled_id, nonce)

    async def _nonce_of(self, tx: Transaction, source: Source) -> UUID | None:
        """The nonce of the last settled flush."""
        if source.settled_id == source.last_flush_id:
            return source.last_nonce
        following = await self.ledger.read_flush(tx, source.settled_id + 1)
        return None if following is None else following.prev_nonce

    async def _refuse(self, cause: str, marker: str) -> Hold | None:
        async with self.database.transaction() as tx:
            if await self.source_row.lock(tx) is None:
                return None
            await self.source_row.refuse(tx, marker)
        return Hold(cause)
