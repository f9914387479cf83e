"""The positions of streams: how far each stream is carried, moved in the transaction that writes the rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from sqlalchemy import (
    BigInteger,
    Boolean,
    Text,
    Uuid,
    bindparam,
    case,
    cast,
    false,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert

from worker.contract.entry_id import BEGINNING, EntryId
from worker.db.lease import LeaseState
from worker.db.lease_sql import NOW, UNTIL, is_free, is_mine
from worker.db.tables import stream_positions
from worker.db.transaction_settings import APPLY_SETTINGS

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection


# Eight marks of 32 characters, with the spaces between them.
MAX_OFFERS_LENGTH = 8 * 33 - 1


@dataclass(frozen=True, slots=True)
class Position:
    """The row of one stream.

    `last`: the last entry carried. `entries_read`: of all entries ever added, those up to `last`; None: not known.
    `high`: the highest position before Redis went back; None: it never did, or all is carried again. `incarnation`: the
    mark that the stream is expected to have. `candidate`: the last marks offered for this row, newest first, separated
    by spaces. `lost` and `gaps` count entries that were deleted unread, and moments at which their number is not known.
    """

    last: EntryId = BEGINNING
    entries_read: int | None = 0
    high: EntryId | None = None
    incarnation: str | None = None
    candidate: str | None = None
    lost: int = 0
    gaps: int = 0


@dataclass(frozen=True, slots=True)
class Move:
    """A change of the position: from `before` to `after`, with what the row has afterwards."""

    before: EntryId
    after: EntryId
    entries_read: int | None
    high: EntryId | None
    incarnation: str
    lost: int = 0
    gap: bool = False


_row = stream_positions.c
_COLUMNS = (
    _row.last_ms,
    _row.last_seq,
    _row.entries_read,
    _row.high_ms,
    _row.high_seq,
    _row.incarnation,
    _row.candidate,
    _row.lost,
    _row.gaps,
)
_this = (_row.source == bindparam("name"), _row.stream == bindparam("of_stream"))

_ENSURE = upsert(stream_positions).values(
    source=bindparam("name"), stream=bindparam("of_stream"), pipeline=bindparam("of_pipeline")
)
_ENSURE = _ENSURE.on_conflict_do_nothing()
_READ = select(*_COLUMNS).where(*_this)
_EXISTS = select(1).where(*_this)
_MOVE = (
    update(stream_positions)
    .where(
        *_this,
        _row.last_ms == bindparam("a_ms"),
        _row.last_seq == bindparam("a_seq"),
        _row.lease_token == bindparam("token", type_=Uuid),
    )
    .values(
        last_ms=bindparam("b_ms"),
        last_seq=bindparam("b_seq"),
        entries_read=bindparam("read", type_=BigInteger),
        lost=_row.lost + bindparam("more_lost", type_=BigInteger),
        gaps=_row.gaps + case((cast(bindparam("gap", type_=Boolean), Boolean), 1), else_=0),
        high_ms=bindparam("new_high_ms", type_=BigInteger),
        high_seq=bindparam("new_high_seq", type_=BigInteger),
        incarnation=bindparam("mark", type_=Text),
        carried_at=NOW,
        lease_until=UNTIL,
    )
)
_OFFER = (
    update(stream_positions)
    .where(*_this, _row.lease_token == bindparam("token", type_=Uuid))
    # A former holder of the lease may still create the mark that it offered: the ones before count, too.
    .values(candidate=func.left(func.concat_ws(" ", bindparam("mark", type_=Text), _row.candidate), MAX_OFFERS_LENGTH))
)
_SET = (
    update(stream_positions)
    .where(*_this)
    .values(
        last_ms=bindparam("b_ms"),
        last_seq=bindparam("b_seq"),
        entries_read=None,
        high_ms=None,
        high_seq=None,
        incarnation=bindparam("mark", type_=Text),
        # What was carried elsewhere lies above a position that was set back: no other stream is taken over.
        candidate=None,
        lease_holder=None,
        lease_token=bindparam("new_token", type_=Uuid),
        lease_until=None,
    )
)
_OWNER = (
    select(_row.source, _row.stream)
    .where(_row.incarnation == bindparam("mark"))
    .where(or_(_row.source != bindparam("name"), _row.stream != bindparam("of_stream")))
    .limit(1)
)

_mine, _free = is_mine(stream_positions), is_free(stream_positions)
_TAKE_LEASE = (
    update(stream_positions)
    # A locked row is in use by a commit: do not wait for it here.
    .where(
        _row.source == bindparam("name"),
        _row.stream == select(_row.stream).where(*_this, _free).with_for_update(skip_locked=True).scalar_subquery(),
    )
    .values(
        lease_holder=bindparam("me"),
        lease_token=case((_mine, _row.lease_token), else_=bindparam("new_token", type_=Uuid)),
        lease_until=UNTIL,
    )
)
_READ_LEASE = select(_row.lease_holder, _row.lease_token, func.coalesce(_free, false())).where(*_this)
_RELEASE_LEASE = update(stream_positions).where(*_this, _mine).values(lease_holder=None, lease_until=None)


class StreamPosition:
    """The row of one stream of one source. Every method runs in the caller's transaction."""

    def __init__(self, source: str, stream: str, pipeline: str) -> None:
        self.stream = stream
        self._key = {"name": source, "of_stream": stream}
        self._pipeline = pipeline

    async def ensure(self, tx: AsyncConnection) -> None:
        """Insert the row unless it exists."""
        await tx.execute(APPLY_SETTINGS)
        # Look for the row first: ON CONFLICT alone waits for a session that is updating it.
        if (await tx.execute(_EXISTS, self._key)).first() is None:
            await tx.execute(_ENSURE, self._key | {"of_pipeline": self._pipeline})

    async def read(self, tx: AsyncConnection) -> Position:
        """The row; a new one where there is none yet."""
        row = (await tx.execute(_READ, self._key)).one_or_none()
        return Position() if row is None else _position(row)

    async def owner_of(self, tx: AsyncConnection, mark: str) -> str | None:
        """Another row that expects this mark, as `source/stream`; None if there is none."""
        row = (await tx.execute(_OWNER, self._key | {"mark": mark})).one_or_none()
        return None if row is None else f"{row.source}/{row.stream}"

    async def move(self, tx: AsyncConnection, move: Move, token: UUID) -> bool:
        """The claim of a batch. False: the position is another one, or the lease is another worker's."""
        await tx.execute(APPLY_SETTINGS)
        done = await tx.execute(
            _MOVE,
            self._key
            | {
                "a_ms": move.before.ms,
                "a_seq": move.before.seq,
                "b_ms": move.after.ms,
                "b_seq": move.after.seq,
                "token": token,
                "read": move.entries_read,
                "more_lost": move.lost,
                "gap": move.gap,
                "new_high_ms": None if move.high is None else move.high.ms,
                "new_high_seq": None if move.high is None else move.high.seq,
                "mark": move.incarnation,
            },
        )
        return done.rowcount == 1

    async def offer(self, tx: AsyncConnection, mark: str, token: UUID) -> bool:
        """Remember a mark before it is created on the stream. False: the lease is another worker's."""
        await tx.execute(APPLY_SETTINGS)
        return (await tx.execute(_OFFER, self._key | {"mark": mark, "token": token})).rowcount == 1

    async def set(self, tx: AsyncConnection, to: EntryId, mark: str) -> None:
        """Continue after `to`, on the stream with this mark. A batch that is being written is not claimed any more."""
        values = {"b_ms": to.ms, "b_seq": to.seq, "mark": mark, "new_token": uuid4()}
        await tx.execute(APPLY_SETTINGS)
        await tx.execute(_SET, self._key | values)

    async def take_lease(self, tx: AsyncConnection, worker_id: str, dead: str | None = None) -> LeaseState[UUID] | None:
        """Take the lease if it is free, expired, our own, or held by `dead`. A takeover changes the token."""
        await tx.execute(APPLY_SETTINGS)
        done = await tx.execute(_TAKE_LEASE, self._key | {"me": worker_id, "dead": dead, "new_token": uuid4()})
        state = await self.read_lease(tx, worker_id)
        return None if state is None else replace(state, is_renewed=done.rowcount == 1)

    async def read_lease(self, tx: AsyncConnection, worker_id: str) -> LeaseState[UUID] | None:
        """Who has the lease; None: nobody ever had it."""
        row = (await tx.execute(_READ_LEASE, self._key | {"me": worker_id, "dead": None})).one_or_none()
        return None if row is None or row.lease_token is None else LeaseState(*row)

    async def release_lease(self, tx: AsyncConnection, worker_id: str) -> None:
        await tx.execute(APPLY_SETTINGS)
        await tx.execute(_RELEASE_LEASE, self._key | {"me": worker_id})


class ChannelLease(StreamPosition):
    """The row of a channel of one source: it has the lease only, since messages have no position.

    `first_token`: that of the lease before which nobody had one, if this worker was there.
    """

    def __init__(self, source: str, channel: str, pipeline: str) -> None:
        super().__init__(source, f"channel:{channel}", pipeline)
        self.first_token: UUID | None = None

    async def take_lease(self, tx: AsyncConnection, worker_id: str, dead: str | None = None) -> LeaseState[UUID] | None:
        was_held = await self.read_lease(tx, worker_id) is not None
        state = await super().take_lease(tx, worker_id, dead)
        if state is not None and not was_held:
            self.first_token = state.token
        return state


def _position(row: Row[int, int, int | None, int | None, int | None, str | None, str | None, int, int]) -> Position:
    last_ms, last_seq, entries_read, high_ms, high_seq, incarnation, candidate, lost, gaps = row
    high = None if high_ms is None or high_seq is None else EntryId(high_ms, high_seq)
    return Position(EntryId(last_ms, last_seq), entries_read, high, incarnation, candidate, lost, gaps)
