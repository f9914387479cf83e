"""The delivery of a batch: how tries are counted, which errors are passed on, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.fakes import FakeClock
from worker.errors import (
    DatabaseUnavailable,
    RedisUnavailable,
    RetriesExhausted,
    TableRefused,
    UnknownFailure,
)
from worker.pipelines.delivery import MAX_PAUSE_S, Delivery
from worker.pipelines.model import Batch, CommitUnanswered, Item, Letter, NotClaimed, WriteOutcome, Written

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
        self.isolated: list[bool] = []

    async def write(
        self, batch: Batch[str], *, isolate: bool = False, before_commit: Callable[[], None] = lambda: None
    ) -> WriteOutcome:
        self.isolated.append(isolate)
        self.batches.append(batch)
        self._clock.advance(0.5)
        outcome = next(self._outcomes)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class Recorder:
    """Implements WriteObserver."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def writing(self, records: int, *, again: bool) -> None:
        self.calls.append(("again" if again else "writing", records))

    def written(self, written: Written, seconds: float, latency: float | None) -> None:
        self.calls.append(("written", (written, seconds, latency)))

    def failed(self, records: int) -> None:
        self.calls.append(("failed", records))

    def exhausted(self, records: int) -> None:
        self.calls.append(("exhausted", records))

    def not_claimed(self) -> None:
        self.calls.append(("not claimed", None))


class Case:
    """A delivery of one batch, of two records and a letter, to a sink that behaves as `outcomes` say."""

    def __init__(self, *outcomes: WriteOutcome | BaseException, max_retries: int = 3, age: float | None = 10.0) -> None:
        clock = FakeClock()
        self.observer = Recorder()
        self.sink = FakeSink(clock, *outcomes)
        self.delivery = Delivery(self.sink, self.observer, clock, max_retries=max_retries, retry_delay=0.1)
        items = [Item("1-0", b"1", "one"), Item("2-0", b"2", "two")]
        oldest = None if age is None else clock.now().timestamp() - age
        self.batch = Batch(FreeClaim(), "s", items, [Letter("s/3-0", "not_json", "text", b"3")], oldest=oldest)

    async def deliver(self, *, isolate: bool = False) -> WriteOutcome:
        return await self.delivery.deliver(self.batch, isolate=isolate)

    async def fail(self, times: int) -> None:
        for _ in range(times):
            with pytest.raises(UnknownFailure):
                await self.deliver()


def unknown() -> UnknownFailure:
    return UnknownFailure("strange")


DONE = Written(rows=2, letters=1)
TRY: list[Call] = [("writing", 3), ("failed", 3)]
TRY_AGAIN: list[Call] = [("again", 3), ("failed", 3)]


@pytest.mark.parametrize(("age", "latency"), [(10.0, 10.5), (None, None), (-10.0, 0.0)])
async def test_written_batch_is_measured(age: float | None, latency: float | None) -> None:
    case = Case(DONE, age=age)
    assert await case.deliver() == DONE
    assert case.observer.calls == [("writing", 3), ("written", (DONE, 0.5, latency))]


async def test_batch_that_is_not_claimed_is_not_measured() -> None:
    case = Case(NotClaimed())
    assert await case.deliver() == NotClaimed()
    assert case.observer.calls == [("writing", 3), ("not claimed", None)]


async def test_each_call_writes_the_batch_once() -> None:
    case = Case(unknown(), DONE)
    await case.fail(1)
    assert case.observer.calls == TRY
    assert await case.deliver(isolate=True) == DONE
    assert case.observer.calls == [*TRY, ("again", 3), ("written", (DONE, 0.5, 11.0))]
    assert case.sink.isolated == [False, True]


async def test_three_retries_are_four_tries() -> None:
    failures = [unknown() for _ in range(4)]
    case = Case(*failures)
    await case.fail(3)
    with pytest.raises(RetriesExhausted, match="strange") as caught:
        await case.deliver()
    assert caught.value.__cause__ is failures[-1]
    assert case.observer.calls[-3:] == [*TRY_AGAIN, ("exhausted", 3)]
    assert len(case.sink.batches) == 4


async def test_without_retries_the_first_failure_is_the_last() -> None:
    case = Case(unknown(), max_retries=0)
    with pytest.raises(RetriesExhausted):
        await case.deliver()
    assert case.observer.calls == [*TRY, ("exhausted", 3)]


async def test_pauses_double_and_are_bounded() -> None:
    case = Case(*[unknown()] * 13, DONE, unknown(), max_retries=20)
    pauses = []
    for _ in range(13):
        await case.fail(1)
        pauses.append(case.delivery.pause())
    steps = [min(MAX_PAUSE_S, 0.1 * 2**n) for n in range(13)]
    assert all(step / 2 <= pause <= step for pause, step in zip(pauses, steps, strict=True))
    await case.deliver()
    await case.fail(1)
    assert case.delivery.pause() <= 0.1


@pytest.mark.parametrize(
    "error",
    [
        DatabaseUnavailable("down"),
        CommitUnanswered("lost", Written(2, 1)),
        RedisUnavailable("down"),
        TableRefused("missing", "Create it."),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_other_errors_pass_and_are_not_counted_as_tries(error: Exception) -> None:
    case = Case(unknown(), error, unknown(), max_retries=2)
    await case.fail(1)
    with pytest.raises(type(error)) as caught:
        await case.deliver()
    assert caught.value is error
    await case.fail(1)


async def test_a_mistake_in_the_program_is_an_unknown_failure() -> None:
    case = Case(ZeroDivisionError("division by zero"))
    with pytest.raises(UnknownFailure, match="ZeroDivisionError: division by zero"):
        await case.deliver()


async def test_tries_are_counted_from_the_last_write() -> None:
    case = Case(unknown(), DONE, unknown(), DONE, max_retries=1)
    for _ in range(2):
        await case.fail(1)
        assert await case.deliver() == DONE
