"""Only one of several replicas flushes. Counts stay right even if two believe that they hold the lease."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from urllib.parse import urlsplit

import pytest

from tests.support.world import World
from worker.counters.flush.outcome import Busy, Flushed
from worker.db.lease import LEASE_TTL
from worker.observability.status import SERVERS, State
from worker.runtime.worker_id import has_died_here, new_worker_id


async def test_only_one_of_two_gets_the_lease(world: World) -> None:
    one, two = world.worker(), world.worker()
    assert await one.counters.lease.take()
    assert not await two.counters.lease.take()
    assert await one.counters.lease.take()
    assert one.counters.lease.token == 1


async def test_released_lease_is_free_at_once_and_raises_the_epoch(world: World) -> None:
    one, two = world.worker(), world.worker()
    await one.counters.lease.take()
    await one.counters.lease.release()
    assert await two.counters.lease.take()
    assert two.counters.lease.token == 2


async def test_expired_lease_can_be_taken_over_and_the_old_holder_writes_nothing(world: World) -> None:
    frozen, successor = world.worker(), world.worker()
    await frozen.cycle()
    await world.view("a", 5)
    await world.expire_lease()
    assert await successor.counters.lease.take()
    assert await frozen.counters.loop.cycle() == Busy()  # it wakes, and still believes that it holds the lease
    assert frozen.counters.lease.token is None
    assert await world.totals() == Counter()
    assert await successor.counters.loop.cycle() == Flushed(flush_id=1, keys=1, views=5)


async def test_lease_from_a_clock_that_was_ahead_is_free(world: World) -> None:
    gone, successor = world.worker(), world.worker()
    await gone.counters.lease.take()
    await world.sql.execute("UPDATE view_count_sources SET lease_until = now() + interval '1 day'")
    assert await successor.counters.lease.take()
    left = await world.sql.fetchval("SELECT lease_until - now() FROM view_count_sources")
    assert left <= LEASE_TTL


async def test_flush_renews_the_lease(world: World) -> None:
    worker = world.worker()
    await worker.cycle()
    await world.sql.execute("UPDATE view_count_sources SET lease_until = now() + interval '1 second'")
    await world.view("a")
    worker.counters.loop.sweep_soon()
    await worker.counters.loop.cycle()
    left = await world.sql.fetchval("SELECT lease_until - now() FROM view_count_sources")
    assert left > LEASE_TTL / 2


async def test_taking_the_lease_does_not_wait_for_the_row_lock_of_a_flush(world: World) -> None:
    holder, standby = world.worker(), world.worker()
    await holder.counters.lease.take()
    async with world.sql.transaction():
        await world.sql.execute("UPDATE view_count_sources SET last_flush_id = last_flush_id")
        assert await asyncio.wait_for(holder.counters.lease.take(), 3)
        assert not await asyncio.wait_for(standby.counters.lease.take(), 3)


@pytest.mark.parametrize("down", ["redis", "postgres", "schema"])
async def test_worker_with_a_failing_check_does_not_take_the_lease(world: World, down: str) -> None:
    worker = world.worker()
    for check in {"redis", "postgres", "schema"} - {down}:
        worker.status.ok(check)
    stop = asyncio.Event()
    task = asyncio.create_task(worker.counters.lease.run(stop))
    await asyncio.sleep(0.3)
    assert worker.counters.lease.token is None
    worker.status.ok(down)
    async with asyncio.timeout(5):
        await worker.counters.lease.changed.wait()
    assert worker.counters.lease.token == 1
    stop.set()
    await task


async def test_worker_that_freezes_while_it_takes_the_lease_loses_the_row_lock(
    world: World,
) -> None:
    worker = world.worker()
    await worker.counters.lease.take()
    async with worker.database.transaction() as tx:
        await worker.counters.lease._row.take_lease(tx, "frozen")
        limit = (await tx.exec_driver_sql("SHOW idle_in_transaction_session_timeout")).scalar_one()
    assert limit == "8s"


async def test_restart_on_the_host_of_a_dead_holder_does_not_wait_for_its_lease(world: World) -> None:
    await world.worker().counters.lease.take()
    host, process = socket.gethostname(), await asyncio.create_subprocess_exec("sleep", "60")
    alive = f"{host}:{process.pid}:00000000.1"
    await world.sql.execute("UPDATE view_count_sources SET lease_holder = $1", alive)
    neighbour = world.worker()
    assert not await neighbour.counters.lease.take()
    assert not await neighbour.counters.lease.take()
    process.kill()
    await process.wait()
    assert not await neighbour.counters.lease.take()  # it checks the holder at its start only
    restarted = world.worker()
    assert await restarted.counters.lease.take()
    assert restarted.counters.lease.token == 2


@pytest.mark.parametrize(
    ("holder", "dead"),
    [
        ("{host}:{pid}:00000000.1", True),  # in a container, every worker is process 1
        ("elsewhere:{pid}:00000000.1", False),
        ("{host}:1:00000000.1", False),
        ("{host}:999999999999999999999:00000000.1", True),
        ("{host}:x:y", False),
        ("", False),
    ],
)
def test_only_workers_of_this_host_without_a_process_have_died_here(holder: str, dead: bool) -> None:
    assert has_died_here(holder.format(host=socket.gethostname(), pid=os.getpid())) is dead


def test_worker_of_this_process_is_alive() -> None:
    assert not has_died_here(new_worker_id())


async def test_restart_does_not_spin_while_a_server_is_down(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.worker().counters.lease.take()
    monkeypatch.setattr("worker.db.lease.has_died_here", lambda _: True)
    waits: list[float] = []

    async def wait(seconds: float, *_: asyncio.Event) -> None:
        waits.append(seconds)
        worker.status.failing("postgres", "gone", "")
        if len(waits) == 5:
            stop.set()

    monkeypatch.setattr("worker.db.lease.wait_first", wait)
    worker, stop = world.worker(), asyncio.Event()
    for check in SERVERS:
        worker.status.ok(check)
    await worker.counters.lease.run(stop)
    assert worker.counters.lease.token == 2
    assert min(waits) > 0


async def test_table_that_is_missing_for_a_moment_does_not_end_the_loops(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.db.lease.RENEW_S", 0.05)
    monkeypatch.setattr("worker.counters.retention.PERIOD_S", 0.05)
    worker, stop = world.worker(VIEW_LEDGER_RETENTION="1ms"), asyncio.Event()
    for check in SERVERS:
        worker.status.ok(check)
    for _ in range(5):
        await world.view("a")
        await worker.cycle()
    loops = [asyncio.create_task(loop.run(stop)) for loop in (worker.counters.lease, worker.counters.retention)]
    for table in ("view_count_sources", "view_count_flushes"):
        await world.sql.execute(f"ALTER TABLE {table} RENAME TO away")
        done, _ = await asyncio.wait(loops, timeout=0.3)
        assert not done
        await world.sql.execute(f"ALTER TABLE away RENAME TO {table}")
    await worker.cycle()
    async with asyncio.timeout(10):
        while await world.sql.fetchval("SELECT count(*) FROM view_count_flushes") > 2:
            await asyncio.sleep(0.05)
    stop.set()
    await asyncio.gather(*loops)


async def test_read_only_database_fails_the_checks_of_all_that_wait_for_the_lease_until_it_accepts_writes(
    world: World,
) -> None:
    """They said "standing by", healthy, for as long as it lasted."""
    name = urlsplit(world.database_url).path[1:]
    await world.sql.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    worker, stop = world.worker(), asyncio.Event()
    counters = worker.counters
    waiting = [worker.status.checks[loop] for loop in ("view_counts", "messages")]
    for server in SERVERS:
        worker.status.ok(server)
    loops = [asyncio.create_task(each.run(stop)) for each in (counters.lease, counters.loop, counters.listener)]
    async with asyncio.timeout(20):
        while any(check.state is not State.FAILING for check in waiting):
            assert all(check.state is not State.OK for check in waiting)
            await asyncio.sleep(0.01)
    assert all("25006" in check.cause and "primary" in check.remedy for check in waiting)
    await world.sql.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    await world.view("a", 3)
    async with asyncio.timeout(20):
        while await world.totals() != {"a": 3} or any(check.state is not State.OK for check in waiting):
            await asyncio.sleep(0.05)
    stop.set()
    await asyncio.gather(*loops)
    await world.assert_exact()
