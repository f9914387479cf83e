"""What an application sends, as a source: batches with tickets, in the order in which records were accepted."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from tests.support.fakes import FakeClock
from worker.pipelines import drain
from worker.pipelines.batcher import Batcher
from worker.pipelines.buffer import Buffer, ByteBudget
from worker.pipelines.model import Batch, Idle, NotClaimed, Window
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS, ChunkEvent
from worker.pipelines.sources.buffered import BufferedBatch, BufferedSource
from worker.pipelines.sources.stream.entries import KEPT_BYTES, MAX_ENTRY_BYTES


class Case:
    """A source of batches of at most three records, or of one second."""

    def __init__(self, batch_size: int = 3) -> None:
        self.clock = FakeClock()
        self.buffer = Buffer(
            Batcher(batch_size, 1.0),
            batch_size=batch_size,
            capacity=1000,
            budget=ByteBudget(10**8),
            monotonic=self.clock.monotonic,
            on_due=lambda: self.source.wake(),
        )
        numbers = iter(range(1, 1000))
        self.source: BufferedSource[ChunkEvent] = BufferedSource(
            CHUNK_REQUESTS, Window(60, 60), self.buffer, self.clock, lambda: UUID(int=next(numbers))
        )

    def add(self, *documents: str | bytes) -> None:
        for document in documents:
            assert self.buffer.add(document if isinstance(document, bytes) else self.good(document))

    def good(self, path: str) -> bytes:
        return f'{{"time": "{self.clock.now().isoformat()}", "path": "{path}"}}'.encode()

    async def read(self) -> list[str] | None:
        """The paths of the next batch; None where there is none yet."""
        read = await self.source.read()
        if isinstance(read, Idle):
            return None
        assert isinstance(read, BufferedBatch)
        return paths(read)


def paths(batch: Batch[ChunkEvent]) -> list[str]:
    return [item.record.path for item in batch.items]


async def test_full_batches_are_read_at_once_and_the_rest_when_it_is_old() -> None:
    case = Case()
    case.add("a", "b", "c", "d")
    assert await case.read() == ["a", "b", "c"]
    assert await case.read() is None
    case.clock.advance(1)
    assert await case.read() == ["d"]


async def test_a_record_is_judged_as_of_its_arrival() -> None:
    """It may have waited for hours in the buffer, because the database was away."""
    case = Case()
    case.add("a", "b")
    case.clock.advance(3600)
    case.add(case.good("c").replace(b"2024", b"2023"))
    batch = await case.source.next()
    assert batch is not None
    assert paths(batch) == ["a", "b"]
    assert [(letter.origin, letter.error_class) for letter in batch.letters] == [
        (f"{UUID(int=1)}/2", "time_out_of_range")
    ]
    assert batch.oldest == case.clock.now().timestamp() - 3600


async def test_what_is_no_record_becomes_a_letter_with_its_place_in_the_batch() -> None:
    case = Case()
    case.add("a", b"{", b"x" * (MAX_ENTRY_BYTES + 1))
    batch = await case.source.next()
    assert batch is not None
    ticket = UUID(int=1)
    assert (batch.origin, paths(batch), [item.key for item in batch.items]) == (str(ticket), ["a"], [0])
    assert [(letter.origin, letter.error_class, letter.payload) for letter in batch.letters] == [
        (f"{ticket}/1", "not_json", b"{"),
        (f"{ticket}/2", "too_large", b"x" * KEPT_BYTES),
    ]


async def test_readers_that_compete_share_the_batches() -> None:
    case = Case()
    readers = [asyncio.create_task(case.source.next()) for _ in range(3)]
    await asyncio.sleep(0)
    case.add(*"abcdef")
    case.buffer.close()
    batches = await asyncio.gather(*readers)
    assert sorted(paths(batch) for batch in batches if batch is not None) == [["a", "b", "c"], ["d", "e", "f"]]
    assert batches.count(None) == 1


async def test_a_reader_that_waits_is_woken_by_a_full_batch_and_by_the_end() -> None:
    case = Case()
    reader = asyncio.create_task(case.source.next())
    await asyncio.sleep(0)
    case.add("a", "b", "c")
    batch = await reader
    assert batch is not None
    assert paths(batch) == ["a", "b", "c"]
    reader = asyncio.create_task(case.source.next())
    await asyncio.sleep(0)
    await case.source.close()
    assert await reader is None


async def test_what_waits_is_read_after_the_end() -> None:
    case = Case()
    case.add("a")
    await case.source.close()
    assert await case.read() == ["a"]
    assert await case.source.next() is None


async def test_flush_waits_for_what_was_accepted_before_it_and_not_for_more() -> None:
    case = Case(batch_size=2)
    case.add("a", "b", "c")
    flush = asyncio.create_task(case.source.flush())
    await asyncio.sleep(0)
    batches = [await case.source.next() for _ in range(2)]
    assert [paths(batch) for batch in batches if batch] == [["a", "b"], ["c"]]
    case.add("d")
    for batch in reversed(batches):  # they may be written in any order
        assert not flush.done()
        assert batch is not None
        case.source.done(batch, NotClaimed())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert flush.done()
    assert await flush
    assert case.buffer.held == 1


async def test_flush_waits_for_an_old_batch_while_newer_ones_are_done() -> None:
    case = Case(batch_size=2)
    case.add("a", "b", "c", "d")
    old, newer = [await case.source.next() for _ in range(2)]
    flush = asyncio.create_task(case.source.flush())
    await asyncio.sleep(0)
    case.add("e", "f")
    assert await case.source.next() is not None
    for batch, is_done in ((newer, False), (old, True)):
        assert batch is not None
        case.source.done(batch, NotClaimed())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert flush.done() is is_done
    assert await flush


async def test_flush_without_records_returns() -> None:
    assert await Case().source.flush()


async def test_flush_ends_where_nobody_reads_any_more() -> None:
    case = Case()
    case.add("a")
    flush = asyncio.create_task(case.source.flush())
    await asyncio.sleep(0)
    case.source.abandon()
    assert not await flush
    assert not await case.source.flush()


async def test_a_batch_whose_reading_is_cancelled_is_never_reported_as_done() -> None:
    case = Case(batch_size=300)
    case.add(*[str(number) for number in range(300)])
    reader = asyncio.create_task(case.source.next())
    await asyncio.sleep(0)  # it pauses after each hundred
    flush = asyncio.create_task(case.source.flush())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert not flush.done()
    assert case.buffer.held == 300
    case.source.abandon()
    assert not await flush


async def test_a_cancelled_reader_leaves_its_turn_to_the_next_one() -> None:
    case = Case()
    first, second = (asyncio.create_task(case.source.next()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    case.add("a", "b", "c")
    batch = await second
    assert batch is not None
    assert paths(batch) == ["a", "b", "c"]
    assert first.cancelled()


async def test_halves_have_their_own_tickets_and_keep_the_places_of_the_records() -> None:
    case = Case(batch_size=4)
    case.add("a", b"{", "b", "c")
    batch = await case.source.next()
    assert batch is not None
    first, second = case.source.halve(batch)
    assert (paths(first), paths(second)) == (["a"], ["b", "c"])
    assert [item.key for half in (first, second) for item in half.items] == [0, 2, 3]
    assert (first.letters, second.letters) == (batch.letters, ())
    assert len({batch.claim, first.claim, second.claim}) == 3
    assert (first.origin, second.origin) == (str(UUID(int=2)), str(UUID(int=3)))
    assert first.oldest == second.oldest == batch.oldest


async def test_reset_reads_what_is_not_done_again_with_its_ticket() -> None:
    case = Case()
    case.add(*"abcdef")
    first, second = [await case.source.next() for _ in range(2)]
    assert first is not None
    case.source.done(first, NotClaimed())
    case.source.reset()
    assert await case.source.read() is second
    assert await case.source.read() == Idle()


def test_a_batch_is_given_up_long_before_its_ticket_is_pruned() -> None:
    from worker.inprocess.ticket_pruning import TICKET_AGE

    assert TICKET_AGE.total_seconds() / 2 >= drain.GIVE_UP_S
