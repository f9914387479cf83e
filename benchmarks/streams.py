"""Measures how fast a stream is carried to Postgres, compared with what one writes first. Run by `make bench`.

All contenders carry the same 60,000 chunk requests from the same Redis to tables of the same shape, in turn, for
several rounds. Compare the ratios within a round: absolute speeds vary with the load of the machine.

* XREADGROUP + executemany + XACK: the naive loop. An entry may become two rows when it is killed before XACK.
* FastStream: a batch subscriber of that framework, with the same executemany.
* bare loop: XRANGE and our own statement, without claim, evidence, letters and leases. The ceiling.

With BENCH_DATABASE_URL it measures another Postgres, with TimescaleDB for example: a new, empty database.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import redis.asyncio as aioredis
from chunk_requests import AGENT, BARE, INSERT, bare_parameters

from worker.app.pipelines import build_pipelines
from worker.contract.entry_id import EntryId
from worker.db import schema
from worker.db.session import Database
from worker.dev.servers import PostgresServer, ValkeyServer
from worker.observability.logs import configure_logs
from worker.observability.metrics import Metrics
from worker.observability.status import SERVERS, Status
from worker.pipelines.model import Idle, OnHold, Window
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS
from worker.redis.client import RedisClient
from worker.runtime.clock import SystemClock
from worker.runtime.event_loop import run_async
from worker.settings.environment import load_settings

ENTRIES = int(os.environ.get("BENCH_ENTRIES", "60000"))
BATCH = 1000
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
STREAM = "chunk_requests"
FIELDS = ("time", "path", "ip", "referer", "user_agent", "sid", "uid", "event_id")


def make_documents() -> list[str]:
    rng, now = random.Random(1), datetime.now(UTC)
    return [
        json.dumps(
            {
                "time": (now - timedelta(milliseconds=ENTRIES - number)).isoformat(),
                "path": f"/vod/{rng.randrange(1000):04}/1080p/{number % 5000:05}.m4s",
                "ip": f"203.0.113.{rng.randrange(256)}",
                "referer": f"https://example.org/watch/{rng.randrange(1000)}",
                "user_agent": AGENT,
                "sid": f"{rng.getrandbits(64):016x}",
                "uid": f"user_{rng.randrange(10_000)}",
            }
        )
        for number in range(ENTRIES)
    ]


def parse(document: bytes | str) -> tuple[Any, ...]:
    """As one writes it first."""
    found = json.loads(document)
    return (datetime.fromisoformat(found["time"]), *(found.get(name) for name in FIELDS[1:]))


class Bench:
    def __init__(self, redis_url: str, database_url: str) -> None:
        self.redis_url = redis_url
        self.database_url = database_url
        self.documents = make_documents()

    async def open(self) -> None:
        self.redis = aioredis.from_url(self.redis_url)
        self.sql = await asyncpg.connect(self.database_url)
        database = Database(load_settings(environ={"DATABASE_URL": self.database_url}).database)
        await schema.upgrade(database)
        await database.close()
        await self.sql.execute("CREATE TABLE IF NOT EXISTS naive (LIKE chunk_requests INCLUDING INDEXES)")
        if await self.sql.fetchval("SELECT count(*) FROM pg_extension WHERE extname = 'timescaledb'"):
            await self.sql.execute("SELECT create_hypertable('naive', by_range('time', INTERVAL '1 day'))")

    async def close(self) -> None:
        await self.redis.aclose()
        await self.sql.close()

    async def fill(self) -> None:
        """The same entries in a new stream, and empty tables."""
        await self.redis.delete(STREAM)
        await self.sql.execute("TRUNCATE naive, chunk_requests, stream_positions, dead_letters")
        for first in range(0, ENTRIES, 5000):
            pipeline = self.redis.pipeline(transaction=False)
            for document in self.documents[first : first + 5000]:
                pipeline.xadd(STREAM, {"data": document})
            await pipeline.execute()
        await self.sql.execute("CHECKPOINT")
        await self.redis.config_resetstat()

    async def ours(self) -> float:
        settings = load_settings(
            environ={
                "REDIS_URL": self.redis_url,
                "DATABASE_URL": self.database_url,
                "PIPELINES": STREAM,
                "CHUNKLOG_BATCH_SIZE": str(BATCH),
            }
        )
        status = Status(SystemClock().monotonic, (*SERVERS, STREAM))
        database, client = Database(settings.database), RedisClient(settings.redis)
        (stream,) = build_pipelines(settings, database, client, status, Metrics()).streams
        await stream.lease.take()
        pipeline = stream.pipeline
        # The other contenders are connected already, too.
        began, ahead = time.perf_counter(), None
        while not isinstance(read := ahead or await pipeline.source.read(), Idle):
            if isinstance(read, OnHold):
                raise SystemExit(read.cause)
            ahead = await pipeline._deliver(read)
        seconds = time.perf_counter() - began
        await pipeline.source.close()
        await database.close()
        await client.close()
        return seconds

    async def naive(self) -> None:
        await self.redis.xgroup_create(STREAM, "naive", "0")
        while found := await self.redis.xreadgroup("naive", "me", {STREAM: ">"}, count=BATCH):
            entries = found[STREAM.encode()][0] if isinstance(found, dict) else found[0][1]
            async with self.sql.transaction():
                await self.sql.executemany(INSERT, [parse(fields[b"data"]) for _, fields in entries])
            await self.redis.xack(STREAM, "naive", *(entry_id for entry_id, _ in entries))

    async def bare(self) -> None:
        window, last = Window(1e9, 1e9), b"0-0"
        connection = RedisClient(load_settings(environ={"REDIS_URL": self.redis_url}).redis).stream_connection()
        while True:
            (entries,) = await connection.send([("XRANGE", STREAM, b"(" + last, "+", "COUNT", BATCH)], 5)
            if not entries:
                break
            rows = [CHUNK_REQUESTS.row(CHUNK_REQUESTS.parse(f[1], EntryId.parse(i), window)) for i, f in entries]
            async with self.sql.transaction():
                await self.sql.execute(BARE, *bare_parameters(rows))
            last = entries[-1][0]
        await connection.drop()

    async def faststream(self) -> None:
        from faststream import FastStream
        from faststream.redis import RedisBroker, StreamSub

        broker, done = RedisBroker(self.redis_url, logger=None), asyncio.Event()
        left = ENTRIES
        sub = StreamSub(STREAM, group="faststream", consumer="me", batch=True, max_records=BATCH, last_id=">")

        async def store(messages: list[dict[str, Any]]) -> None:
            nonlocal left
            rows = [parse(message["data"]) for message in messages]
            async with self.sql.transaction():
                await self.sql.executemany(INSERT, rows)
            left -= len(messages)
            if left <= 0:
                done.set()

        await self.redis.xgroup_create(STREAM, "faststream", "0")
        broker.subscriber(stream=sub)(store)
        app = FastStream(broker, logger=None)
        await app.start()
        await done.wait()
        await app.stop()

    async def cost(self) -> float:
        """Microseconds of Redis's time for an entry."""
        stats = await self.redis.info("commandstats")
        read = ("evalsha", "eval", "xrange", "xreadgroup", "xack", "xautoclaim")
        used = sum(stats.get(f"cmdstat_{name}", {}).get("usec", 0) for name in read)
        return used / ENTRIES


