"""A drain writes each batch until it is clear what became of it, and counts every record once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import FakeClock
from worker.errors import DatabaseUnavailable, TableRefused, UnknownFailure, WriteTooSlow
from worker.observability.throttle import Throttle
from worker.pipelines import drain as drain_module
from worker.pipelines.batcher import Batcher
from worker.pipelines.buffer import Buffer, ByteBudget
from worker.pipelines.delivery import Delivery
from worker.pipelines.drain import GIVE_UP_S, HOLD_S, LAST_PAUSE_S, WAIT_S, Drain, Tally
from worker.pipelines.model import Batch, CommitUnanswered, NotClaimed, Window, WriteOutcome, Written
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS, ChunkEvent
from worker.pipelines.sources.buffered import BufferedSource
from worker.runtime.backoff import Backoff

Outcome = WriteOutcome | BaseException | Callable[[Batch[Any]], WriteOutcome]
GOOD = b'{"time": 1704067200000, "path": "/%d"}'


def whole(batch: Batch[Any]) -> Written:
    """Every record of the batch is written."""
    return Written(rows=len(batch.items), letters=len(batch.letters))


class TwoClocks(FakeClock):
    """The clock on the wall may be set while the other one runs on."""

    def __init__(self) -> None:
        super().__init__()
        self.set_forward = timedelta()

    def now(self) -> datetime:
        return datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=self.monotonic() - 1000) + self.set_forward


class NoObserver:
    """Implements WriteObserver."""

    def writing(self, records: int, *, again: bool) -> None: ...
    def written(self, written: Written, seconds: float, latency: float | None) -> None: ...
    def failed(self, records: int) -> None: ...
    def exhausted(self, records: int) -> None: ...
    def not_claimed(self) -> None: ...


@dataclass
class ScriptedSink:
    """Behaves as `outcomes` say, one for each write; a callable is called with the batch."""

    outcomes: Iterator[Outcome]
    batches: list[Batch[Any]] = field(default_factory=list)
    isolated: list[bool] = field(default_factory=list)
    on_write: Callable[[], None] = lambda: None
    reaches_commit: bool = True

    async def write(
        self, batch: Batch[Any], *, isolate: bool = False, before_commit: Callable[[], None] = lambda: None
    ) -> WriteOutcome:
        self.batches.append(batch)
        self.isolated.append(isolate)
        self.on_write()
        if self.reaches_commit:
            before_commit()
        await asyncio.sleep(0)
        outcome = next(self.outcomes)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome(batch) if callable(outcome) else outcome

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


class Case:
    """One drain with `records` accepted records, and `bad` ones, in batches of at most `batch_size`."""

    def __init__(
        self, *outcomes: Outcome, records: int = 4, bad: int = 0, batch_size: int = 10, max_retries: int = 2
    ) -> None:
        self.clock = TwoClocks()
        self.sink = ScriptedSink(iter(outcomes))
        self.tally = Tally()
        self.closing = asyncio.Event()
        self.buffer = Buffer(
            Batcher(batch_size, 1.0),
            batch_size=batch_size,
            capacity=100,
            budget=ByteBudget(10**6),
            monotonic=self.clock.monotonic,
            on_due=lambda: None,
        )
        for number in range(records):
            assert self.buffer.add(GOOD % number)
        for _ in range(bad):
            assert self.buffer.add(b"{")
        source: BufferedSource[ChunkEvent] = BufferedSource(CHUNK_REQUESTS, Window(1e9, 1e9), self.buffer, self.clock)
        delivery = Delivery(self.sink, NoObserver(), self.clock, max_retries=max_retries, retry_delay=0.1)
        warnings = Throttle(60.0, self.clock.monotonic)
        self.drain = Drain(source, delivery, self.tally, self.clock, self.closing, warnings)

    async def run(self) -> Tally:
        """Until everything is written. Returns what became of the records; their capacity must be free."""
        self.buffer.close()
        await self.drain.run()
        assert self.buffer.held == 0
        return self.tally

    async def cancel_when(self, condition: Callable[[], bool]) -> Tally:
        self.buffer.close()
        task = asyncio.create_task(self.drain.run())
        while not condition():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return self.tally


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses, in seconds; each lasts one step of the event loop."""
    seconds: list[float] = []
    sleep = asyncio.sleep

    async def wait(delay: float, *_: object) -> None:
        if delay:
            seconds.append(delay)
        await sleep(0)

    monkeypatch.setattr(drain_module, "wait_first", wait)
    monkeypatch.setattr(drain_module.asyncio, "sleep", wait)
    return seconds


