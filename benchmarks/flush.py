"""Measures how fast a backlog is flushed to Postgres, compared with naive implementations. Run by `make bench`.

All contenders move the same counters from the same Redis to the same Postgres (embedded servers), in turn, for several
rounds. Compare the ratios within a round: absolute speeds vary with the load of the machine. The naive implementations
lose views when they are killed between GETDEL and COMMIT. The ceiling is the worker's own statements in a bare loop,
without anything that makes them safe. The history, which naive implementations do not have, is measured apart.

`KEYS=1000000 ROUNDS=1` measures a large backlog. The memory is that of this process: `make bench` runs each size in its
own.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from uuid import uuid4

import asyncpg
import redis.asyncio as aioredis

from worker.app.counters import ViewCounters, build_counters
from worker.counters.flush.marker import Marker
from worker.counters.flush.settle import SETTLE
from worker.counters.flush.totals import TotalsChannel
from worker.db import schema
from worker.db.counters.ledger import Flush, Ledger
from worker.db.session import Database
from worker.dev.servers import PostgresServer, ValkeyServer
from worker.observability.logs import configure_logs
from worker.observability.metrics import Metrics
from worker.observability.status import Status
from worker.redis.client import RedisClient
from worker.runtime.clock import SystemClock
from worker.settings.environment import load_settings

KEYS = int(os.environ.get("KEYS", "20000"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))
PREFIX = "vod:views:"
BATCH = 5000
LEDGER = "view_count_flushes"
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
    counters.loop._is_calm = lambda: False  # type: ignore[method-assign]  # the history is measured apart
    redis, sql = aioredis.from_url(redis_url), await asyncpg.connect(database_url)
    await sql.execute("CREATE TABLE naive (vod_id text PRIMARY KEY, views bigint NOT NULL)")
    worker, naive = Worker(counters), Naive(redis, sql)
    ceiling = Ceiling(redis, client, database, TotalsChannel(client, settings.view_totals_channel))
    contenders: dict[str, Callable[[], Awaitable[None]]] = {
        "viewer-worker": worker.flush,
        "its statements in a bare loop": ceiling.flush,
        "GETDEL + executemany": naive.in_batches,
    }
    if KEYS <= 100_000:
        contenders["GETDEL + upsert, one by one"] = naive.one_by_one
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    wal_bytes: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            await record_views(redis)
            before = await sql.fetchval("SELECT pg_current_wal_insert_lsn()")
            began = time.perf_counter()
            await contender()
            rates[name].append(KEYS / (time.perf_counter() - began))
            wal = await sql.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), $1)::bigint", before)
            wal_bytes[name] = wal / KEYS
            if contender == worker.flush:
                await worker.add_to_history()
    print(f"{KEYS:,} counters, median of {ROUNDS} rounds; ratio: viewer-worker / contender, per round")
    for name, measured in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["viewer-worker"], measured, strict=True))
        rate = f"{statistics.median(measured):>9,.0f} counters/s"
        print(f"  {name:<30} {rate}   {ratio:5.2f}   {wal_bytes[name]:5.0f} bytes of WAL a counter")
    share = statistics.median(worker.history_s) / (KEYS / statistics.median(rates["viewer-worker"]))
    print(f"  the history behind it takes {share:.0%} of the time of the flushes")
    size = await sql.fetchval(f"SELECT pg_total_relation_size('{LEDGER}') / (SELECT sum(keys) FROM {LEDGER})")
    print(
        f"  ledger: {size:.1f} MB for a million counters flushed; peak memory of the worker {worker.peak_mib:.0f} MiB"
    )
    await redis.aclose()
    await sql.close()
    await client.close()
    await database.close()


class Worker:
    """`history_s`: seconds that each update of the history took. `peak_mib`: of this process, after the first flush."""

    def __init__(self, counters: ViewCounters) -> None:
        self._counters = counters
        self.history_s: list[float] = []
        self.peak_mib = 0.0

    async def flush(self) -> None:
        self._counters.loop.sweep_soon()
        await self._counters.loop.cycle()
        self.peak_mib = self.peak_mib or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    async def add_to_history(self) -> None:
        began = time.perf_counter()
        await self._counters.loop._roll_up.catch_up(lambda: True)
        self.history_s.append(time.perf_counter() - began)


class Ceiling:
    """The worker's statements in a bare loop: no fence, no comparison, no recovery."""

    def __init__(self, redis: aioredis.Redis, client: RedisClient, database: Database, totals: TotalsChannel) -> None:
        self._redis = redis
        self._client = client
        self._database = database
        self._totals = totals
        self._ledger = Ledger("ceiling", "bench")
        self._marker = Marker(uuid4(), 0, uuid4())

    async def flush(self) -> None:
        await self._redis.set("ceiling", self._marker.encode())
        async for keys in pages(self._redis, BATCH):
            values = await self._client.read(keys)
            ids = [key.decode()[len(PREFIX) :] for key in keys]
            counted = {vod_id: int(value) for vod_id, value in zip(ids, values, strict=True) if value}
            before = self._marker
            flush = Flush(before.flush_id + 1, uuid4(), before.nonce, counted)
            async with self._database.transaction() as tx:
                changes = await self._ledger.record(tx, flush)
            self._marker = before.after(flush)
            amounts = [b"%d" % count for count in counted.values()]
            await self._client.run(
                SETTLE, [b"ceiling", b"none", *keys], [before.encode(), self._marker.encode(), *amounts]
            )
            await self._totals.publish(flush.flush_id, changes)


class Naive:
    """What loses views when it is killed between GETDEL and COMMIT."""

    def __init__(self, redis: aioredis.Redis, sql: asyncpg.Connection[asyncpg.Record]) -> None:
        self._redis = redis
        self._sql = sql

    async def in_batches(self) -> None:
        async for keys in pages(self._redis, 500):
            pipeline = self._redis.pipeline(transaction=False)
            for key in keys:
                pipeline.getdel(key)
            values = await pipeline.execute()
            rows = [(key.decode()[len(PREFIX) :], int(value)) for key, value in zip(keys, values, strict=True)]
            await self._sql.executemany(UPSERT, rows)

    async def one_by_one(self) -> None:
        async for key in self._redis.scan_iter(match=PREFIX + "*", count=1000):
            value = await self._redis.getdel(key)
            await self._sql.execute(UPSERT, key.decode()[len(PREFIX) :], int(value))


async def record_views(redis: aioredis.Redis) -> None:
    for first in range(0, KEYS, 10_000):
        some = range(first, min(first + 10_000, KEYS))
        await redis.mset({f"{PREFIX}vod_{number:07}": 3 for number in some})


async def pages(redis: aioredis.Redis, size: int) -> AsyncIterator[list[bytes]]:
    keys = [key async for key in redis.scan_iter(match=PREFIX + "*", count=1000)]
    for first in range(0, len(keys), size):
        yield sorted(keys[first : first + size])


if __name__ == "__main__":
    asyncio.run(main())
