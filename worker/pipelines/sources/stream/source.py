"""A Redis stream as a source: its position is the claim of a batch. docs/pipelines.md has the protocol."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from redis.exceptions import NoPermissionError

from worker.errors import RedisUnavailable
from worker.observability.logs import get_logger
from worker.observability.throttle import Throttle
from worker.pipelines.metrics import count_backlog
from worker.pipelines.model import Batch, Idle, NotClaimed, OnHold, Written
from worker.pipelines.sources.stream.entries import read_entries
from worker.pipelines.sources.stream.evidence import Evidence
from worker.pipelines.sources.stream.judge import (
    Carry,
    CaughtUp,
    Hold,
    Skip,
    Subject,
    Unmarked,
    Verdict,
    Wait,
    judge,
    make_move,
)
from worker.pipelines.sources.stream.look import RIGHTS_FIX, LooksDisagree, NotAllowed
from worker.pipelines.sources.stream.owner import find_owner
from worker.redis.errors import describe

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from worker.db.lease import Lease
    from worker.db.positions import Move, Position, StreamPosition
    from worker.db.session import Database, Transaction
    from worker.pipelines.model import Item, Letter, ReadOutcome, RecordType, Window, WriteOutcome
    from worker.pipelines.observer import StreamObserver
    from worker.pipelines.sources.stream.entries import Entry
    from worker.pipelines.sources.stream.look import Looker, Seen
    from worker.redis.stream import StreamConnection

log = get_logger(__name__)

R = TypeVar("R")

REPLY_BYTES = 8 * 1024 * 1024
BLOCK_S = 5.0
ANSWER_S = 4.0
LOG_PERIOD_S = 3600.0
# Entries that are parsed at a stretch: less than a millisecond.
SLICE = 100
# Entries of the first look, when their size is not known yet; it doubles.
FIRST_LIMIT = 64


@dataclass(frozen=True, slots=True)
class PositionClaim:
    """Moves the position of a stream over the entries of a batch, if this worker still may."""

    position: StreamPosition
    move: Move
    token: UUID

    async def take(self, tx: Transaction) -> bool:
        return await self.position.move(tx, self.move, self.token)


@dataclass(frozen=True, slots=True)
class StreamBatch(Batch[R]):
    """A batch with what the next one builds on: the row as it is after the commit, and where it was read."""

    following: Position | None = None
    backlog: int = 0
    mark: str = ""
    opened: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamReading(Generic[R]):
    """How entries become records, and how many are read at once."""

    record: RecordType[R]
    field: bytes
    window: Window
    batch_size: int
    settings_prefix: str


class StreamSource(Generic[R]):
    """Reads one stream while this worker holds its lease."""

    def __init__(
        self,
        *,
        database: Database,
        position: StreamPosition,
        lease: Lease[UUID],
        looker: Looker,
        waiting: StreamConnection,
        reading: StreamReading[R],
        observer: StreamObserver,
        new_mark: Callable[[], str],
    ) -> None:
        self._database = database
        self._position = position
        self._lease = lease
        self._looker = looker
        self._waiting = waiting
        self._reading = reading
        self._observer = observer
        self._new_mark = new_mark
        self._subject = Subject(position.stream, reading.settings_prefix)
        self._row: Position | None = None
        # The lease's token before the row was read. What is made from the row is claimed with it: the lease may be lost
        # and taken again meanwhile, and another worker move the row to and fro.
        self._token: UUID | None = None
        self._seen: Evidence | None = None
        self._mean_bytes = 1024.0
        self._limit = min(FIRST_LIMIT, reading.batch_size)
        self._throttle = Throttle(LOG_PERIOD_S, time.monotonic)

    async def read(self) -> ReadOutcome[R]:
        """The entries after the position. Raises Unavailable."""
        row = self._row or await self._read_row()
        try:
            seen, verdict = await self._judge(row)
            if isinstance(verdict, Unmarked):
                row, mark = await self._offer_mark(row)
                seen, verdict = await self._judge(row, mark)
        except NotAllowed as error:
            return OnHold(error.cause, error.remedy)
        except LooksDisagree:
            return OnHold("something between the worker and Redis does not keep commands together", PROXY)
        self._observe(row, seen)
        return await self._act(row, seen, verdict)

    async def _act(self, row: Position, seen: Seen, verdict: Verdict) -> ReadOutcome[R]:
        match verdict:
            case Hold(cause, remedy):
                # A worker that lost the lease without knowing it may have judged by a row that another one has moved.
                return OnHold(cause, remedy) if row == await self._read_row() else await self.read()
            case Wait(cause):
                return Idle(cause, keep_lease=False)
            case Unmarked():
                return Idle("the mark could not be created", keep_lease=False)
            case CaughtUp():
                return Idle()
            case Skip(move, went_back):
                if went_back:
                    log.error("Redis went back", stream=self._position.stream, to=str(move.after), high=str(move.high))
                return await self._batch(row, seen, move, [], full=False)
            case Carry():
                return await self._carry(row, seen, verdict)

    async def _judge(self, row: Position, new_mark: str = "") -> tuple[Seen, Verdict]:
        """Look at what follows the position of `row`, and decide. Raises as `Looker.look`."""
        try:
            seen = await self._looker.look(row, row.last, self._count(), new_mark)
        except RedisUnavailable:
            # Perhaps the reply was too large for the time limit.
            self.reset(smaller=True)
            raise
        owner = await find_owner(self._database, self._position, row, seen)
        return seen, judge(row, seen.first, seen.ids, owner, self._subject)

    async def _offer_mark(self, row: Position) -> tuple[Position, str]:
        """Remember a new mark before it is created: only a mark that this row offered is taken over by its commits."""
        mark, token = self._new_mark(), self._lease.token
        async with self._database.transaction() as tx:
            if token is None or not await self._position.offer(tx, mark, token):
                return row, ""
        return await self._read_row(), mark

    async def read_ahead(self, batch: Batch[R]) -> Batch[R] | None:
        """As `read`, after `batch`. Only on the same stream by the same connection; else None."""
        if not isinstance(batch, StreamBatch) or batch.following is None or self._row is None:
            return None
        expected = batch.following
        try:
            # The script mirrors the row that is committed, never that of a batch which is being written.
            seen = await self._looker.look(self._row, expected.last, self._count(), "")
        except (RedisUnavailable, NotAllowed, LooksDisagree):
            return None
        first = seen.first
        if seen.opened != batch.opened or not isinstance(first, Evidence):
            return None
        if first.mark != batch.mark or first.last_id < expected.last:
            return None
        verdict = judge(expected, first, seen.ids, None, self._subject)
        if not isinstance(verdict, Carry) or verdict.takes_mark:
            return None
        return await self._carry(expected, seen, verdict)

    def done(self, batch: Batch[R], outcome: WriteOutcome) -> None:
        """Go on after `batch`, or read the row again: it was moved, by another worker or by this batch before."""
        if isinstance(outcome, Written) and isinstance(batch, StreamBatch) and batch.following is not None:
            if isinstance(batch.claim, PositionClaim):
                self._observer.moved(batch.claim.move, len(batch), batch.backlog)
            self._row = batch.following
            self._limit = min(self._reading.batch_size, self._limit * 2)
        else:
            self._row = None
            if isinstance(outcome, NotClaimed):
                log.info("batch not claimed", stream=self._position.stream)

    def reset(self, *, smaller: bool = False) -> None:
        self._row = None
        if smaller:
            self._limit = max(1, self._limit // 2)

    async def wait(self, seconds: float) -> None:
        """Until an entry comes, at most `seconds`. What the blocking command returns is not used: only looks count."""
        until = asyncio.get_running_loop().time() + seconds
        last = "0-0" if self._seen is None else str(self._seen.last_id)
        while (left := until - asyncio.get_running_loop().time()) > 0:
            block = max(1, round(min(left, BLOCK_S) * 1000))
            command = ("XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", self._position.stream, last)
            try:
                (reply,) = await self._waiting.send([command], BLOCK_S + ANSWER_S)
            except RedisUnavailable as error:
                reply = error
            if isinstance(reply, Exception):
                self._warn_if_not_allowed(reply)
                await asyncio.sleep(left)
            elif reply:
                return

    def _warn_if_not_allowed(self, error: Exception) -> None:
        """Without XREAD everything is still carried, but an entry that comes is found only by the next look."""
        if isinstance(error, NoPermissionError) and self._throttle.allows("xread"):
            stream, cause = self._position.stream, describe(error)
            log.warning("new entries are found late", stream=stream, right="xread", cause=cause, remedy=RIGHTS_FIX)

    async def close(self) -> None:
        await self._waiting.drop()
        await self._looker.connection.drop()

    async def _read_row(self) -> Position:
        self._token = self._lease.token
        async with self._database.transaction() as tx:
            self._row = await self._position.read(tx)
        return self._row

    def _count(self) -> int:
        return max(1, min(self._limit, int(REPLY_BYTES / self._mean_bytes)))

    async def _carry(self, row: Position, seen: Seen, carry: Carry) -> StreamBatch[R]:
        first, second = seen.first, seen.second
        assert isinstance(first, Evidence)  # only such evidence is carried  # noqa: S101
        assert isinstance(second, Evidence)  # it confirmed the first  # noqa: S101
        entries = seen.entries
        mean_bytes = sum(sum(map(len, fields)) for _, fields in entries) / len(entries)
        self._mean_bytes = max(64.0, 0.5 * self._mean_bytes + 0.5 * mean_bytes)
        move = make_move(row, first, second, row.last, entries[-1][0], len(entries), carry)
        return await self._batch(row, seen, move, entries, full=len(entries) >= seen.count)

    async def _batch(
        self, row: Position, seen: Seen, move: Move, entries: list[Entry], *, full: bool
    ) -> StreamBatch[R]:
        items, letters = await self._read_entries(entries)
        following = replace(
            row,
            last=move.after,
            entries_read=move.entries_read,
            high=move.high,
            incarnation=move.incarnation,
            lost=row.lost + move.lost,
            gaps=row.gaps + move.gap,
        )
        return StreamBatch(
            claim=PositionClaim(self._position, move, self._token) if self._token is not None else NO_CLAIM,
            origin=self._position.stream,
            items=items,
            letters=letters,
            full=full,
            oldest=entries[0][0].ms / 1000 if entries else None,
            following=following,
            backlog=count_backlog(following, seen.first) if isinstance(seen.first, Evidence) else 0,
            mark=move.incarnation,
            opened=seen.opened,
        )

    async def _read_entries(self, entries: list[Entry]) -> tuple[list[Item[R]], list[Letter]]:
        """Parse in slices and yield between them, so that the statements of the previous batch are sent meanwhile."""
        reading, stream = self._reading, self._position.stream
        items: list[Item[R]] = []
        letters: list[Letter] = []
        for first in range(0, len(entries), SLICE):
            some = read_entries(entries[first : first + SLICE], reading.record, reading.field, reading.window, stream)
            items += some[0]
            letters += some[1]
            await asyncio.sleep(0)
        return items, letters

    def _observe(self, row: Position, seen: Seen) -> None:
        if isinstance(seen.first, Evidence):
            self._seen = seen.first
            self._observer.looked(row, seen.first)


class _NoClaim:
    """There was no lease when the row was read."""

    async def take(self, _: Any) -> bool:
        return False


NO_CLAIM = _NoClaim()
PROXY = "Connect to Redis without a proxy that spreads the commands of one connection over several servers."
