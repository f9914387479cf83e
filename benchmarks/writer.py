"""Measures the in-process Writer, compared with what one writes first. Run by `make bench`.

`send` is compared with `put_nowait` of an asyncio queue, which does not bound bytes, and does not encode.

Rows: the same 60,000 events, 500 a batch, two connections, to tables of the same shape, in turn, for several rounds.
Compare the ratios within a round: absolute speeds vary with the load of the machine.

* queue + executemany: an asyncio queue, and two tasks that insert a batch with `executemany` in a transaction.
* bare statement: our own statement on batches of rows, without validation, ticket and letters. The ceiling.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
from chunk_requests import AGENT, BARE, INSERT, bare_parameters

from worker import ChunkEvent, Writer
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.dev.servers import PostgresServer
from worker.runtime.event_loop import run_async

EVENTS = int(os.environ.get("BENCH_EVENTS", "60000"))
BATCH = 500
CONNECTIONS = 2
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))


def make_events() -> list[ChunkEvent]:
    rng, now = random.Random(1), datetime.now(UTC)
    return [
        ChunkEvent(
            time=now,
            path=f"/vod/{rng.randrange(1000):04}/1080p/{number % 5000:05}.m4s",
            ip=f"203.0.113.{rng.randrange(256)}",
            referer=f"https://example.org/watch/{rng.randrange(1000)}",
            user_agent=AGENT,
            sid=f"{rng.getrandbits(64):016x}",
            uid=f"user_{rng.randrange(10_000)}",
        )
        for number in range(EVENTS)
    ]


class Bench:
    def __init__(self, database_url: str) -> None:
        self.database_url = database_url
        self.events = make_events()

    async def open(self) -> None:
        database = Database(parse_database_url(self.database_url))
        await schema.upgrade(database)
        await database.close()
        self.pool = await asyncpg.create_pool(self.database_url, min_size=CONNECTIONS, max_size=CONNECTIONS)
        await self.pool.execute("CREATE TABLE naive (LIKE chunk_requests INCLUDING INDEXES)")

    async def empty(self) -> None:
        await self.pool.execute("TRUNCATE naive, chunk_requests, ingest_batches, dead_letters")
        await self.pool.execute("CHECKPOINT")

    async def ours(self) -> None:
        writer = Writer.chunk_requests(
            self.database_url, capacity=EVENTS, batch_size=BATCH, writers=CONNECTIONS, enabled=True
        )
        async with writer:
            for number, event in enumerate(self.events):
                assert writer.send(event)
                if number % 100 == 0:
                    await asyncio.sleep(0)
            assert await writer.flush(timeout=300)

    async def naive(self) -> None:
        queue: asyncio.Queue[ChunkEvent | None] = asyncio.Queue(EVENTS + CONNECTIONS)

        async def insert() -> None:
            ended = False
            while not ended:
                batch: list[tuple[Any, ...]] = []
                while len(batch) < BATCH and not ended:
                    event = await queue.get()
                    if event is None:
                        ended = True
                    else:
                        batch.append(msgspec.structs.astuple(event))
                async with self.pool.acquire() as sql, sql.transaction():
                    await sql.executemany(INSERT, batch)

        tasks = [asyncio.create_task(insert()) for _ in range(CONNECTIONS)]
        for number, event in enumerate(self.events):
            queue.put_nowait(event)
            if number % 100 == 0:
                await asyncio.sleep(0)
        for _ in tasks:
            queue.put_nowait(None)
        await asyncio.gather(*tasks)

    async def bare(self) -> None:
        batches = [self.events[first : first + BATCH] for first in range(0, EVENTS, BATCH)]

        async def insert() -> None:
            while batches:
                rows = [msgspec.structs.astuple(event) for event in batches.pop()]
                async with self.pool.acquire() as sql, sql.transaction():
                    await sql.execute(BARE, *bare_parameters(rows))

        await asyncio.gather(*(insert() for _ in range(CONNECTIONS)))


async def compare_rows(bench: Bench) -> None:
    contenders: dict[str, Callable[[], Awaitable[None]]] = {
        "Writer": bench.ours,
        "bare statement (the ceiling)": bench.bare,
        "queue + executemany": bench.naive,
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            await bench.empty()
            began = time.perf_counter()
            await contender()
            rates[name].append(EVENTS / (time.perf_counter() - began))
            table = "chunk_requests" if name == "Writer" else "naive"
            assert await bench.pool.fetchval(f"SELECT count(*) FROM {table}") == EVENTS, name
    print(f"{EVENTS:,} events, {BATCH} a batch, median of {ROUNDS} rounds; ratio: Writer / contender")
    for name, measured in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["Writer"], measured, strict=True))
        print(f"  {name:<30} {statistics.median(measured):>9,.0f} rows/s   {ratio:5.2f}")


def compare_send(events: list[ChunkEvent]) -> None:
    """Into a buffer and a queue that nobody reads."""
    rounds: list[tuple[float, float]] = []
    for _ in range(max(ROUNDS, 5)):
        writer = Writer.chunk_requests("postgresql://nobody@localhost/none", capacity=EVENTS, enabled=True)
        began = time.perf_counter()
        for event in events:
            writer.send(event)
        ours = (time.perf_counter() - began) / EVENTS
        assert writer.stats.accepted == EVENTS
        writer._buffer.clear()
        queue: asyncio.Queue[ChunkEvent] = asyncio.Queue(EVENTS)
        began = time.perf_counter()
        for event in events:
            queue.put_nowait(event)
        rounds.append((ours, (time.perf_counter() - began) / EVENTS))
    ours, naive = (statistics.median(column) * 1e6 for column in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    print(f"send: {ours:.2f} µs a call; put_nowait: {naive:.2f} µs; send / put_nowait: {ratio:.2f}")


async def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="viewer-worker-bench-"))
    folder.chmod(0o755)
    postgres = PostgresServer(folder / "postgres")
    postgres.start()
    bench = Bench(postgres.url)
    try:
        compare_send(bench.events)
        await bench.open()
        await compare_rows(bench)
        await bench.pool.close()
    finally:
        postgres.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run_async(main())
