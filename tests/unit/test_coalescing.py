"""A buffer that keeps the newest document of each key, and the batches that are made of it."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.fakes import FakeClock
from worker.contract.entry_id import EntryId
from worker.pipelines.batcher import Closed, CoalescingBatcher
from worker.pipelines.buffer import MAX_GROWTH_BYTES, OVERHEAD_BYTES, Buffer, ByteBudget
from worker.pipelines.model import NotClaimed, Window
from worker.pipelines.records.session_events import SESSION_EVENTS, SessionEvent, SessionUpdate, coalesce_by
from worker.pipelines.sources.buffered import BufferedBatch, BufferedSource

AGE = 10.0
SIZE = 3
CAPACITY = 6


def make_buffer(clock: FakeClock, *, limit: int = 10**6, capacity: int = CAPACITY, size: int = SIZE) -> Buffer:
    return Buffer(
        CoalescingBatcher(size, AGE),
        batch_size=size,
        capacity=capacity,
        budget=ByteBudget(limit),
        monotonic=clock.monotonic,
        on_due=lambda: None,
    )


class CoalescingModel(RuleBasedStateMachine):
    """A buffer against a dict of the documents that wait and a list of the batches that were taken."""

    LIMIT = 5 * (OVERHEAD_BYTES + 20)

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.buffer = make_buffer(self.clock, limit=self.LIMIT)
        self.waiting: dict[object, bytes] = {}
        self.taken: list[tuple[Closed[bytes], list[bytes]]] = []
        self.accepted = self.coalesced = self.number = 0

    @property
    def held(self) -> list[bytes]:
        return [*self.waiting.values(), *(document for _, batch in self.taken for document in batch)]

    @property
    def bytes(self) -> int:
        return sum(len(document) + OVERHEAD_BYTES for document in self.held)

    @rule(key=st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h", None]), size=st.integers(5, 60) | st.just(1500))
    def add(self, key: str | None, size: int) -> None:
        self.number += 1
        document = b"%0*d" % (size, self.number)
        slot: object = object() if key is None else key
        has_room = len(self.held) < CAPACITY and self.bytes + size + OVERHEAD_BYTES <= self.LIMIT
        replaces = slot in self.waiting
        if replaces:
            growth = size - len(self.waiting[slot])
            has_room = growth <= MAX_GROWTH_BYTES or self.bytes + growth <= self.LIMIT
        accepted = self.buffer.add(document, slot)
        assert accepted == (has_room and not self.buffer.is_closed)
        if accepted:
            self.waiting[slot] = document
            self.accepted += 1
            self.coalesced += replaces

    @rule(seconds=st.sampled_from([1.0, 9.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(flush=st.booleans())
    def take(self, flush: bool) -> None:
        is_due = self.buffer.due() == 0
        closed = self.buffer.take(flush_to=self.buffer.added if flush else 0)
        assert (closed is not None) == (is_due or (flush and bool(self.waiting)))
        if closed is not None:
            documents = [self.waiting.pop(key) for key in list(self.waiting)[:SIZE]]
            assert [document for _, document in closed.items] == documents
            self.taken.append((closed, documents))

    @rule(last=st.booleans())
    def release(self, last: bool) -> None:
        if self.taken:
            _, documents = self.taken.pop(-1 if last else 0)
            self.buffer.release(len(documents), sum(map(len, documents)))

    @rule()
    def clear(self) -> None:
        if self.number % 7 == 0:
            self.buffer.clear()
            self.waiting, self.taken = {}, []

    @rule()
    def close(self) -> None:
        if self.number > 30:
            self.buffer.close()

    @invariant()
    def counts_agree(self) -> None:
        assert (self.buffer.held, len(self.buffer)) == (len(self.held), len(self.waiting))
        assert (self.buffer.accepted, self.buffer.coalesced) == (self.accepted, self.coalesced)
        assert self.buffer.added == self.accepted - self.coalesced
        assert self.buffer._budget.held == self.buffer._bytes == self.bytes

    @invariant()
    def taken_batches_do_not_change(self) -> None:
        for closed, documents in self.taken:
            assert [document for _, document in closed.items] == documents


TestCoalescingModel = CoalescingModel.TestCase
TestCoalescingModel.settings = settings(max_examples=80)


def test_a_full_buffer_takes_a_key_that_waits_but_not_one_that_is_being_written() -> None:
    buffer = make_buffer(FakeClock(), capacity=2, size=1)
    assert [buffer.add(b"1", "a"), buffer.add(b"1", "b"), buffer.add(b"1", "c")] == [True, True, False]
    assert buffer.add(b"2", "a")
    closed = buffer.take()
    assert closed is not None
    assert not buffer.add(b"3", "a")
    assert buffer.add(b"2", "b")
    assert [document for _, document in closed.items] == [b"2"]


# What may take the place of another


@pytest.mark.parametrize(
    "update",
    [
        SessionUpdate("", "e"),
        SessionUpdate("s", ""),
        SessionUpdate("s", "x" * 257),
        SessionUpdate("ü" * 129, "e"),
        SessionUpdate("s", "a\0b"),
        SessionUpdate("s", "\ud800"),
        SessionUpdate("s", 5),  # type: ignore[arg-type]
        SessionUpdate(["s"], "e"),  # type: ignore[arg-type]
        SessionUpdate(None, None),  # type: ignore[arg-type]
    ],
)
def test_an_update_that_becomes_a_dead_letter_has_no_key(update: SessionUpdate) -> None:
    assert coalesce_by(update) is None


def test_the_key_of_an_update_is_its_session() -> None:
    assert coalesce_by(SessionUpdate("s" * 256, "ü" * 128)) == "s" * 256


# Positions


class Case:
    """A source of batches of at most two sessions."""

    def __init__(self) -> None:
        self.clock = ShiftedClock()
        self.buffer = make_buffer(self.clock, size=2, capacity=100)
        numbers = iter(range(1, 1000))
        self.source: BufferedSource[SessionEvent] = BufferedSource(
            SESSION_EVENTS, Window(60, 60), self.buffer, self.clock, lambda: UUID(int=next(numbers))
        )

    def add(self, session: str, event: str = "e") -> None:
        document = f'{{"session_id":"{session}","event_id":"{event}"}}'.encode()
        assert self.buffer.add(document, session if event else object())

    async def read(self) -> BufferedBatch[SessionEvent]:
        batch = await self.source.read()
        assert isinstance(batch, BufferedBatch)
        self.source.done(batch, NotClaimed())
        return batch


class ShiftedClock(FakeClock):
    """Its wall clock is `shift` seconds ahead."""

    shift = 0.0

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=self.shift)


def positions(batch: BufferedBatch[SessionEvent]) -> dict[str, EntryId]:
    found = [item.record for item in batch.items]
    return {record.session_id: EntryId(record.position_ms, record.position_seq) for record in found}


async def test_a_position_is_the_time_of_acceptance_also_behind_a_slot_that_was_replaced_later() -> None:
    """Else an event that waited would be newer than those that other processes accepted meanwhile."""
    case = Case()
    case.add("a", "old")
    case.clock.advance(1)
    for session in "bcd":
        case.add(session)
    accepted = int(case.clock.now().timestamp() * 1000)
    case.clock.advance(60)
    case.add("a", "new")
    first, second = positions(await case.read()), positions(await case.read())
    assert {session: position.ms - accepted for session, position in (first | second).items()} == {
        "a": 60_000,
        "b": 0,
        "c": 0,
        "d": 0,
    }


async def test_positions_of_a_session_grow_within_a_millisecond_and_when_the_clock_is_set_back() -> None:
    case = Case()
    found: list[EntryId] = []
    for shift in (0.0, 0.0, -3600.0, -3600.0, 5.0, -7200.0):
        case.clock.shift = shift
        case.add("a")
        case.add("b")
        found.append(positions(await case.read())["a"])
        if shift:
            case.clock.advance(0.002)
    assert found == sorted(set(found))


async def test_a_letter_has_its_position_so_that_a_replay_knows_its_age() -> None:
    case = Case()
    accepted = int(case.clock.now().timestamp() * 1000)
    case.add("a")
    case.add("a", "")
    batch = await case.read()
    (item,), (letter,) = batch.items, batch.letters
    assert (item.key, letter.origin) == (EntryId(accepted, 0), f"{UUID(int=1)}/{accepted}-1")


async def test_the_oldest_of_a_batch_is_the_one_that_was_accepted_first() -> None:
    case = Case()
    case.add("a")
    case.clock.advance(1)
    case.add("b")
    accepted = case.clock.now().timestamp()
    case.clock.advance(5)
    case.add("a")
    assert (await case.read()).oldest == pytest.approx(accepted)
