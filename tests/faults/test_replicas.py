"""Three replicas and two servers are killed and frozen: every acknowledged view is in Postgres once.

A fourth replica has the URL of another, empty Redis.

`make faults` runs it for a minute; CI and `make test` run it for a shorter time. FAULT_SECONDS and FAULT_SEED set the
duration and the seed. The seed is printed, so that a failure can be reproduced.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tests.support.world import CliWorker
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.errors import database_errors
from worker.db.session import Database
from worker.dev.servers import PostgresServer, Server, ValkeyServer
from worker.errors import DatabaseUnavailable

SECONDS = float(os.environ.get("FAULT_SECONDS", "16"))
SEED = int(os.environ.get("FAULT_SEED", random.randrange(2**32)))
IDS = [f"vod_{number}" for number in range(200)]
PREFIX = "vod:views:"
MARKER = "viewer-worker:settled:" + PREFIX


class Truth:
    """What producers know: the views sent, and those acknowledged. A view without an answer may have counted or not."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.acknowledged: Counter[str] = Counter()

    @property
    def indeterminate(self) -> Counter[str]:
        return self.sent - self.acknowledged


class Chaos:
    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.rng = rng
        self.valkey = ValkeyServer(folder / "redis", options=("--appendfsync", "always"))
        self.postgres = PostgresServer(folder / "postgres")
        self.another = ValkeyServer(folder / "another-redis")
        self.truth = Truth()
        self.replicas: list[CliWorker] = []
        # With the URL of another Redis.
        self.wrong: list[CliWorker] = []
        self.requests: set[int] = set()
        self.requests_sent = 0
        self.samples = 0
        self.done = asyncio.Event()

    def start_replica(self, redis: ValkeyServer | None = None, **settings: str) -> CliWorker:
        environment = {
            "REDIS_URL": (redis or self.valkey).url,
            "DATABASE_URL": self.postgres.url,
            "BATCH_INTERVAL_MS": "50",
            "BATCH_SIZE": "20",
            "PIPELINES": "view_counts,chunk_requests",
            "CHUNKLOG_BATCH_SIZE": "50",
            "CHUNKLOG_BATCH_TIMEOUT": "20ms",
            "HEALTH_CHECK_HOST": "127.0.0.1",
            "HEALTH_CHECK_PORT": "0",
            **settings,
        }
        return CliWorker(environment, "run")

    def redis(self) -> aioredis.Redis:
        return aioredis.from_url(self.valkey.url, retry=Retry(NoBackoff(), 0), socket_timeout=2)

    async def produce(self) -> None:
        async with self.redis() as client:
            while not self.done.is_set():
                views = self.rng.choices(IDS, weights=range(len(IDS), 0, -1), k=20)
                pipeline = client.pipeline(transaction=False)
                for vod_id in views:
                    pipeline.incr(PREFIX + vod_id)
                self.truth.sent.update(views)
                try:
                    await pipeline.execute()
                except (RedisError, OSError):
                    await asyncio.sleep(0.05)
                else:
                    self.truth.acknowledged.update(views)
                await asyncio.sleep(0.005)

    async def add_requests(self) -> None:
        """Entries of the stream, numbered."""
        async with self.redis() as client:
            while not self.done.is_set():
                numbers = range(self.requests_sent, self.requests_sent + 20)
                self.requests_sent += len(numbers)
                pipeline = client.pipeline(transaction=False)
                for number in numbers:
                    document = {"time": datetime.now(UTC).isoformat(), "path": "/", "uid": str(number)}
                    pipeline.xadd("chunk_requests", {"data": json.dumps(document)})
                try:
                    await pipeline.execute()
                except (RedisError, OSError):
                    await asyncio.sleep(0.05)
                else:
                    self.requests.update(numbers)
                await asyncio.sleep(0.01)

    async def carried(self) -> Counter[int]:
        """How often each request is a row."""
        with database_errors():
            sql = await asyncpg.connect(self.postgres.url, timeout=2)
            try:
                return Counter(int(row["uid"]) for row in await sql.fetch("SELECT uid FROM chunk_requests"))
            finally:
                sql.terminate()

    async def read(self) -> None:
        """Check that GET + database, read in this order, is never too low, and that a total is never too high."""
        async with self.redis() as client:
            while not self.done.is_set():
                at_least = self.truth.acknowledged.copy()
                try:
                    pending = await client.mget([PREFIX + vod_id for vod_id in IDS])
                    totals = await self.totals()
                except (RedisError, OSError, DatabaseUnavailable):
                    await asyncio.sleep(0.05)
                    continue
                for vod_id, value in zip(IDS, pending, strict=True):
                    assert int(value or 0) + totals[vod_id] >= at_least[vod_id], f"{vod_id}: a dip"
                assert totals <= self.truth.sent
                self.samples += 1
                await asyncio.sleep(0.05)

    async def totals(self) -> Counter[str]:
        with database_errors():
            sql = await asyncpg.connect(self.postgres.url, timeout=2)
            try:
                return Counter({row["vod_id"]: row["views"] for row in await sql.fetch("SELECT * FROM view_counts")})
            finally:
                sql.terminate()

    async def inject_faults(self) -> None:
        """Kill or freeze a replica every two seconds, and kill each server twice. First, leave the lease to `wrong`."""
        for replica in self.replicas:
            replica.close()
        await self.wrong[0].wait_for_log('"view_counts on hold"')
        self.replicas = [self.start_replica() for _ in self.replicas]
        loop = asyncio.get_running_loop()
        began = loop.time()
        servers: list[tuple[float, Server]] = [
            (SECONDS * share, server)
            for share, server in ((0.2, self.valkey), (0.4, self.postgres), (0.6, self.valkey), (0.8, self.postgres))
        ]
        while loop.time() - began < SECONDS:
            victim = self.rng.randrange(len(self.replicas))
            if self.rng.random() < 0.5:
                self.replicas[victim].close()
                self.replicas[victim] = self.start_replica()
            else:
                frozen = self.replicas[victim].process
                frozen.send_signal(signal.SIGSTOP)
                loop.call_later(self.rng.uniform(1, 4), _wake, frozen)
            while servers and loop.time() - began >= servers[0][0]:
                server = servers.pop(0)[1]
                await asyncio.to_thread(server.kill)
                await asyncio.sleep(self.rng.uniform(0, 0.5))
                await asyncio.to_thread(server.start)
            await asyncio.sleep(2)


