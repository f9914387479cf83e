"""What a loop that waits for a lease shows: who holds it, or why it cannot be asked for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.support.fakes import FakeClock
from tests.unit.test_lease_sharing import FakeDatabase, FakeRow
from worker.db.lease import LOCKED, LOCKED_S, Lease, LeaseState
from worker.errors import DatabaseUnavailable
from worker.observability.status import SERVERS, State, Status
from worker.pipelines.pipeline import Pipeline

LOOP = "a loop"


class Row(FakeRow):
    """`cause`: why the row cannot be written, if so. `is_locked`: by a session that is not a worker."""

    def __init__(self) -> None:
        super().__init__()
        self.cause: str | None = None
        self.is_locked = False

    async def ensure(self, tx: Any) -> None:
        if self.cause is not None:
            raise DatabaseUnavailable(self.cause, "how to fix it")

    async def take_lease(self, tx: Any, worker_id: str, dead: str | None = None) -> LeaseState[int] | None:
        return await (super().read_lease if self.is_locked else super().take_lease)(tx, worker_id)


class Waiter:
    """A loop that waits for the lease of `row`."""

    def __init__(self, row: Row) -> None:
        self.status = Status(lambda: 0.0, (*SERVERS, LOOP))
        for server in SERVERS:
            self.status.ok(server)
        database: Any = FakeDatabase()
        self.lease: Lease[int] = Lease(database, row, "me", self.status)
        self.stop = asyncio.Event()

    @property
    def shown(self) -> tuple[State, str, dict[str, object]]:
        check = self.status.checks[LOOP]
        return check.state, check.cause, check.facts

    @contextlib.asynccontextmanager
    async def waiting(self) -> AsyncIterator[asyncio.Task[bool]]:
        def standing_by(holder: str) -> None:
            self.status.ok(LOOP, role="standing by", holder=holder)

        waiting = asyncio.create_task(self.lease.wait(self.stop, LOOP, standing_by))
        looking = asyncio.create_task(self.lease.run(self.stop))
        yield waiting
        self.stop.set()
        await asyncio.gather(waiting, looking)


async def becomes(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> Row:
    monkeypatch.setattr("worker.db.lease.STANDBY_S", 0.02)
    return Row()


async def test_standing_by_names_the_holder_and_begins_when_it_is_known(row: Row) -> None:
    row.holder = "another"
    waiter = Waiter(row)
    answer = asyncio.Event()
    read = row.read_lease

    async def read_late(*arguments: Any) -> Any:
        await answer.wait()
        return await read(*arguments)

    row.read_lease = read_late  # type: ignore[method-assign]
    async with waiter.waiting():
        await asyncio.sleep(0.05)
        assert waiter.shown == (State.STARTING, "not checked yet", {})
        answer.set()
        await becomes(lambda: waiter.shown == (State.OK, "", {"role": "standing by", "holder": "another"}))


async def test_what_keeps_the_lease_from_being_asked_for_is_a_failing_check(row: Row) -> None:
    waiter = Waiter(row)
    row.cause = "the database is read-only"
    async with waiter.waiting() as waiting:
        await becomes(lambda: waiter.shown == (State.FAILING, "the database is read-only", {}))
        assert waiter.status.checks[LOOP].remedy == "how to fix it"
        row.cause = None
        assert await asyncio.wait_for(waiting, 10)


async def test_worker_that_stood_by_fails_when_it_cannot_ask_any_more(row: Row) -> None:
    row.holder = "another"
    waiter = Waiter(row)
    async with waiter.waiting():
        await becomes(lambda: waiter.shown[0] is State.OK)
        row.cause = "the database is read-only"
        await becomes(lambda: waiter.shown[0] is State.FAILING)
        row.cause = None
        await becomes(lambda: waiter.shown[0] is State.OK)


async def test_free_lease_whose_row_stays_locked_is_a_failure(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr("worker.db.lease.monotonic", clock.monotonic)
    row.is_locked = True
    lease = Waiter(row).lease
    with capture_logs() as lines:
        assert not await lease.take()
        clock.advance(LOCKED_S)
        assert not await lease.take()
        assert lease.failure is None  # a flush may last as long
        for _ in range(3):
            clock.advance(1)
            assert not await lease.take()
            assert str(lease.failure) == LOCKED
    assert [line["event"] for line in lines] == ["lease not renewed"]
    row.is_locked = False
    assert await lease.take()
    assert lease.failure is None


async def test_idle_pipeline_shows_that_its_lease_cannot_be_renewed() -> None:
    status = Status(lambda: 0.0, (LOOP,))
    lease: Any = SimpleNamespace(failure=DatabaseUnavailable("the database is read-only", "how to fix it"))
    unused: Any = None
    pipeline: Pipeline[Any] = Pipeline(
        name=LOOP, source=unused, delivery=unused, lease=lease, status=status, clock=unused, interval=1.0
    )
    pipeline._report_idle()
    assert (status.checks[LOOP].state, status.checks[LOOP].cause) == (State.FAILING, "the database is read-only")
    lease.failure = None
    pipeline._report_idle()
    assert status.checks[LOOP].state is State.OK
