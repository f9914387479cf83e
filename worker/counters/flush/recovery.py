"""Brings Redis and Postgres together where `judge` does not find them in agreement."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from worker.counters.flush.agreement import ANOTHER_REDIS
from worker.counters.flush.marker import Marker
from worker.counters.flush.verdict import Agreed, Behind, Hold, Missing, Returned, Verdict
from worker.observability.logs import get_logger
from worker.observability.status import STEP_LIMIT_S, VIEW_COUNTS
from worker.redis.scripts import LuaScript

if TYPE_CHECKING:
    from worker.counters.flush.agreement import Agreement
    from worker.counters.flush.settle import Settler
    from worker.counters.stores import Stores
    from worker.db.counters.source_row import SourceState
    from worker.db.session import Transaction
    from worker.observability.metrics import Metrics
    from worker.observability.status import Status
    from worker.redis.client import History

log = get_logger(__name__)

PROBE = LuaScript.load(Path(__file__).with_name("probe.lua"))
CREATE_MARKER = LuaScript.load(Path(__file__).with_name("create_marker.lua"))


class Origin(Enum):
    """Where pending views without a marker come from.

    `SAME`: from the data set of the last flush. `APART`: from a data set that shares no view with one that was ever
    flushed. `UNKNOWN`: they are not counted yet, but another data set may have them, too.
    """

    SAME = "same"
    APART = "apart"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Why a missing marker may be created, and the data set that this was established for."""

    reason: str
    origin: Origin
    data_set_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Creates a missing marker, replays settles, and takes up a data set that was used before.

    With `trust_lost_marker` (VIEW_ON_LOST_MARKER=fresh) a missing marker always means a new data set.
    """

    stores: Stores
    settler: Settler
    metrics: Metrics
    status: Status
    agreement: Agreement
    trust_lost_marker: bool = False

    async def resolve(self, verdict: Verdict, row: SourceState) -> Hold | None:
        """Do what the verdict requires. None: it was done, or another worker is doing it; look again."""
        match verdict:
            case Agreed():
                return None
            case Behind(marker, last_flush_id):
                return await self.replay(marker, last_flush_id)
            case Returned(marker, successor):
                if successor is None:
                    return await self._take_up(marker, row)
                await self.settler.settle(marker, successor, {})
                return None
            case Missing():
                return await self.create_marker(row)
            case Hold():
                return verdict

    async def replay(self, marker: Marker, last_flush_id: int, *, rehearse: bool = False) -> Hold | None:
        """Settle, in order, every flush after `marker`. Runs without the row lock: each settle names its predecessor.

        None when nothing is left to settle, or when another worker moved the marker meanwhile. With `rehearse`, only
        find out whether the ledger is complete.
        """
        for flush_id in range(marker.flush_id + 1, last_flush_id + 1):
            self.status.expect_beat(VIEW_COUNTS, within=STEP_LIMIT_S)
            async with self.stores.database.transaction() as tx:
                flush = await self.stores.ledger.read_flush(tx, flush_id)
            if flush is None:
                return Hold(f"flush {flush_id} is no longer complete in the ledger, and Redis has not settled it")
            if flush.prev_nonce != marker.nonce:
                return Hold(f"Redis settled another flush {marker.flush_id} than the one before {flush_id} in Postgres")
            settled = marker.after(flush)
            if not rehearse and not await self.settler.settle(marker, settled, flush.counted, replay=True):
                return None
            marker = settled
        return None

    async def create_marker(self, judged: SourceState) -> Hold | None:
        """Create the missing marker, if the evidence allows it.

        None when it was created, or when another worker is creating one: look again.
        """
        # Write the probe first. If a copy replaces Redis after this, the copy has no probe, and nothing is created.
        nonce = uuid4().hex.encode()
        keys, redis = self.stores.keys, self.stores.redis
        await redis.run(PROBE, (keys.probe,), (nonce,))
        kind = await redis.type_of(keys.marker)
        if kind == "string":
            return None
        if kind != "none":
            return await self._refuse(f"the marker's key holds a {kind}, not a string", f"({kind})")
        evidence = await self.evidence(judged)
        if isinstance(evidence, Hold):
            return evidence
        if judged.last_flush_id > 0:
            self.metrics.marker_losses.inc()
            log.error("marker lost", flushes=judged.last_flush_id, evidence=evidence.reason)
        marker = await self._start_lineage(judged, evidence)
        if not isinstance(marker, Marker):
            return marker
        outcome: bytes = await redis.run(CREATE_MARKER, (keys.marker, keys.probe), (nonce, marker.encode()))
        if outcome == b"created":
            log.info("marker created", lineage=str(marker.lineage), flush_id=marker.flush_id)
        return None

    async def evidence(self, judged: SourceState) -> Hold | Evidence:
        """Why pending views are certainly not counted yet, although there is no marker; a hold if it is not certain."""
        history = await self.stores.redis.history()
        data_set_id = self.stores.keys.data_set_id(history.replid) if history is not None else None
        found = await self._reason(judged, history, data_set_id)
        if isinstance(found, Hold):
            return found
        if found is not None:
            return Evidence(*found, data_set_id)
        return Hold(
            f"the marker is missing in Redis, and Postgres has {judged.last_flush_id} flushes; "
            "pending counters may or may not be counted already"
        )

    async def _reason(
        self, judged: SourceState, history: History | None, data_set_id: str | None
    ) -> tuple[str, Origin] | Hold | None:
        if judged.lineage is None:
            return "nothing was ever flushed", Origin.UNKNOWN
        if data_set_id is not None and data_set_id == judged.data_set_id:
            reason = "Redis is the same as at the last flush: the marker was deleted in place (FLUSHALL, DEL, eviction)"
            return reason, Origin.SAME
        if self.agreement.forbids_another_redis(judged):
            return ANOTHER_REDIS
        if history is not None and await self._started_empty(history, data_set_id):
            return "Redis started without any data", Origin.APART
        if not await self._any_counter():
            return "Redis has no pending counter at all", Origin.APART
        if judged.last_flush_id == 0:
            return "nothing was ever flushed", Origin.UNKNOWN
        if self.trust_lost_marker:
            return "VIEW_ON_LOST_MARKER=fresh", Origin.UNKNOWN
        return None

    async def _started_empty(self, history: History, data_set_id: str | None) -> bool:
        """Whether all that Redis has was written to it since it started, and none of it was ever flushed."""
        if data_set_id is None or not history.started_empty:
            return False
        if history.by_its_aof and not await self.stores.redis.writes_a_base():
            return False
        # It had a marker once, and flushes of it may not be settled.
        async with self.stores.database.transaction() as tx:
            return not await self.stores.source_row.is_past(tx, data_set_id)

    async def _any_counter(self) -> bool:
        async with aclosing(self.stores.redis.scan(self.stores.keys.pattern)) as pages:
            async for page in pages:
                if page:
                    return True
        return False

    async def _start_lineage(self, judged: SourceState, evidence: Evidence) -> Marker | Hold | None:
        """Commit the lineage of the new marker, which starts at the last flush that is known to be settled.

        The flushes after that one are replayed: if only the marker was lost, they may not be settled yet. The lineage
        is always a new one, or two data sets could share it. Two workers cannot end up with two lineages: the one that
        starts its lineage later wrote its probe before, which invalidated the probe of the other. None: the source row
        changed meanwhile.
        """
        source_row = self.stores.source_row
        async with self.stores.database.transaction() as tx:
            row = await source_row.lock(tx)
            if row != judged:
                return None
            lineage, nonce, last_nonce = uuid4(), uuid4(), row.last_nonce
            if row.last_flush_id == 0:
                last_nonce = nonce
            else:
                settled_nonce = await self._settled_nonce(tx, row)
                if settled_nonce is None or last_nonce is None:
                    return Hold(f"flush {row.settled_id + 1} is no longer complete in the ledger")
                nonce = settled_nonce
            if evidence.origin is Origin.APART:
                await source_row.keep_lineage(tx)
            elif evidence.origin is Origin.UNKNOWN:
                await source_row.forget_lineages(tx)
            # The id that was read with the evidence. Read again, it could be the id of a copy restored since, and the
            # next check would take that copy for the same data set with only its marker deleted.
            await source_row.start_lineage(tx, lineage, last_nonce, row.settled_id, evidence.data_set_id)
        self.agreement.lineage = lineage
        return Marker(lineage, row.settled_id, nonce)

    async def _take_up(self, marker: Marker, judged: SourceState) -> Hold | None:
        """Continue with a data set that the source used before; all its flushes are settled.

        It gets a new lineage: a copy of it, from before its marker is replaced, must not be taken up a second time.
        """
        if self.agreement.forbids_another_redis(judged):
            return ANOTHER_REDIS
        source_row = self.stores.source_row
        async with self.stores.database.transaction() as tx:
            if await source_row.lock(tx) != judged:
                return None
            successor = Marker(uuid4(), judged.last_flush_id, uuid4())
            await source_row.keep_lineage(tx)
            await source_row.continue_lineage(tx, marker.lineage, successor.encode().decode())
            # Redis may be another one since it was judged, so the first flush records which it is.
            await source_row.start_lineage(tx, successor.lineage, successor.nonce, successor.flush_id, None)
        self.agreement.lineage = successor.lineage
        log.warning("data set taken up again", lineage=str(marker.lineage), flush_id=marker.flush_id)
        await self.settler.settle(marker, successor, {})
        return None

    async def _settled_nonce(self, tx: Transaction, row: SourceState) -> UUID | None:
        """The nonce of the last settled flush; None when the ledger no longer has it."""
        if row.settled_id == row.last_flush_id:
            return row.last_nonce
        following = await self.stores.ledger.read_flush(tx, row.settled_id + 1)
        return None if following is None else following.prev_nonce

    async def _refuse(self, cause: str, marker: str) -> Hold | None:
        async with self.stores.database.transaction() as tx:
            if await self.stores.source_row.lock(tx) is None:
                return None
            await self.stores.source_row.refuse(tx, marker)
        return Hold(cause)