async def main() -> None:
    configure_logs("error")
    folder = Path(tempfile.mkdtemp(prefix="viewer-worker-bench-"))
    folder.chmod(0o755)
    valkey, postgres = ValkeyServer(folder / "redis"), PostgresServer(folder / "postgres")
    valkey.start()
    url = os.environ.get("BENCH_DATABASE_URL")
    if url is None:
        postgres.start()
    bench = Bench(valkey.url, url or postgres.url)
    try:
        await bench.open()
        await compare(bench)
        await bench.close()
    finally:
        valkey.kill()
        if url is None:
            postgres.kill()
        shutil.rmtree(folder, ignore_errors=True)


async def compare(bench: Bench) -> None:
    contenders: dict[str, Callable[[], Awaitable[float | None]]] = {
        "viewer-worker": bench.ours,
        "bare loop (the ceiling)": bench.bare,
        "XREADGROUP + executemany": bench.naive,
    }
    try:
        import faststream  # noqa: F401
    except ModuleNotFoundError:
        print("FastStream is not installed: left out (pip install 'faststream[redis]')")
    else:
        contenders["FastStream"] = bench.faststream
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    costs: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            await bench.fill()
            began = time.perf_counter()
            seconds = await contender() or time.perf_counter() - began
            rates[name].append(ENTRIES / seconds)
            costs[name] = await bench.cost()
            table = STREAM if name == "viewer-worker" else "naive"
            assert await bench.sql.fetchval(f"SELECT count(*) FROM {table}") == ENTRIES, name
    print(f"{ENTRIES:,} entries, {BATCH:,} a batch, median of {ROUNDS} rounds; ratio: viewer-worker / contender")
    for name, measured in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["viewer-worker"], measured, strict=True))
        print(
            f"  {name:<26} {statistics.median(measured):>9,.0f} entries/s   {ratio:5.2f}"
            f"   {costs[name]:5.2f} µs of Redis for an entry"
        )


if __name__ == "__main__":
    run_async(main())
