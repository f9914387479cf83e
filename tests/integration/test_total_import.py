"""Import of the application's existing totals into the worker's."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from tests.support import vod_table
from tests.support.world import InProcessWorker, World
from worker.db.target.table import Page, TargetTable
from worker.db.target.total_import import import_totals


async def imported(world: World, worker: InProcessWorker) -> tuple[int, int]:
    target = worker.counters.target
    assert target is not None
    pages = [page async for page in import_totals(worker.database, target)]
    return sum(page.ids for page in pages), sum(page.views for page in pages)


async def test_totals_of_the_application_are_imported_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.db.target.total_import.ROWS_AT_ONCE", 2)
    await vod_table.create(world, ids="a,b,c,d,e")
    await world.sql.execute("UPDATE \"Vod\" SET \"viewCount\" = 100 WHERE id IN ('a', 'b', 'd')")
    await world.sql.execute('UPDATE "Vod" SET "viewCount" = -5 WHERE id = \'e\'')
    worker = world.worker(**vod_table.SETTINGS)
    await world.view("a", 3)
    await worker.cycle()  # views that were flushed before are in the table, too
    assert await imported(world, worker) == (3, 300)
    assert await imported(world, worker) == (0, 0)
    await world.view("b", 2)
    await worker.cycle()
    assert await world.totals() == Counter(a=103, b=102, d=100)
    assert await vod_table.shown(world) == {"a": 103, "b": 102, "c": 0, "d": 100, "e": -5}
    assert await imported(world, worker) == (0, 0)
    await world.assert_consistent()
    (number,) = await worker.counters.display.views(["b"])
    assert number.views == 102


@pytest.mark.parametrize("key_type", ["bigint", "uuid", "varchar(40)"])
async def test_totals_are_imported_for_every_kind_of_key(
    world: World, monkeypatch: pytest.MonkeyPatch, key_type: str
) -> None:
    monkeypatch.setattr("worker.db.target.total_import.ROWS_AT_ONCE", 3)
    make = "gen_random_uuid()" if key_type == "uuid" else f"CAST(n AS {key_type})"
    await world.sql.execute(f'CREATE TABLE "Vod" (id {key_type} PRIMARY KEY, "viewCount" bigint)')
    await world.sql.execute(f'INSERT INTO "Vod" SELECT {make}, n FROM generate_series(1, 10) n')
    assert await imported(world, world.worker(**vod_table.SETTINGS)) == (10, 55)
    expected = {str(vod_id): views for vod_id, views in (await vod_table.shown(world)).items()}
    assert dict(await world.totals()) == expected


async def test_import_while_the_worker_flushes_misses_nothing(world: World) -> None:
    await vod_table.create(world, ids=",".join(f"vod_{number:03}" for number in range(100)))
    await world.sql.execute('UPDATE "Vod" SET "viewCount" = 1000')
    worker = world.worker(BATCH_SIZE="10", **vod_table.SETTINGS)
    done = asyncio.Event()

    async def flush() -> None:
        while not done.is_set():
            await world.view_many([f"vod_{number:03}" for number in range(100)])
            await worker.cycle_until_done()

    flushing = asyncio.create_task(flush())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.db.target.total_import.ROWS_AT_ONCE", 7)
        await asyncio.sleep(0.1)
        assert await imported(world, world.worker(**vod_table.SETTINGS)) == (100, 100_000)
    done.set()
    await flushing
    flushes = worker.metric("view_count_flushed_views_total") / 100
    assert set((await vod_table.shown(world)).values()) == {1000 + flushes}
    assert dict(await world.totals()) == await vod_table.shown(world)


async def test_first_flush_waits_for_a_running_import(world: World) -> None:
    await vod_table.create(world, ids="a")
    await world.view("a", 3)
    reading, go_on = asyncio.Event(), asyncio.Event()
    take_page = TargetTable.import_page

    async def take_page_later(*args: Any) -> Page:
        reading.set()
        await go_on.wait()
        return await take_page(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TargetTable, "import_page", take_page_later)
        importing = asyncio.create_task(imported(world, world.worker(**vod_table.SETTINGS)))
        await reading.wait()
        flush = asyncio.create_task(world.worker(**vod_table.SETTINGS).cycle())
        done, _ = await asyncio.wait({flush}, timeout=0.5)
        go_on.set()
        await asyncio.gather(importing, flush)
    assert not done
    assert await vod_table.shown(world) == {"a": 3}
    await world.assert_exact()