def _wake(process: Any) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)


@pytest.mark.timeout(SECONDS + 150)
async def test_three_replicas_are_exact_after_kills_and_freezes(servers_folder: Path) -> None:
    print(f"FAULT_SEED={SEED} FAULT_SECONDS={SECONDS}")
    folder = servers_folder / f"chaos-{uuid4().hex[:8]}"
    folder.mkdir()
    folder.chmod(0o755)
    chaos = Chaos(folder, random.Random(SEED))
    servers: list[Server] = [chaos.valkey, chaos.postgres, chaos.another]
    for server in servers:
        server.start()
    try:
        database = Database(parse_database_url(chaos.postgres.url))
        await schema.upgrade(database)
        await database.close()
        chaos.replicas = [chaos.start_replica() for _ in range(3)]
        # The source has its Redis before a worker with another one starts.
        async with chaos.redis() as client, asyncio.timeout(60):
            while not await client.exists(MARKER):
                await asyncio.sleep(0.1)
        chaos.wrong.append(chaos.start_replica(chaos.another, PIPELINES="view_counts"))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(chaos.produce())
            tasks.create_task(chaos.add_requests())
            tasks.create_task(chaos.read())
            await chaos.inject_faults()
            chaos.done.set()
        await _wait_until_drained(chaos)
        rows = await _wait_until_carried(chaos)
        assert set(rows.values()) == {1}, "a request is two rows"
        print(f"{len(chaos.requests)} requests acknowledged of {chaos.requests_sent}, {len(rows)} rows")
        totals, truth = await chaos.totals(), chaos.truth
        assert truth.acknowledged <= totals
        async with aioredis.from_url(chaos.another.url) as client:
            assert not await client.exists(MARKER), "the wrong Redis was flushed"
        assert totals <= truth.sent
        print(f"{truth.acknowledged.total()} acknowledged, {truth.indeterminate.total()} indeterminate, ", end="")
        print(f"{totals.total()} in Postgres, {chaos.samples} samples")
        assert chaos.samples > 10
        assert truth.acknowledged.total() > 500
    except BaseException:
        for replica in chaos.replicas + chaos.wrong:
            print(replica.log[-3000:])
        raise
    finally:
        chaos.done.set()
        for replica in chaos.replicas + chaos.wrong:
            replica.close()
        for server in servers:
            server.kill()
        shutil.rmtree(folder, ignore_errors=True)


async def _wait_until_carried(chaos: Chaos) -> Counter[int]:
    """Every acknowledged request is a row."""
    async with asyncio.timeout(60):
        while not chaos.requests <= (rows := await chaos.carried()).keys():
            await asyncio.sleep(0.2)
    return rows


async def _wait_until_drained(chaos: Chaos) -> None:
    """Wait until nothing is pending, and check that it stays so."""
    async with chaos.redis() as client:
        async with asyncio.timeout(60):
            while await client.exists(*(PREFIX + vod_id for vod_id in IDS)):
                await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        assert not await client.exists(*(PREFIX + vod_id for vod_id in IDS))
