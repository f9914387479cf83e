"""Postgres is away while entries keep coming: none is lost, memory stays bounded, and the worker catches up.

`make faults` stops Postgres for a minute (FAULT_SECONDS); CI and `make test` for a few seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio as aioredis

from tests.support.world import CliWorker
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.dev.servers import PostgresServer, ValkeyServer

SECONDS = min(60.0, float(os.environ.get("FAULT_SECONDS", "5")))
RATE = 2000
# Far less than what comes in the meantime would take.
MORE_MEMORY_MB = 60


@pytest.mark.timeout(SECONDS + 120)
async def test_postgres_is_stopped_while_entries_come(servers_folder: Path) -> None:
    folder = servers_folder / f"outage-{uuid4().hex[:8]}"
    folder.mkdir()
    folder.chmod(0o755)
    valkey, postgres = ValkeyServer(folder / "redis"), PostgresServer(folder / "postgres")
    valkey.start()
    postgres.start()
    worker = None
    try:
        database = Database(parse_database_url(postgres.url))
        await schema.upgrade(database)
        await database.close()
        worker = start_worker(valkey.url, postgres.url)
        await worker.wait_for_log('"lease taken"')
        sent, stop = [0], asyncio.Event()
        producing = asyncio.create_task(produce(valkey.url, sent, stop))
        await carried(postgres.url, at_least=RATE)
        before = resident_mb(worker)
        await asyncio.to_thread(postgres.stop)
        await asyncio.sleep(SECONDS)
        assert resident_mb(worker) - before < MORE_MEMORY_MB
        await asyncio.to_thread(postgres.start)
        await asyncio.sleep(1)
        stop.set()
        await producing
        rows, different, letters = await carried(postgres.url, at_least=sent[0], timeout=60)
        assert (rows, different, letters) == (sent[0], sent[0], 0)
        assert resident_mb(worker) - before < MORE_MEMORY_MB
        print(f"{rows} entries, {SECONDS:.0f} s without Postgres, {resident_mb(worker):.0f} MB")
        worker.terminate()
        assert await worker.wait() == 0
    finally:
        if worker is not None:
            worker.close()
        valkey.kill()
        postgres.kill()
        shutil.rmtree(folder, ignore_errors=True)


def start_worker(redis_url: str, database_url: str) -> CliWorker:
    environment = {
        "REDIS_URL": redis_url,
        "DATABASE_URL": database_url,
        "PIPELINES": "chunk_requests",
        "HEALTH_CHECK_HOST": "127.0.0.1",
        "HEALTH_CHECK_PORT": "0",
    }
    return CliWorker(environment, "run")


async def produce(url: str, sent: list[int], stop: asyncio.Event) -> None:
    async with aioredis.from_url(url) as client:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not stop.is_set():
            due = int((loop.time() - began) * RATE) - sent[0]
            pipeline = client.pipeline(transaction=False)
            for number in range(sent[0], sent[0] + due):
                document = {"time": datetime.now(UTC).isoformat(), "path": "/", "uid": str(number)}
                pipeline.xadd("chunk_requests", {"data": json.dumps(document)})
            await pipeline.execute()
            sent[0] += due
            await asyncio.sleep(0.05)


async def carried(url: str, at_least: int, timeout: float = 30) -> tuple[int, int, int]:
    """Rows, different requests, dead letters, as soon as there are enough rows."""
    sql = await asyncpg.connect(url)
    async with asyncio.timeout(timeout):
        while await sql.fetchval("SELECT count(*) FROM chunk_requests") < at_least:
            await asyncio.sleep(0.2)
    found = await sql.fetchrow(
        "SELECT count(*), count(DISTINCT uid), (SELECT count(*) FROM dead_letters) FROM chunk_requests"
    )
    await sql.close()
    return tuple(found)


def resident_mb(worker: CliWorker) -> float:
    pages = int(Path(f"/proc/{worker.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
