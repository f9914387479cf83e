"""Forgetting an id removes its total, history and pending views, even beside flushes and after crashes."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from tests.support.world import World
from worker.counters.flush.outcome import Flushed
from worker.counters.forget import Forgotten
from worker.db.counters.reads import Shown
from worker.errors import OnHold, RedisUnavailable


async def test_total_history_and_pending_views_are_removed_and_later_views_count_from_zero(world: World) -> None:
    worker = world.worker()
    await world.view("a", 5)
    await world.view("b", 1)
    await worker.cycle()
    await world.view("a", 2)
    assert await worker.counters.forgetting.forget("a") == Forgotten(stored=5, pending=2)
    assert await world.totals() == Counter(b=1)
    assert await world.pending() == Counter()
    assert await world.sql.fetchval("SELECT count(*) FROM view_counts_hourly WHERE vod_id = 'a'") == 0
    await world.assert_consistent()
    await world.view("a", 3)
    await worker.cycle()
    assert await world.totals() == Counter(a=3, b=1)
    await world.assert_consistent()


async def test_tables_agree_after_an_imported_id_is_forgotten(world: World) -> None:
    worker = world.worker()
    await world.view("a", 5)
    await worker.cycle()
    await world.sql.execute("UPDATE view_counts SET views = views + 100, imported = 100")
    assert await worker.counters.forgetting.forget("a") == Forgotten(stored=105, pending=0)
    await world.assert_consistent()


async def test_unknown_id_can_be_forgotten_even_before_the_first_flush(world: World) -> None:
    assert await world.worker().counters.forgetting.forget("never seen") == Forgotten(0, 0)
    await world.assert_consistent()


async def test_after_a_crash_before_settle_the_next_flush_settles(world: World) -> None:
    worker = world.worker()
    await worker.cycle()
    await world.view("a", 5)
    settle = worker.counters.flusher.settler.settle

    async def gone(*_: Any, **__: Any) -> bool:
        raise RedisUnavailable("gone")

    worker.counters.flusher.settler.settle = gone  # type: ignore[method-assign]
    with pytest.raises(RedisUnavailable):
        await worker.counters.forgetting.forget("a")
    worker.counters.flusher.settler.settle = settle  # type: ignore[method-assign]
    await world.view("a", 2)
    await worker.cycle()
    assert await world.totals() == Counter(a=2)
    await world.assert_consistent()


async def test_forgotten_id_shows_0_before_the_settle(world: World) -> None:
    worker, reader = world.worker(), world.worker()
    await world.view("a", 5)
    await worker.cycle()
    await world.view("a", 2)
    settle = worker.counters.flusher.settler.settle
    between = []

    async def look_first(*args: Any, **kwargs: Any) -> bool:
        between.extend(await reader.counters.display.views(["a"]))
        return await settle(*args, **kwargs)

    worker.counters.flusher.settler.settle = look_first  # type: ignore[method-assign]
    await worker.counters.forgetting.forget("a")
    assert between == [Shown("a", views=0, pending=0, stored=0)]


async def test_views_of_other_ids_are_not_lost_beside_a_running_worker(world: World) -> None:
    worker, operator = world.worker(BATCH_SIZE="3"), world.worker()
    done = asyncio.Event()

    async def work() -> None:
        while not done.is_set():
            await worker.cycle_until_done()

    working = asyncio.create_task(work())
    forgotten = 0
    for _ in range(20):
        await world.view_many(["a", "b", "c", "d", "victim"])
        if isinstance(await operator.counters.forgetting.forget("victim"), Forgotten):
            forgotten += 1
    done.set()
    await working
    assert await worker.cycle() == Flushed()
    assert forgotten == 20
    del world.truth["victim"]
    await world.assert_exact()


async def test_on_hold_nothing_is_forgotten(world: World) -> None:
    worker = world.worker()
    await world.view("a", 5)
    await worker.cycle()
    await world.redis.set(world.keys.marker, "garbage")
    with pytest.raises(OnHold, match="cannot be read"):
        await worker.counters.forgetting.forget("a")
    assert await world.totals() == Counter(a=5)
