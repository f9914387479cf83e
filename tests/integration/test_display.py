"""The numbers that a page shows: never too low, exact when no message is on its way, and cheap to read."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy.dialects import postgresql

from tests.support.proxy import Mode, Proxy
from tests.support.world import World
from worker.db.counters.reads import TOP, TOTALS, Shown, TopEntry
from worker.db.read_limit import ANSWER_S
from worker.db.session import COMMAND_TIMEOUT_S
from worker.errors import DatabaseRefused, DatabaseUnavailable, TooManyReaders


async def test_pending_and_stored_views_are_shown_together(world: World) -> None:
    worker = world.worker()
    await world.view("a", 5)
    await worker.cycle()
    await world.view("a", 2)
    await world.view("new", 1)
    await world.redis.set(world.prefix + "broken", "abc")
    shown = await worker.counters.display.views(["new", "a", "nobody", "broken"])
    assert shown == [Shown("new", 1, 1, 0), Shown("a", 7, 2, 5), Shown("nobody", 0, 0, 0), Shown("broken", 0, 0, 0)]


@pytest.mark.parametrize(("count_source", "views"), [("both", 10), ("counters", 8), ("messages", 10), ("sum", 18)])
async def test_announced_views_are_not_shown_twice(world: World, count_source: str, views: int) -> None:
    await world.sql.execute("INSERT INTO view_counts (vod_id, views, counted, announced) VALUES ('a', 10, 5, 10)")
    if count_source in ("counters", "sum"):
        await world.sql.execute("UPDATE view_counts SET views = $1", {"counters": 5, "sum": 15}[count_source])
    await world.redis.set(world.prefix + "a", 3)
    (shown,) = await world.worker(VIEW_COUNT_SOURCE=count_source).counters.display.views(["a"])
    assert shown.views == views


async def test_imported_views_are_shown(world: World) -> None:
    await world.sql.execute("INSERT INTO view_counts VALUES ('a', 105, 5, 3, now(), 100)")
    await world.redis.set(world.prefix + "a", 2)
    (shown,) = await world.worker().counters.display.views(["a"])
    assert shown.views == 107


async def test_number_is_exact_between_commit_and_settle(world: World) -> None:
    worker, reader = world.worker(), world.worker()
    await worker.cycle()
    await world.view("a", 5)
    settle = worker.counters.flusher.settler.settle
    between = []

    async def look_first(*args: Any, **kwargs: Any) -> bool:
        await world.view("a", 2)
        between.extend(await reader.counters.display.views(["a"]))
        return await settle(*args, **kwargs)

    worker.counters.flusher.settler.settle = look_first  # type: ignore[method-assign]
    await worker.cycle()
    assert between == [Shown("a", views=7, pending=2, stored=5)]


async def test_number_on_hold_is_not_called_exact(world: World) -> None:
    worker = world.worker()
    assert (await worker.counters.display.views(["a"]))[0].is_exact  # nothing was flushed yet
    await world.view("a", 5)
    await worker.cycle()
    await world.view("a", 2)
    assert await worker.counters.display.views(["a"]) == [Shown("a", 7, 2, 5)]
    await world.redis.set(world.keys.marker, "garbage")
    assert await worker.counters.display.views(["a"]) == [Shown("a", 7, 2, 5, is_exact=False)]
    await world.redis.delete(world.keys.marker)
    assert not (await worker.counters.display.views(["a"]))[0].is_exact
    await worker.counters.loop._roll_up.catch_up(lambda: True)
    assert not (await worker.counters.display.top(timedelta(hours=1), 5)).is_exact


async def test_number_is_not_called_exact_where_the_database_was_recreated_or_the_ledger_lacks_a_flush(
    world: World,
) -> None:
    worker = world.worker()
    await world.view("a", 5)
    await worker.cycle()
    old = await world.redis.get(world.keys.marker)
    for _ in range(2):
        await world.view("a", 2)
        await worker.cycle()
    await world.redis.set(world.keys.marker, old)
    assert (await worker.counters.display.views(["a"]))[0].is_exact
    await world.sql.execute("DELETE FROM view_count_flushes WHERE flush_id = 2")
    assert not (await worker.counters.display.views(["a"]))[0].is_exact
    for table in ("view_counts", "view_count_flushes", "view_count_lineages", "view_count_sources"):
        await world.sql.execute(f"DELETE FROM {table}")
    assert await worker.counters.display.views(["a"]) == [Shown("a", 0, 0, 0, is_exact=False)]


async def test_number_is_exact_while_redis_is_behind_by_several_flushes(world: World) -> None:
    worker = world.worker()
    await world.view("a", 5)
    await worker.cycle()
    older = await world.redis.get(world.keys.marker)
    for _ in range(3):
        await world.view("a", 4)
        await worker.cycle()
    await world.redis.set(world.keys.marker, older)
    await world.redis.set(world.prefix + "a", 13)  # as it was then, and one more since
    (shown,) = await worker.counters.display.views(["a"])
    assert (shown.views, shown.pending) == (18, 1)


async def test_number_is_exact_while_views_are_flushed(world: World) -> None:
    worker, reader = world.worker(BATCH_SIZE="2"), world.worker()
    await worker.cycle()
    done = asyncio.Event()

    async def work() -> None:
        while not done.is_set():
            await worker.cycle_until_done()

    working = asyncio.create_task(work())
    for _ in range(100):
        await world.view_many(["a", "b", "c", "d"])
        for shown in await reader.counters.display.views(["a", "b", "c", "d"]):
            assert shown.views == world.truth[shown.vod_id]
    done.set()
    await working
    await worker.cycle()
    assert [shown.views for shown in await reader.counters.display.views(["a", "b"])] == [100, 100]


async def test_reader_reads_redis_before_postgres(world: World) -> None:
    """In the other order, a view that is flushed in between would be seen in neither."""
    worker, reader = world.worker(), world.worker()
    await worker.cycle()
    await world.view("a", 5)
    order: list[str] = []
    read, transaction = reader.redis.read, reader.database.transaction

    async def read_then_flush(keys: Any) -> Any:
        values = await read(keys)
        order.append("redis")
        await worker.cycle()
        return values

    def begin() -> Any:
        order.append("postgres")
        return transaction()

    reader.redis.read = read_then_flush  # type: ignore[method-assign]
    reader.database.transaction = begin  # type: ignore[method-assign]
    (shown,) = await reader.counters.display.views(["a"])
    assert order == ["redis", "postgres"]
    assert shown.views == 5


async def test_number_is_exact_while_the_first_flush_creates_the_marker(world: World) -> None:
    worker, reader = world.worker(), world.worker()
    await world.view("a", 5)
    read = reader.redis.read

    async def read_then_flush(keys: Any) -> Any:
        values = await read(keys)
        await worker.cycle()
        return values

    reader.redis.read = read_then_flush  # type: ignore[method-assign]
    assert await reader.counters.display.views(["a"]) == [Shown("a", 5, 0, 5)]


async def test_top_counts_whole_hours_and_shows_current_totals(world: World) -> None:
    await world.sql.execute(
        """
        INSERT INTO view_counts_hourly (bucket, vod_id, views)
        SELECT date_trunc('hour', now(), 'UTC') - make_interval(hours => h), id, v
        FROM (VALUES (0, 'a', 5), (1, 'a', 1), (1, 'b', 7), (2, 'c', 50), (1, 'd', 6)) AS _ (h, id, v)
        """
    )
    await world.sql.execute("INSERT INTO view_counts (vod_id, views, counted) VALUES ('a', 6, 6), ('b', 9, 9)")
    await world.redis.set(world.prefix + "a", 10)
    display = world.worker().counters.display
    top = await display.top(timedelta(hours=1), limit=3)
    assert top.entries == [TopEntry("b", 7, 9), TopEntry("a", 6, 16), TopEntry("d", 6, 0)]
    assert (top.since.minute, top.since.second) == (0, 0)
    assert (await display.top(timedelta(hours=2), limit=1)).entries == [TopEntry("c", 50, 0)]
    assert (await world.worker().counters.display.top(timedelta(days=1), limit=2)).entries[0].vod_id == "c"


async def test_history_adds_up_hours_and_days_in_utc(world: World) -> None:
    await world.sql.execute("SET TIME ZONE 'Asia/Kolkata'")
    rows = [
        ("03-01 22", "a", 1),
        ("03-01 23", "a", 2),
        ("03-02 00", "a", 4),
        ("03-02 00", "b", 8),
        ("03-04 05", "a", 16),
    ]
    for hour, vod_id, views in rows:
        begin = datetime.strptime(f"2024-{hour}", "%Y-%m-%d %H").replace(tzinfo=UTC)
        await world.sql.execute("INSERT INTO view_counts_hourly VALUES ($1, $2, $3)", begin, vod_id, views)
    history = world.worker().counters.display.history
    first, last = datetime(2024, 3, 1, 23, 30, tzinfo=UTC), datetime(2024, 3, 2, 10, tzinfo=UTC)
    _, hours = await history("a", "hour", first, last)
    assert [(each.start.day, each.start.hour, each.views) for each in hours] == [(1, 23, 2), (2, 0, 4)]
    _, days = await history("a", "day", first, datetime(2024, 3, 9, tzinfo=UTC))
    assert [(each.start.day, each.start.hour, each.views) for each in days] == [(1, 0, 3), (2, 0, 4), (4, 0, 16)]
    assert (await history("nobody", "day", first, last))[1] == []


async def test_readers_do_not_use_up_the_connections_of_the_worker(world: World) -> None:
    worker = world.worker(DB_MAX_CONNECTIONS="3")
    await worker.cycle()
    async with world.sql.transaction():
        await world.sql.execute("LOCK TABLE view_counts_hourly IN ACCESS EXCLUSIVE MODE")
        readers = [asyncio.create_task(worker.counters.display.top(timedelta(days=1), 10)) for _ in range(60)]
        outcomes = await asyncio.gather(*readers, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {TooManyReaders, DatabaseUnavailable}
    assert sum(isinstance(outcome, TooManyReaders) for outcome in outcomes) >= 10


async def test_reader_gives_up_on_a_silent_database_long_before_a_flush_would(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ANSWER_S < COMMAND_TIMEOUT_S / 4
    monkeypatch.setattr("worker.db.read_limit.ANSWER_S", 0.2)
    async with Proxy(world.database_url) as proxy:
        worker = world.worker(DATABASE_URL=proxy.url)
        await worker.counters.display.views(["a"])
        proxy.mode = Mode.DROP_ALL
        async with asyncio.timeout(COMMAND_TIMEOUT_S / 2):
            with pytest.raises(DatabaseUnavailable, match="no answer in time"):
                await worker.counters.display.views(["a"])


async def test_missing_tables_are_reported(redis_url: str, empty_database_url: str) -> None:
    async with World(redis_url, empty_database_url) as world:
        with pytest.raises(DatabaseRefused, match="view_count"):
            await world.worker().counters.display.views(["a"])


async def test_queries_use_their_indexes(world: World) -> None:
    """However large the tables are, a page reads a few rows, and a top list reads the hours of its window."""
    await world.sql.execute("INSERT INTO view_counts (vod_id) SELECT 'vod_' || n FROM generate_series(1, 50000) n")
    await world.sql.execute(
        """
        INSERT INTO view_counts_hourly (bucket, vod_id, views)
        SELECT date_trunc('hour', now(), 'UTC') - make_interval(hours => h), 'vod_' || n, 1
        FROM generate_series(1, 400) n, generate_series(1000, 0, -1) h ORDER BY 1
        """
    )
    await world.sql.execute(
        """
        INSERT INTO view_count_flushes
        SELECT 'default', f, now(), gen_random_uuid(), gen_random_uuid(), 100, 100, 'a worker',
               array_agg('vod_' || n), array_agg(1), array_agg(0), array_agg(1)
        FROM generate_series(1, 1000) f, generate_series(1, 100) n GROUP BY f
        """
    )
    await world.sql.execute("ANALYZE view_counts, view_counts_hourly, view_count_flushes")
    ids = [f"vod_{number}" for number in range(100)]
    plan = await explain(world, TOTALS, ids=ids, source="default", lineage=uuid4(), settled=900)
    assert "view_counts_pkey" in plan
    assert "view_count_flushes_pkey" in plan
    assert "Seq Scan" not in plan
    plan = await explain(world, TOP, window=timedelta(hours=24), at_most=10)
    assert "view_counts_hourly_bucket_brin" in plan
    assert "Seq Scan" not in plan


async def explain(world: World, statement: Any, **parameters: Any) -> str:
    compiled = statement.compile(dialect=postgresql.asyncpg.dialect())  # type: ignore[no-untyped-call]
    values = compiled.params | parameters
    in_order = [values[name] for name in compiled.positiontup]
    return str(await world.sql.fetchval(f"EXPLAIN (FORMAT JSON) {compiled}", *in_order))
