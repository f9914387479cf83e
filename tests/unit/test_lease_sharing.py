"""Replicas share leases out: who takes a free one when, what the log says of it, and when another one keeps it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.support.fakes import FakeClock
from worker.db.lease import KEPT_S, MAX_SHARE_S, SHARE_S, Lease, LeaseState
from worker.observability.status import SERVERS, Status


class FakeDatabase:
    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        await asyncio.sleep(0)
        yield


class FakeRow:
    """A row in memory, which all workers use."""

    def __init__(self) -> None:
        self.holder: str | None = None
        self.token = 0

    async def ensure(self, tx: Any) -> None: ...

    async def read_lease(self, tx: Any, worker_id: str) -> LeaseState[int] | None:
        return LeaseState(self.holder, self.token, self.holder in (None, worker_id))

    async def take_lease(self, tx: Any, worker_id: str, dead: str | None = None) -> LeaseState[int] | None:
        if self.holder in (None, dead):
            self.holder, self.token = worker_id, self.token + 1
        return await self.read_lease(tx, worker_id)

    async def release_lease(self, tx: Any, worker_id: str) -> None:
        self.holder = None


class Replica:
    """A process with one lease for each row."""

    def __init__(self, name: str, rows: list[FakeRow]) -> None:
        status = Status(lambda: 0.0, SERVERS)
        for server in SERVERS:
            status.ok(server)
        held: set[Lease[int]] = set()
        database: Any = FakeDatabase()
        self.leases = [Lease(database, row, name, status, held=held) for row in rows]

    @property
    def held(self) -> int:
        return sum(lease.token is not None for lease in self.leases)

    async def look(self) -> None:
        """All leases at the same time."""
        await asyncio.gather(*(lease._look() for lease in self.leases))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr("worker.db.lease.monotonic", clock.monotonic)
    return clock


async def test_a_worker_takes_the_first_lease_at_once_and_each_further_one_half_a_second_later(
    clock: FakeClock,
) -> None:
    replica = Replica("one", [FakeRow() for _ in range(5)])
    for expected in range(1, 6):
        await replica.look()
        assert replica.held == expected
        clock.advance(SHARE_S / 2)
        await replica.look()
        assert replica.held == expected
        clock.advance(SHARE_S / 2)


async def test_no_lease_is_left_to_others_for_more_than_two_seconds(clock: FakeClock) -> None:
    """With sixty streams, a single worker carried the last one after half a minute."""
    replica = Replica("one", [FakeRow() for _ in range(60)])
    await replica.look()
    clock.advance(MAX_SHARE_S)
    await replica.look()
    assert replica.held == 60


async def test_the_pause_counts_from_the_moment_at_which_the_lease_is_seen_free(clock: FakeClock) -> None:
    rows = [FakeRow(), FakeRow()]
    rows[1].holder = "another"
    replica = Replica("one", rows)
    await replica.look()
    clock.advance(100)
    await replica.look()
    rows[1].holder = None
    await replica.look()
    assert replica.held == 1
    clock.advance(SHARE_S)
    await replica.look()
    assert replica.held == 2


async def test_a_worker_renews_its_own_leases_without_a_pause(clock: FakeClock) -> None:
    rows = [FakeRow() for _ in range(3)]
    replica = Replica("one", rows)
    for lease in replica.leases:
        await lease.take()
    renewed: list[FakeRow] = []
    for row in rows:

        async def renew(*_: Any, row: FakeRow = row, **__: Any) -> Any:
            renewed.append(row)
            return LeaseState("one", row.token, is_free=True)

        row.take_lease = renew  # type: ignore[method-assign]
    await replica.look()
    assert renewed == rows


async def test_a_lease_that_could_not_be_taken_does_not_count_as_held(clock: FakeClock) -> None:
    rows = [FakeRow(), FakeRow()]
    replica = Replica("one", rows)
    rows[0].holder = "another"
    await replica.leases[0]._look()
    await replica.leases[1]._look()
    assert replica.held == 1


async def test_the_lease_of_a_process_that_died_on_this_host_is_taken_at_once(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.db.lease.has_died_here", lambda holder: holder == "dead")
    rows = [FakeRow() for _ in range(3)]
    for row in rows:
        row.holder = "dead"
    replica = Replica("one", rows)
    await replica.look()
    assert replica.held == 3
    rows[2].holder = "dead"
    await replica.look()  # it looks for a dead holder at its start only
    await replica.look()
    assert rows[2].holder == "dead"


async def test_two_replicas_that_start_together_share_the_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.db.lease.SHARE_S", 0.1)
    monkeypatch.setattr("worker.db.lease.STANDBY_S", 0.1)
    rows = [FakeRow() for _ in range(4)]
    replicas, stop = [Replica("one", rows), Replica("other", rows)], asyncio.Event()
    loops = [asyncio.create_task(lease.run(stop)) for replica in replicas for lease in replica.leases]
    async with asyncio.timeout(5):
        while sum(replica.held for replica in replicas) < len(rows):
            await asyncio.sleep(0.01)
    assert min(replica.held for replica in replicas) >= 1
    stop.set()
    await asyncio.gather(*loops)


async def test_only_the_first_of_many_looks_for_a_stream_is_logged_at_info(clock: FakeClock) -> None:
    row = FakeRow()
    (lease,) = Replica("one", [row]).leases
    with capture_logs() as lines:
        for _ in range(3):
            await lease.take()
            await lease.release(pause=True)
        await lease.take()
        await lease.take()  # it keeps the lease
        await lease.release()
    shown = [(line["event"], line["token"]) for line in lines if line["log_level"] == "info"]
    assert shown == [("lease taken", "1"), ("lease released", "4")]
    assert len(lines) == 8


async def test_a_takeover_after_another_worker_had_the_lease_is_logged_at_info(clock: FakeClock) -> None:
    row = FakeRow()
    (lease,) = Replica("one", [row]).leases
    await lease.take()
    await lease.release(pause=True)
    row.holder = "another"
    await lease.take()
    row.holder = None
    with capture_logs() as lines:
        await lease.take()
    assert [(line["event"], line["log_level"]) for line in lines] == [("lease taken", "info")]


async def test_a_lease_is_kept_elsewhere_when_another_worker_has_it_for_longer_than_a_look(clock: FakeClock) -> None:
    row = FakeRow()
    (lease,) = Replica("one", [row]).leases
    (other,) = Replica("other", [row]).leases
    for _ in range(3):  # it takes the lease for one look after the other
        await other.take()
        await lease.take()
        assert not lease.is_kept_elsewhere
        await other.release()
        clock.advance(KEPT_S - 1)
    await other.take()
    await lease.take()
    clock.advance(KEPT_S + 1)
    assert lease.is_kept_elsewhere
    await other.release()
    await lease.take()
    assert not lease.is_kept_elsewhere


async def test_after_a_server_was_away_a_lease_is_left_to_its_holder_for_a_while(clock: FakeClock) -> None:
    async def steps() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    row, status, stop = FakeRow(), Status(lambda: 0.0, SERVERS), asyncio.Event()
    row.holder = "another"
    database: Any = FakeDatabase()
    lease = Lease(database, row, "one", status, patience=6.0)
    for server in SERVERS:
        status.ok(server)
    running = asyncio.create_task(lease.run(stop))
    await steps()
    status.failing(SERVERS[0], "away", "")
    await steps()
    row.holder = None  # expired meanwhile
    status.ok(SERVERS[0])
    await steps()
    clock.advance(5.9)
    lease.resume()
    await steps()
    assert lease.token is None
    clock.advance(0.1)
    lease.resume()
    await steps()
    assert lease.token is not None
    stop.set()
    await running
