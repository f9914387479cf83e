"""Replicas and servers fail in many ways: every acknowledged view is in Postgres once.

Three replicas are killed and frozen. Redis and Postgres are killed, the name of Redis moves to the other one of two
servers, and the database is read-only for a while. A fourth replica has the URL of another, empty Redis.

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
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from tests.support.http import get
from tests.support.proxy import Proxy
from tests.support.world import SYNCHRONISE_AT_ONCE, CliWorker
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
    """What producers know: the views sent, and those acknowledged. A view without an answer may have counted or not.

    A view that Redis refused is neither.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.acknowledged: Counter[str] = Counter()

    @property
    def indeterminate(self) -> Counter[str]:
        return self.sent - self.acknowledged


class Chaos:
    """`valkey` is the master and `standby` its replica, until they swap roles. `name` leads to the master."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.rng = rng
        # A generator of their own: how many views are sent depends on time, and the faults depend on the seed alone.
        self.views = random.Random(rng.random())
        # The roles are not options: a server that is killed is the master, and starts again as one.
        self.valkey, self.standby = [
            ValkeyServer(folder / name, options=("--appendfsync", "always", *SYNCHRONISE_AT_ONCE))
            for name in ("redis", "other-redis")
        ]
        self.name = Proxy(self.valkey.url)
        self.postgres = PostgresServer(folder / "postgres")
        self.another = ValkeyServer(folder / "another-redis")
        self.truth = Truth()
        self.replicas: list[CliWorker] = []
        # With the URL of another Redis.
        self.wrong: list[CliWorker] = []
        self.refused = 0
        self.requests: set[int] = set()
        self.refused_requests: set[int] = set()
        self.requests_sent = 0
        self.samples = 0
        self.moves = 0
        self.done = asyncio.Event()

    @property
    def servers(self) -> list[Server]:
        return [self.valkey, self.standby, self.postgres, self.another]

    def start_replica(self, **settings: str) -> CliWorker:
        environment = {
            "REDIS_URL": self.name.url,
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
        return aioredis.from_url(self.name.url, retry=Retry(NoBackoff(), 0), socket_timeout=2)

    async def send(self, client: aioredis.Redis, commands: Iterable[tuple[str, ...]]) -> list[bool | None]:
        """For each command: True if it was acknowledged, False if it was refused, None without an answer."""
        pipeline = client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        number = len(pipeline)
        try:
            answers = await pipeline.execute(raise_on_error=False)
        except (RedisError, OSError):
            await asyncio.sleep(0.05)
            return [None] * number
        done = [not isinstance(answer, ResponseError) for answer in answers]
        if not all(done):  # the name may lead elsewhere by now
            await client.connection_pool.disconnect()
        return list(done)

    async def produce(self) -> None:
        async with self.redis() as client:
            while not self.done.is_set():
                views = self.views.choices(IDS, weights=range(len(IDS), 0, -1), k=20)
                self.truth.sent.update(views)
                done = await self.send(client, [("INCR", PREFIX + vod_id) for vod_id in views])
                for vod_id, acknowledged in zip(views, done, strict=True):
                    if acknowledged:
                        self.truth.acknowledged[vod_id] += 1
                    elif acknowledged is False:
                        self.truth.sent[vod_id] -= 1
                        self.refused += 1
                await asyncio.sleep(0.005)

    async def add_requests(self) -> None:
        """Entries of the stream, numbered."""
        async with self.redis() as client:
            while not self.done.is_set():
                numbers = range(self.requests_sent, self.requests_sent + 20)
                self.requests_sent += len(numbers)
                now = datetime.now(UTC).isoformat()
                documents = [json.dumps({"time": now, "path": "/", "uid": str(number)}) for number in numbers]
                done = await self.send(client, [("XADD", "chunk_requests", "*", "data", text) for text in documents])
                for number, acknowledged in zip(numbers, done, strict=True):
                    if acknowledged:
                        self.requests.add(number)
                    elif acknowledged is False:
                        self.refused_requests.add(number)
                await asyncio.sleep(0.01)

    async def carried(self) -> Counter[int]:
        """How often each request is a row."""
        return Counter(int(row["uid"]) for row in await self.rows("SELECT uid FROM chunk_requests"))

    async def read(self) -> None:
        """Check that GET + database, read in this order, is never too low, and that a total is never too high."""
        async with self.redis() as client:
            while not self.done.is_set():
                at_least = self.truth.acknowledged.copy()
                try:
                    async with client.pipeline(transaction=True) as pipeline:
                        (role, *_), pending = await pipeline.role().mget([PREFIX + vod_id for vod_id in IDS]).execute()
                    if role != b"master":  # it may be behind
                        await client.connection_pool.disconnect()
                        continue
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
        return Counter({row["vod_id"]: row["views"] for row in await self.rows("SELECT * FROM view_counts")})

    async def rows(self, query: str) -> list[asyncpg.Record]:
        with database_errors():
            sql = await asyncpg.connect(self.postgres.url, timeout=2)
            try:
                return list(await sql.fetch(query))
            finally:
                sql.terminate()

    async def inject_faults(self) -> None:
        """Every two seconds, kill or freeze a replica, and let a server fail.

        First, leave the lease to `wrong`. Last, the faults that leave connections behind: to a server that refuses
        writes, or read-only ones. No restart closes them for the replicas.
        """
        for replica in self.replicas:
            replica.close()
        self.replicas.clear()
        await self.wrong[0].wait_for_log('"view_counts on hold"')
        self.replicas = [self.start_replica() for _ in range(3)]
        loop = asyncio.get_running_loop()
        kinds = [self.kill_redis, self.kill_postgres, self.move_name, self.refuse_writes]
        faults: list[Callable[[], Awaitable[None]]] = []
        now = loop.time()
        end = now + SECONDS - 4
        while now < end:
            victim = self.rng.randrange(len(self.replicas))
            if self.rng.random() < 0.5:
                self.replicas[victim].close()
                self.replicas[victim] = self.start_replica()
            else:
                frozen = self.replicas[victim].process
                frozen.send_signal(signal.SIGSTOP)
                loop.call_later(self.rng.uniform(1, 4), _wake, frozen)
            faults = faults or self.rng.sample(kinds, len(kinds))
            await faults.pop()()
            await asyncio.sleep(now + 2 - loop.time())
            now = loop.time()
        for fault in self.rng.sample([self.move_name, self.refuse_writes], 2):
            await fault()

    async def kill_redis(self) -> None:
        await self._kill(self.valkey)

    async def kill_postgres(self) -> None:
        await self._kill(self.postgres)

    async def _kill(self, server: Server) -> None:
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(self.rng.uniform(0, 0.5))
        await asyncio.to_thread(server.start)

    async def follow(self) -> None:
        """Make the standby a replica of the master."""
        async with aioredis.from_url(self.standby.url) as standby:
            await standby.replicaof("127.0.0.1", str(self.valkey.port))

    async def move_name(self) -> None:
        """Master and replica swap roles without loss, and new connections lead to the new master. Open ones stay."""
        async with (
            aioredis.from_url(self.valkey.url) as old,
            aioredis.from_url(self.standby.url) as new,
            asyncio.timeout(30),
        ):
            while not _can_lead(await new.info("replication") | await new.info("persistence")):
                await asyncio.sleep(0.02)
            # FAILOVER pauses writes until the replica has all of them.
            await old.execute_command("FAILOVER", "TO", "127.0.0.1", str(self.standby.port))
            while (await new.info("replication"))["role"] != "master":
                await asyncio.sleep(0.02)
            assert (await old.info("replication"))["role"] == "slave"
        await asyncio.sleep(self.rng.uniform(0, 0.5))
        self.valkey, self.standby = self.standby, self.valkey
        self.name.move_to(self.valkey.url)
        self.moves += 1

    async def refuse_writes(self) -> None:
        """Make the database read-only for new sessions, and after a while for all, then writable for new sessions.

        Each time, open sessions stay as they are. For all means that those that can write are ended.
        """
        sql = await asyncpg.connect(self.postgres.url)
        await sql.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
        await asyncio.sleep(self.rng.uniform(0, 0.5))
        await sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await asyncio.sleep(self.rng.uniform(0.5, 1.5))
        await sql.execute("ALTER DATABASE postgres RESET default_transaction_read_only")
        await sql.close()


def _can_lead(replica: dict[str, Any]) -> bool:
    """True when a replica follows its master and keeps its own append-only file: it may be killed after the swap."""
    return (
        replica["master_link_status"] == "up"
        and not replica["aof_rewrite_in_progress"]
        and not replica["aof_rewrite_scheduled"]
    )


def _wake(process: Any) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)


@pytest.mark.timeout(SECONDS + 150)
async def test_three_replicas_are_exact_after_faults(servers_folder: Path) -> None:
    print(f"FAULT_SEED={SEED} FAULT_SECONDS={SECONDS}")
    folder = servers_folder / f"chaos-{uuid4().hex[:8]}"
    folder.mkdir()
    folder.chmod(0o755)
    chaos = Chaos(folder, random.Random(SEED))
    try:
        for server in chaos.servers:
            server.start()
        await chaos.follow()
        async with chaos.name:
            await _count_through_faults(chaos)
    except BaseException:
        for replica in chaos.replicas + chaos.wrong:
            print(replica.log[-3000:])
        raise
    finally:
        for replica in chaos.replicas + chaos.wrong:
            replica.close()
        for server in chaos.servers:
            server.kill()
        shutil.rmtree(folder, ignore_errors=True)


async def _count_through_faults(chaos: Chaos) -> None:
    database = Database(parse_database_url(chaos.postgres.url))
    await schema.upgrade(database)
    await database.close()
    chaos.replicas = [chaos.start_replica() for _ in range(3)]
    # The source has its Redis before a worker with another one starts. The marker is not enough: a source that never
    # agreed with a Redis takes any.
    async with asyncio.timeout(60):
        while not await chaos.rows("SELECT FROM view_count_sources WHERE agreed_at IS NOT NULL"):
            await asyncio.sleep(0.1)
    chaos.wrong.append(chaos.start_replica(REDIS_URL=chaos.another.url, PIPELINES="view_counts"))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(chaos.produce())
        tasks.create_task(chaos.add_requests())
        tasks.create_task(chaos.read())
        try:
            await chaos.inject_faults()
        finally:
            chaos.done.set()
    await _wait_until_drained(chaos)
    rows = await _wait_until_carried(chaos)
    await _wait_until_healthy(chaos)
    assert set(rows.values()) == {1}, "a request is two rows"
    assert not rows.keys() & chaos.refused_requests
    print(f"{len(chaos.requests)} requests acknowledged of {chaos.requests_sent}, {len(rows)} rows")
    totals, truth = await chaos.totals(), chaos.truth
    assert truth.acknowledged <= totals
    async with aioredis.from_url(chaos.another.url) as client:
        assert not await client.exists(MARKER), "the wrong Redis was flushed"
    assert totals <= truth.sent
    print(f"{truth.acknowledged.total()} acknowledged, {truth.indeterminate.total()} indeterminate, ", end="")
    print(f"{chaos.refused} refused, {totals.total()} in Postgres, ", end="")
    print(f"{chaos.samples} samples, {chaos.moves} moves")
    assert chaos.samples > 10
    assert truth.acknowledged.total() > 500


async def _wait_until_carried(chaos: Chaos) -> Counter[int]:
    """Every acknowledged request is a row."""
    async with asyncio.timeout(60):
        while not chaos.requests <= (rows := await chaos.carried()).keys():
            await asyncio.sleep(0.2)
    return rows


async def _wait_until_healthy(chaos: Chaos) -> None:
    """Every check of each replica with the right URL is ok: nothing fails, and nothing is on hold."""
    async with asyncio.timeout(60):
        for replica in chaos.replicas:
            url = json.loads(await replica.wait_for_log('"started"'))["url"]
            while (await get(f"{url}/health"))[1]["status"] != "healthy":
                await asyncio.sleep(0.1)


async def _wait_until_drained(chaos: Chaos) -> None:
    """Wait until nothing is pending, and check that it stays so."""
    async with chaos.redis() as client:
        async with asyncio.timeout(60):
            while await client.exists(*(PREFIX + vod_id for vod_id in IDS)):
                await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        assert not await client.exists(*(PREFIX + vod_id for vod_id in IDS))
