"""Measures how fast a backlog is flushed to Postgres, compared with naive implementations. Run by `make bench`.

All contenders move the same counters from the same Redis to the same Postgres (embedded servers), in turn, for several
rounds. Compare the ratios within a round: absolute speeds vary with the load of the machine. The naive implementations
lose views when they are killed between GETDEL and COMMIT.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import redis.asyncio as aioredis

from worker.app.counters import build_counters
from worker.db import schema
from worker.db.session import Database
from worker.dev.servers import PostgresServer, ValkeyServer
from worker.observability.logs import configure_logs
from worker.observability.metrics import Metrics
from worker.observability.status import Status
from worker.redis.client import RedisClient
from worker.runtime.clock import SystemClock
from worker.settings.environment import load_settings

KEYS = 20_000
ROUNDS = 5
PREFIX = "vod:views:"
UPSERT = (
    "INSERT INTO naive (vod_id, views) VALUES ($1, $2) "
    "ON CONFLICT (vod_id) DO UPDATE SET views = naive.views + excluded.views"
)


async def main() -> None:
    configure_logs("error")
    folder = Path(tempfile.mkdtemp(prefix="viewer-worker-bench-"))
    folder.chmod(0o755)
    valkey, postgres = ValkeyServer(folder / "redis"), PostgresServer(folder / "postgres")
    valkey.start()
    postgres.start()
    try:
        await compare(valkey.url, postgres.url)
    finally:
        valkey.kill()
        postgres.kill()
        shutil.rmtree(folder, ignore_errors=True)


async def compare(redis_url: str, database_url: str) -> None:
    settings = load_settings(environ={"REDIS_URL": redis_url, "DATABASE_URL": database_url})
    database, client = Database(settings.database), RedisClient(settings.redis)
    await schema.upgrade(database)
    counters = build_counters(settings, database, client, Status(SystemClock().monotonic, ("view_counts",)), Metrics())
    await counters.lease.take()
    await counters.loop.cycle()
    redis, sql = aioredis.from_url(redis_url), await asyncpg.connect(database_url)
    await sql.execute("CREATE TABLE naive (vod_id text PRIMARY KEY, views bigint NOT NULL)")

    async def ours() -> None:
        counters.loop.sweep_soon()
        await counters.loop.cycle()

    async def batched() -> None:
        keys = [key async for key in redis.scan_iter(match=PREFIX + "*", count=1000)]
        for first in range(0, len(keys), 500):
            some = sorted(keys[first : first + 500])
            pipeline = redis.pipeline(transaction=False)
            for key in some:
                pipeline.getdel(key)
            values = await pipeline.execute()
            rows = [(key.decode()[len(PREFIX) :], int(value)) for key, value in zip(some, values, strict=True)]
            await sql.executemany(UPSERT, rows)

    async def one_by_one() -> None:
        async for key in redis.scan_iter(match=PREFIX + "*", count=1000):
            value = await redis.getdel(key)
            await sql.execute(UPSERT, key.decode()[len(PREFIX) :], int(value))

    contenders: dict[str, Callable[[], Awaitable[None]]] = {
        "viewer-worker": ours,
        "GETDEL + executemany": batched,
        "GETDEL + upsert, one by one": one_by_one,
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            await redis.mset({f"{PREFIX}vod_{number:06}": 3 for number in range(KEYS)})
            began = time.perf_counter()
            await contender()
            rates[name].append(KEYS / (time.perf_counter() - began))
    print(f"{KEYS:,} counters, median of {ROUNDS} rounds; ratio: viewer-worker / contender, per round")
    for name, measured in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["viewer-worker"], measured, strict=True))
        print(f"  {name:<28} {statistics.median(measured):>9,.0f} counters/s   {ratio:5.2f}")
    await redis.aclose()
    await sql.close()
    await client.close()
    await database.close()


if __name__ == "__main__":
    asyncio.run(main())