DOWN = DatabaseUnavailable("down")
SLOW = WriteTooSlow("too slow")
STRANGE = UnknownFailure("strange")
MISSING = TableRefused("missing", "Create it.")


def unanswered(records: int = 4) -> CommitUnanswered:
    return CommitUnanswered("lost", Written(rows=records))


async def test_batches_are_written_in_order_and_counted() -> None:
    case = Case(whole, whole, records=4, bad=3, batch_size=4)
    assert await case.run() == Tally(written=4, dead=3)
    assert case.sink.sizes == [4, 3]


async def test_what_the_sink_reports_is_counted_as_such() -> None:
    case = Case(Written(rows=1, letters=1, repeated=1, dropped=1))
    assert await case.run() == Tally(written=1, repeated=1, dead=1, dropped=1)


@pytest.mark.parametrize(
    ("error", "longest"), [(DOWN, WAIT_S), (MISSING, HOLD_S)], ids=["database away", "table does not fit"]
)
async def test_what_heals_is_tried_for_ever_with_longer_and_longer_pauses(
    error: Exception, longest: float, waits: list[float]
) -> None:
    case = Case(*[error] * 200, whole)
    assert await case.run() == Tally(written=4)
    assert len(waits) == 200
    assert all(longest / 2 <= pause <= longest for pause in waits[20:])
    assert waits[0] <= 1
    assert not any(case.sink.isolated)
    assert {batch.claim for batch in case.sink.batches} == {case.sink.batches[0].claim}


async def test_pauses_start_again_after_a_write(waits: list[float]) -> None:
    case = Case(*[DOWN] * 9, whole, DOWN, whole, records=4, batch_size=2)
    await case.run()
    assert waits[8] > 1
    assert waits[9] <= 0.1


async def test_after_the_tries_for_an_unknown_error_each_record_is_tried_alone() -> None:
    case = Case(STRANGE, STRANGE, STRANGE, Written(rows=3, letters=1))
    assert await case.run() == Tally(written=3, dead=1)
    assert case.sink.isolated == [False, False, False, True]


async def test_what_fails_even_alone_is_dropped_and_the_next_batch_is_not() -> None:
    case = Case(*[STRANGE] * 6, whole, records=4, batch_size=2)
    assert await case.run() == Tally(written=2, dropped=2)
    assert case.sink.isolated == [False] * 3 + [True] * 3 + [False]


async def test_a_mistake_in_the_program_does_not_end_the_drain() -> None:
    case = Case(*[ZeroDivisionError()] * 6, whole, records=4, batch_size=2)
    assert await case.run() == Tally(written=2, dropped=2)


async def test_errors_that_heal_are_no_tries() -> None:
    case = Case(STRANGE, DOWN, STRANGE, MISSING, DOWN, whole)
    assert await case.run() == Tally(written=4)
    assert not any(case.sink.isolated)


@given(st.integers(0, 5), st.lists(st.sampled_from([DOWN, MISSING, STRANGE]), max_size=30))
def test_every_failure_but_the_unknown_ones_leaves_the_number_of_tries(retries: int, errors: list[Exception]) -> None:
    case = Case(*errors, *[whole] * 2, records=4, max_retries=retries)
    asyncio.run(case.run())
    tries = retries + 1
    strange = sum(error is STRANGE for error in errors)
    if strange < 2 * tries:
        assert case.tally == Tally(written=4)
        assert case.sink.isolated[-1] == (strange >= tries)
    else:
        assert case.tally == Tally(dropped=4)


@given(st.floats(0.001, 10), st.floats(0.001, 100), st.integers(1, 2000), st.integers())
def test_pauses_lie_between_half_and_the_whole_of_a_bounded_step(
    first: float, cap: float, tries: int, seed: int
) -> None:
    backoff = Backoff(first=first, cap=cap, rng=random.Random(seed))
    pauses = [backoff.next() for _ in range(tries)]
    for number, pause in enumerate(pauses):
        step = min(cap, first * 2.0 ** min(number, 30))
        assert step / 2 <= pause <= step
    backoff.reset()
    assert backoff.next() <= min(first, cap)


