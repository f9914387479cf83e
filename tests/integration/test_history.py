"""The hourly history follows the flushes: each flush comes into it once, and views are counted without it, too."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from tests.support.world import InProcessWorker, World
from worker.counters.flush.outcome import Flushed
from worker.counters.forget import Forgetting
from worker.db.counters.history import History
from worker.errors import DatabaseUnavailable

HOUR = timedelta(hours=1)


async def history(world: World) -> Counter[str]:
    rows = await world.sql.fetch("SELECT vod_id, sum(views)::bigint AS views FROM view_counts_hourly GROUP BY 1")
    return Counter({row["vod_id"]: row["views"] for row in rows})


async def flush_only(world: World, worker: InProcessWorker, *ids: str) -> None:
    """Flush views, and leave the history as it is."""
    await world.view_many(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.counters.loop, "_is_calm", lambda: False)
        await worker.cycle()


async def test_history_has_the_views_of_each_hour_after_a_cycle(world: World) -> None:
    worker = world.worker()
    await world.view("a", 5)
    await world.view("b", 1)
    await worker.cycle()
    await world.sql.execute("UPDATE view_counts_hourly SET bucket = bucket - interval '1 hour'")
    await world.view("a", 2)
    await worker.cycle()
    rows = await world.sql.fetch("SELECT vod_id, views FROM view_counts_hourly ORDER BY vod_id, bucket")
    assert [tuple(row) for row in rows] == [("a", 5), ("a", 2), ("b", 1)]
    assert worker.metric("view_count_history_behind_seconds") == 0


async def test_pending_views_come_before_the_history(world: World) -> None:
    worker = world.worker()
    for _ in range(3):
        await flush_only(world, worker, "a", "b")
    assert await history(world) == Counter()
    assert worker.metric("view_count_history_behind_seconds") > 0
    (shown,) = await worker.counters.display.views(["a"])
    assert shown.views == 3
    await worker.cycle()
    assert await history(world) == world.truth
    await world.assert_exact()


async def test_flushes_are_added_several_at_once_but_only_as_many_as_fit(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = world.worker()
    for ids in ("a", "ab", "abc", "a"):
        await flush_only(world, worker, *ids)
    for at_most, rolled_up, left in ((3, 2, True), (2, 3, True), (10, 4, False), (10, 4, False)):
        async with worker.database.transaction() as tx:
            age = await History("default").roll_up(tx, at_most)
        assert (age is not None) == left
        assert (await world.source())["rolled_up_id"] == rolled_up
        await world.assert_consistent()
    assert await history(world) == world.truth


@pytest.mark.parametrize("committed", [True, False])
async def test_update_without_an_answer_is_done_once(world: World, committed: bool) -> None:
    worker = world.worker()
    await flush_only(world, worker, "a", "b", "b")
    transaction = worker.database.transaction

    @contextlib.asynccontextmanager
    async def breaking() -> AsyncIterator[Any]:
        async with transaction() as tx:
            yield tx
            if not committed:
                raise DatabaseUnavailable("gone before COMMIT")
        raise DatabaseUnavailable("gone after COMMIT")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.database, "transaction", breaking)
        await worker.counters.loop._roll_up.catch_up(lambda: True)
    assert worker.metric("view_count_history_failures_total") == 1
    assert await history(world) == (world.truth if committed else Counter())
    await world.assert_consistent()
    await worker.cycle()
    assert await history(world) == world.truth


async def test_two_workers_at_once_add_each_flush_once(world: World) -> None:
    first, second = world.worker(), world.worker()
    await flush_only(world, first, "a", "b")
    async with first.database.transaction() as tx:
        assert await History("default").roll_up(tx, 100) is None
        other = asyncio.create_task(second.counters.loop._roll_up.catch_up(lambda: True))
        second.counters.loop._roll_up.may_be_behind()
        await asyncio.sleep(0.2)
        assert not other.done()
    await other
    assert second.metric("view_count_history_failures_total") == 0
    assert await history(world) == world.truth


async def test_history_that_cannot_be_written_does_not_stop_the_flush(world: World) -> None:
    worker = world.worker()
    await world.sql.execute("ALTER TABLE view_counts_hourly RENAME TO away")
    for _ in range(3):
        await world.view("a", 2)
        assert isinstance(await worker.cycle(), Flushed)
    assert worker.metric("view_count_history_failures_total") == 3
    await world.sql.execute("ALTER TABLE away RENAME TO view_counts_hourly")
    await worker.cycle()
    assert await history(world) == Counter(a=6)
    await world.assert_exact()


async def test_new_holder_of_the_lease_continues_the_history(world: World) -> None:
    await flush_only(world, world.worker(), "a", "b")
    successor, stop = world.worker(), asyncio.Event()
    for check in ("redis", "postgres", "schema"):
        successor.status.ok(check)
    await world.expire_lease()
    loops = [successor.counters.lease, successor.counters.loop]
    running = [asyncio.create_task(loop.run(stop)) for loop in loops]
    successor.counters.backlog.announced.ended.set()
    async with asyncio.timeout(20):
        while await history(world) != world.truth:
            await asyncio.sleep(0.05)
    stop.set()
    await asyncio.gather(*running)


async def test_worker_that_stands_by_does_not_measure_the_history(world: World) -> None:
    worker, stop = world.worker(), asyncio.Event()
    worker.counters.loop._roll_up.may_be_behind()
    assert worker.metric("view_count_history_behind_seconds") > 0
    stop.set()
    assert not await worker.counters.loop._wait_for_lease(stop)
    assert worker.metric("view_count_history_behind_seconds") == 0


async def test_retention_keeps_flushes_that_are_not_in_the_history(world: World) -> None:
    worker = world.worker(VIEW_LEDGER_RETENTION="1d")
    await world.view("a")
    await worker.cycle()
    for _ in range(2):
        await flush_only(world, worker, "a", "b")
    await world.sql.execute("UPDATE view_count_flushes SET flushed_at = flushed_at - interval '2 days'")
    await world.sql.execute("UPDATE view_count_sources SET settled_id = last_flush_id")
    assert await worker.counters.retention.prune() == 1
    await worker.cycle()
    assert await worker.counters.retention.prune() == 1
    assert await history(world) == world.truth


async def test_forgotten_id_does_not_come_back_through_flushes_that_were_not_in_the_history(
    world: World, redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def as_if_all_came_later(_: Forgetting) -> None: ...

    monkeypatch.setattr(Forgetting, "_roll_up_in_steps", as_if_all_came_later)
    async with World(redis_url, database_url, prefix="other:", VIEW_SOURCE_NAME="other") as other:
        workers = world.worker(), other.worker()
        await flush_only(world, workers[0], "a", "a", "b")
        await flush_only(other, workers[1], "a", "c")
        assert (await workers[0].counters.forgetting.forget("a")).stored == 3
        assert await history(world) == Counter(b=1, c=1)
        for worker in workers:
            await worker.cycle()
        assert await history(world) == Counter(b=1, c=1)
        await world.assert_consistent()
        await world.view("a", 4)
        await workers[0].cycle()
        assert await history(world) == Counter(a=4, b=1, c=1)


async def test_top_says_up_to_when_the_history_is_complete(world: World) -> None:
    worker = world.worker()
    await flush_only(world, worker, "a", "a")
    await flush_only(world, worker, "a")
    flushed_at = await world.sql.fetchval("SELECT flushed_at FROM view_count_flushes WHERE flush_id = 1")
    top = await worker.counters.display.top(HOUR, 10)
    assert (top.as_of, top.entries) == (flushed_at, [])
    await worker.cycle()
    top = await worker.counters.display.top(HOUR, 10)
    assert top.as_of > flushed_at
    assert [(entry.vod_id, entry.views, entry.total) for entry in top.entries] == [("a", 3, 3)]
