"""The delivery of a batch: which errors are tried again, which are passed on, and what is measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fakes import FakeClock
from worker.errors import DatabaseUnavailable, RedisUnavailable, TableRefused, UnknownFailure
from worker.pipelines.delivery import RETRIES_FIX, Delivery
from worker.pipelines.model import Batch, Item, Letter, NotClaimed, WriteOutcome, Written

Call = tuple[str, Any]


class FreeClaim:
    async def take(self, tx: Any) -> bool:
        return True


class FakeSink:
    """Raises or returns what it was given, one for each write; a write takes half a second."""

    def __init__(self, clock: FakeClock, *outcomes: WriteOutcome | BaseException) -> None:
        self._clock = clock
        self._outcomes: Iterator[WriteOutcome | BaseException] = iter(outcomes)
        self.batches: list[Batch[str]] = []

    async def write(self, batch: Batch[str]) -> WriteOutcome:
        self.batches.append(batch)
        self._clock.advance(0.5)
        outcome = next(self._outcomes)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class Recorder:
    """Implements WriteObserver; `calls` has also the pauses between the tries."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def writing(self, records: int, *, again: bool) -> None:
        self.calls.append(("again" if again else "writing", records))

    def written(self, rows: int, letters: int, seconds: float, latency: float | None) -> None:
        self.calls.append(("written", (rows, letters, seconds, latency)))

    def failed(self, records: int) -> None:
        self.calls.append(("failed", records))

    def exhausted(self, records: int) -> None:
        self.calls.append(("exhausted", records))

    def not_claimed(self) -> None:
        self.calls.append(("not claimed", None))

    async def sleep(self, seconds: float) -> None:
        self.calls.append(("sleep", seconds))


class Case:
    """A delivery of one batch, of two records and a letter, to a sink that behaves as `outcomes` say."""

    def __init__(self, *outcomes: WriteOutcome | BaseException, max_retries: int = 3, age: float | None = 10.0) -> None:
        clock = FakeClock()
        self.observer = Recorder()
        self.sink = FakeSink(clock, *outcomes)
        self.delivery = Delivery(
            self.sink, self.observer, clock, max_retries=max_retries, retry_delay=0.1, sleep=self.observer.sleep
        )
        items = [Item("1-0", b"1", "one"), Item("2-0", b"2", "two")]
        oldest = None if age is None else clock.now().timestamp() - age
        self.batch = Batch(FreeClaim(), "s", items, [Letter("s/3-0", "not_json", "text", b"3")], oldest=oldest)

    async def deliver(self) -> WriteOutcome:
        return await self.delivery.deliver(self.batch)


def unknown() -> UnknownFailure:
    return UnknownFailure("strange")


DONE = Written(rows=2, letters=1)
TRY: list[Call] = [("writing", 3), ("failed", 3)]
TRY_AGAIN: list[Call] = [("again", 3), ("failed", 3)]


@pytest.mark.parametrize(("age", "latency"), [(10.0, 10.5), (None, None), (-10.0, 0.0)])
async def test_written_batch_is_measured(age: float | None, latency: float | None) -> None:
    case = Case(DONE, age=age)
    assert await case.deliver() == DONE
    assert case.observer.calls == [("writing", 3), ("written", (2, 1, 0.5, latency))]


async def test_batch_that_is_not_claimed_is_not_measured_and_not_tried_again() -> None:
    case = Case(NotClaimed())
    assert await case.deliver() == NotClaimed()
    assert case.observer.calls == [("writing", 3), ("not claimed", None)]


async def test_unknown_failure_is_tried_again_with_the_same_batch() -> None:
    case = Case(unknown(), unknown(), DONE)
    assert await case.deliver() == DONE
    again = [("sleep", 0.1), *TRY_AGAIN, ("sleep", 0.2), ("again", 3), ("written", (2, 1, 0.5, 11.5))]
    assert case.observer.calls == TRY + again
    assert all(batch is case.batch for batch in case.sink.batches)


async def test_retry_may_find_that_the_batch_was_written() -> None:
    case = Case(unknown(), NotClaimed())
    assert await case.deliver() == NotClaimed()
    assert case.observer.calls == [*TRY, ("sleep", 0.1), ("again", 3), ("not claimed", None)]


async def test_three_retries_are_four_tries_and_then_the_table_refuses() -> None:
    failures = [unknown() for _ in range(4)]
    case = Case(*failures)
    with pytest.raises(TableRefused, match="strange") as caught:
        await case.deliver()
    assert caught.value.remedy == RETRIES_FIX
    assert caught.value.__cause__ is failures[-1]
    pauses = [seconds for call, seconds in case.observer.calls if call == "sleep"]
    assert pauses == [0.1, 0.2, 0.4]
    assert case.observer.calls[-3:] == [*TRY_AGAIN, ("exhausted", 3)]
    assert len(case.sink.batches) == 4


async def test_without_retries_the_first_failure_is_the_last() -> None:
    case = Case(unknown(), max_retries=0)
    with pytest.raises(TableRefused):
        await case.deliver()
    assert case.observer.calls == [*TRY, ("exhausted", 3)]


@pytest.mark.parametrize(
    "error",
    [DatabaseUnavailable("down"), RedisUnavailable("down"), TableRefused("missing", "Create it.")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("tries_before", [0, 1])
async def test_other_errors_pass_at_once(error: Exception, tries_before: int) -> None:
    case = Case(*[unknown()] * tries_before, error)
    with pytest.raises(type(error)) as caught:
        await case.deliver()
    assert caught.value is error
    assert case.observer.calls == (TRY if not tries_before else [*TRY, ("sleep", 0.1), *TRY_AGAIN])


async def test_tries_are_counted_for_each_batch() -> None:
    case = Case(unknown(), DONE, unknown(), DONE, max_retries=1)
    assert await case.deliver() == DONE
    assert await case.deliver() == DONE
