"""Measures how long a session's event takes from acceptance to commit. Run by `make bench`.

An application sends 1,000 events a second, of 500 sessions, for ten seconds; beside it a worker flushes 5,000 counters
twice a second, which another process increments. Prints the median, the 99th percentile and the maximum: first without
that load, then with it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import redis.asyncio as aioredis

from worker import SessionManager, SessionStore
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.dev.servers import PostgresServer, ValkeyServer
from worker.observability.logs import configure_logs
from worker.pipelines.model import Batch, Written
from worker.pipelines.sink import PostgresSink
from worker.runtime.event_loop import run_async

RATE = 1000
SECONDS = int(os.environ.get("BENCH_SECONDS", "10"))
SESSIONS = 500
KEYS = 5000


class Latencies:
    """Collects, for each event that is written, the milliseconds since it was accepted."""

    def __init__(self) -> None:
        self.measured: list[float] = []
        write = PostgresSink.write

        async def measure(sink: PostgresSink[Any], batch: Batch[Any], **options: Any) -> Any:
            outcome = await write(sink, batch, **options)
            if isinstance(outcome, Written):
                now = time.time() * 1000
                self.measured += [now - item.record.position_ms for item in batch.items]
            return outcome

        PostgresSink.write = measure  # type: ignore[method-assign, assignment]

    def describe(self) -> str:
        found, self.measured = sorted(self.measured), []
        median, p99, most = (found[min(len(found) - 1, int(len(found) * part))] for part in (0.5, 0.99, 1.0))
        return f"median {median:.0f} ms, p99 {p99:.0f} ms, maximum {most:.0f} ms, of {len(found):,} events written"


async def send(database_url: str) -> None:
    store = SessionStore(database_url)
    async with SessionManager(store) as manager:
        trackers = [manager.create_event_tracker(f"session {number}") for number in range(SESSIONS)]
        began = time.perf_counter()
        for number in range(RATE * SECONDS):
            assert trackers[number % SESSIONS](f"event {number}")
            ahead = number / RATE - (time.perf_counter() - began)
            if ahead > 0:
                await asyncio.sleep(ahead)
    assert store.stats.accepted == RATE * SECONDS == store.stats.written + store.stats.coalesced


async def view(redis_url: str) -> None:
    """Increment all counters, again and again, until this process is ended."""
    redis = aioredis.from_url(redis_url)
    while True:
        pipeline = redis.pipeline(transaction=False)
        for number in range(KEYS):
            pipeline.incr(f"vod:views:{number}")
        await pipeline.execute()
        await asyncio.sleep(0.5)


async def main() -> None:
    configure_logs("error")
    folder = Path(tempfile.mkdtemp(prefix="viewer-worker-bench-"))
    folder.chmod(0o755)
    valkey, postgres = ValkeyServer(folder / "redis"), PostgresServer(folder / "postgres")
    valkey.start()
    postgres.start()
    started: list[asyncio.subprocess.Process] = []
    try:
        database = Database(parse_database_url(postgres.url))
        await schema.upgrade(database)
        latencies = Latencies()
        await send(postgres.url)
        print(f"{RATE:,} events/s, {SESSIONS} sessions, alone: {latencies.describe()}")
        environment = os.environ | {
            "REDIS_URL": valkey.url,
            "DATABASE_URL": postgres.url,
            "BATCH_INTERVAL_MS": "500",
            "HEALTH_CHECK_PORT": "0",
            "LOG_LEVEL": "error",
        }
        started.append(await asyncio.create_subprocess_exec(sys.executable, "-m", "worker", "run", env=environment))
        started.append(await asyncio.create_subprocess_exec(sys.executable, __file__, valkey.url))
        await send(postgres.url)
        flushed = await count_flushed(database)
        print(f"while {KEYS:,} counters are flushed ({flushed:,} views): {latencies.describe()}")
        await database.close()
    finally:
        for process in started:
            process.terminate()
            await process.wait()
        valkey.kill()
        postgres.kill()
        shutil.rmtree(folder, ignore_errors=True)


async def count_flushed(database: Database) -> int:
    from sqlalchemy import text

    async with database.transaction() as tx:
        return int((await tx.execute(text("SELECT coalesce(sum(views), 0) FROM view_counts"))).scalar_one())


if __name__ == "__main__":
    run_async(view(sys.argv[1]) if len(sys.argv) > 1 else main())
