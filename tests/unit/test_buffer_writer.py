"""The loop that writes a buffer of the worker: its check, what it drops, what it leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.support.fakes import FakeClock
from worker.errors import DatabaseUnavailable, TableRefused
from worker.observability.metrics import Metrics
from worker.observability.status import Check, State, Status
from worker.pipelines import buffer_writer as module
from worker.pipelines.batcher import Batcher
from worker.pipelines.buffer import Buffer, ByteBudget
from worker.pipelines.buffer_writer import BufferWriter
from worker.pipelines.delivery import Delivery
from worker.pipelines.metrics import BufferMetrics
from worker.pipelines.model import Batch, Window, Written
from worker.pipelines.records.view_events import VIEW_EVENTS

GOOD = json.dumps({"vodId": "a", "count": 1}).encode()


class ScriptedSink:
    """Each write raises the next of `errors`; without one, the batch is written."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.written: list[Batch[Any]] = []

    async def write(self, batch: Batch[Any], *, isolate: bool = False, before_commit: Any = None) -> Written:
        await asyncio.sleep(0)
        if self.errors:
            raise self.errors.pop(0)
        self.written.append(batch)
        return Written(rows=len(batch.items), letters=len(batch.letters))


class Case:
    """A writer of batches of two records."""

    def __init__(self, *errors: Exception) -> None:
        clock = FakeClock()
        self.metrics = Metrics()
        self.status = Status(clock.monotonic, ("events writer",))
        self.sink = ScriptedSink(*errors)
        self.stop = asyncio.Event()
        buffered = BufferMetrics(self.metrics.records, "view_events")
        self.buffer = Buffer(
            Batcher(2, 0.0),
            batch_size=2,
            capacity=100,
            budget=ByteBudget(10**6),
            monotonic=clock.monotonic,
            on_due=lambda: self.writer.source.wake(),
        )
        self.writer = BufferWriter(
            name="events writer",
            record=VIEW_EVENTS,
            window=Window(1e9, 1e9),
            buffer=self.buffer,
            delivery=Delivery(self.sink, buffered.make_write_metrics(), clock, max_retries=2, retry_delay=0.001),
            metrics=buffered,
            status=self.status,
            clock=clock,
        )

    @property
    def check(self) -> Check:
        return self.status.checks["events writer"]

    def metric(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"pipeline": "view_events"})

    async def run_until(self, condition: Callable[[], bool]) -> asyncio.Task[None]:
        task = asyncio.create_task(self.writer.run(self.stop))
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0)
        return task


async def test_it_writes_until_the_buffer_is_closed_and_empty() -> None:
    case = Case()
    for _ in range(3):
        case.buffer.add(GOOD)
    task = await case.run_until(lambda: len(case.sink.written) == 2)
    assert not task.done()
    case.buffer.add(GOOD)
    case.buffer.close()
    await task
    assert sum(len(batch) for batch in case.sink.written) == 4
    assert case.buffer.held == 0
    assert case.check.state is State.OK


@pytest.mark.parametrize(
    ("error", "remedy"),
    [(TableRefused("no table", "Create it."), "Create it."), (DatabaseUnavailable("away"), DatabaseUnavailable.remedy)],
)
async def test_its_check_fails_with_cause_and_remedy_until_a_write_succeeds(error: Exception, remedy: str) -> None:
    case = Case(error)
    case.buffer.add(GOOD)
    task = await case.run_until(lambda: case.check.state is State.FAILING)
    assert (case.check.cause, case.check.remedy) == (str(error), remedy)
    assert case.metric("persistence_retry_queue_depth") == 1
    case.stop.set()
    case.buffer.close()
    await task
    assert case.check.state is State.OK
    assert case.metric("persistence_queue_depth") == 0


async def test_what_is_not_valid_is_dropped_counted_and_logged_once_per_kind() -> None:
    case = Case()
    for document in (GOOD, b"\x1bjunk", b"more junk", b'{"vodId":"a","count":0}', GOOD):
        case.buffer.add(document)
    case.buffer.close()
    with capture_logs() as logs:
        await case.writer.run(case.stop)
    assert [(len(batch.items), len(batch.letters)) for batch in case.sink.written] == [(1, 0), (1, 0)]
    assert case.metric("persistence_dropped_total") == 3
    dropped = [line for line in logs if line["event"] == "record dropped"]
    assert [line["kind"] for line in dropped] == ["not_json", "count"]
    assert dropped[0]["record"] == r"\x1bjunk"


async def test_an_error_that_nobody_expects_does_not_end_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    case = Case()
    read, failures = case.writer.source.read, [ZeroDivisionError("a mistake")]

    async def fail_once() -> Any:
        if failures:
            raise failures.pop()
        return await read()

    case.writer.source.read = fail_once  # type: ignore[method-assign]
    case.buffer.add(GOOD)
    case.buffer.close()
    await case.writer.run(case.stop)
    assert len(case.sink.written) == 1
    assert case.check.state is State.OK


async def test_what_is_left_when_the_deadline_has_passed_is_counted_and_logged() -> None:
    case = Case(*[DatabaseUnavailable("away")] * 1000)
    for _ in range(5):
        case.buffer.add(GOOD)
    task = await case.run_until(lambda: case.check.state is State.FAILING)
    with capture_logs() as logs:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    (left,) = [line for line in logs if line["event"] == "records left at shutdown"]
    assert (left["unwritten"], left["unknown"]) == (5, 0)
    assert case.metric("persistence_dropped_total") == 5
    assert case.metric("persistence_queue_depth") == 0
