"""With TimescaleDB, the tables by time are hypertables, and everything works as it does without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import text

from tests.support.world import InProcessWorker, World
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.settings.environment import load_settings

ROLE = Path(__file__).parents[2] / "deploy" / "postgres" / "role.sql"


async def rows(database: Database, query: str) -> list[Any]:
    async with database.transaction() as tx:
        return [tuple(row) for row in await tx.execute(text(query))]


async def test_upgrade_flush_replay_and_downgrade_with_timescaledb(redis_url: str, timescale_url: str) -> None:
    address = parse_database_url(timescale_url)
    one_connection = Database(address, pool_size=1, overflow=0)
    await schema.upgrade(one_connection)
    hypertables = "SELECT hypertable_name FROM timescaledb_information.hypertables ORDER BY 1"
    assert await rows(one_connection, hypertables) == [
        ("bars_1m",),
        ("chunk_requests",),
        ("metrics",),
        ("view_counts_hourly",),
        ("view_events",),
    ]

    world = World(redis_url, timescale_url)
    worker = InProcessWorker(load_settings(environ=world.environment), one_connection)
    world.connect_redis()
    await world.view_many(["a", "b", "b"])
    await worker.cycle()
    older_marker = await world.marker()
    assert older_marker is not None
    await world.view_many(["b", "c"])
    await worker.cycle()
    totals = "SELECT vod_id, views FROM view_counts ORDER BY 1"
    assert await rows(one_connection, totals) == [("a", 1), ("b", 3), ("c", 1)]

    # Redis is restored to its state after the first flush: the second is settled from the ledger.
    await world.redis.set(world.keys.marker, older_marker.encode())
    await world.view_many(["b", "c"])
    await worker.cycle()
    assert worker.metric("view_count_settle_replays_total") == 1
    assert await rows(one_connection, totals) == [("a", 1), ("b", 3), ("c", 1)]
    for table in ("view_count_deltas", "view_counts_hourly"):
        assert await rows(one_connection, f"SELECT sum(views)::int FROM {table}") == [(5,)]

    await worker.close()
    await world.disconnect_redis()
    await schema.downgrade(one_connection, "base")
    assert await rows(one_connection, hypertables) == []
    await one_connection.close()


async def test_limited_role_can_create_chunks_and_delete_their_rows(timescale_url: str) -> None:
    owner = Database(parse_database_url(timescale_url), pool_size=1, overflow=0)
    await schema.upgrade(owner)
    await owner.close()
    sql = await asyncpg.connect(timescale_url)
    await sql.execute(ROLE.read_text())
    await sql.execute("SET ROLE viewer_worker")
    for _ in range(2):
        await sql.execute(
            """
            INSERT INTO view_counts_hourly VALUES (date_trunc('hour', now(), 'UTC'), 'a', 2)
                ON CONFLICT (vod_id, bucket) DO UPDATE SET views = view_counts_hourly.views + excluded.views;
            INSERT INTO chunk_requests (time, path) VALUES (now(), '/a');
            DELETE FROM chunk_requests;
            INSERT INTO bars_1m VALUES ('A', date_trunc('minute', now()), 1, 1, 1, 1, 1, 1)
                ON CONFLICT (symbol, "timestamp") DO UPDATE SET close = 2;
            """
        )
    await sql.execute("RESET ROLE")
    chunks = "SELECT count(DISTINCT hypertable_name)::int FROM timescaledb_information.chunks"
    assert await sql.fetchval(chunks) == 3
    assert await sql.fetchval("SELECT views FROM view_counts_hourly") == 4
    await sql.close()