async def test_a_batch_that_takes_too_long_is_halved_until_it_does_not(waits: list[float]) -> None:
    def slow_if_large(batch: Batch[Any]) -> Written:
        if len(batch.items) > 2:
            raise SLOW
        return whole(batch)

    case = Case(*[slow_if_large] * 9, records=7, bad=1)
    assert await case.run() == Tally(written=7, dead=1)
    assert case.sink.sizes == [8, 4, 2, 2, 4, 2, 2]
    done = [batch for batch in case.sink.batches if len(batch.items) <= 2]
    assert [item.record.path for batch in done for item in batch.items] == [f"/{number}" for number in range(7)]
    assert len({batch.claim for batch in case.sink.batches}) == 7
    assert waits == []


async def test_a_single_record_that_takes_too_long_is_tried_again() -> None:
    case = Case(SLOW, SLOW, whole, records=1, bad=1)
    assert await case.run() == Tally(written=1, dead=1)
    assert case.sink.sizes == [2, 2, 2]


async def test_a_batch_that_may_be_written_is_not_halved() -> None:
    """Its halves would have other tickets."""
    case = Case(unanswered(), SLOW, SLOW, whole)
    assert await case.run() == Tally(written=4)
    assert len({batch.claim for batch in case.sink.batches}) == 1


async def test_a_batch_that_may_be_written_is_not_dropped() -> None:
    case = Case(unanswered(), *[STRANGE] * 9, NotClaimed())
    assert await case.run() == Tally(written=4)


async def test_a_commit_without_an_answer_that_had_happened_counts_once() -> None:
    written = Written(rows=1, letters=1, repeated=2)
    case = Case(CommitUnanswered("lost", written), DOWN, NotClaimed())
    assert await case.run() == Tally(written=1, dead=1, repeated=2)


async def test_a_commit_without_an_answer_that_had_not_happened_counts_once() -> None:
    case = Case(unanswered(), unanswered(), whole)
    assert await case.run() == Tally(written=4)


@pytest.mark.parametrize("clock", ["monotonic", "wall"])
async def test_a_batch_that_may_be_written_is_given_up_as_unknown_before_its_ticket_is_pruned(clock: str) -> None:
    case = Case(unanswered(2), *[DOWN] * 13, whole, records=4, batch_size=2)

    def pass_an_hour() -> None:
        if clock == "wall":
            case.clock.set_forward += timedelta(seconds=GIVE_UP_S / 12)
        else:
            case.clock.advance(GIVE_UP_S / 12)
            case.clock.set_forward -= timedelta(seconds=GIVE_UP_S / 12)

    case.sink.on_write = pass_an_hour
    assert await case.run() == Tally(written=2, unknown=2)


async def test_a_batch_that_is_certainly_not_written_is_never_given_up() -> None:
    case = Case(*[DOWN] * 30, whole)
    case.sink.on_write = lambda: case.clock.advance(3600)
    assert await case.run() == Tally(written=4)


async def test_a_write_that_is_cancelled_is_unknown() -> None:
    case = Case(whole, whole, records=5, batch_size=3)
    assert await case.cancel_when(lambda: len(case.sink.batches) == 2) == Tally(written=3, unknown=2)


async def test_a_write_that_is_cancelled_before_its_commit_leaves_the_records_unwritten() -> None:
    case = Case(DOWN)
    case.sink.reaches_commit = False
    assert await case.cancel_when(lambda: len(case.sink.batches) == 1) == Tally()


async def test_a_pause_that_is_cancelled_leaves_the_records_unwritten() -> None:
    case = Case(*[DOWN] * 9)
    assert await case.cancel_when(lambda: case.drain.pausing == 4) == Tally()
    assert case.drain.pausing == 0


async def test_a_pause_after_a_commit_without_an_answer_that_is_cancelled_is_unknown() -> None:
    case = Case(unanswered(), *[DOWN] * 9)
    assert await case.cancel_when(lambda: case.drain.pausing == 4) == Tally(unknown=4)


async def test_a_half_that_is_cancelled_leaves_the_other_half_as_it_is() -> None:
    case = Case(SLOW, whole, *[DOWN] * 9)
    assert await case.cancel_when(lambda: case.drain.pausing == 2) == Tally(written=2)


async def test_pauses_are_short_while_the_application_waits(waits: list[float]) -> None:
    case = Case(*[MISSING] * 20, whole)
    case.closing.set()
    assert await case.run() == Tally(written=4)
    assert max(waits) == LAST_PAUSE_S
