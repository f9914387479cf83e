"""Records from a Redis stream to their table, each exactly once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.world import CliWorker, World


def document(number: int, **fields: Any) -> str:
    return json.dumps({"time": "2026-11-27T10:00:00Z", "path": f"/{number}", "ip": "203.0.113.7", **fields})


class Carrier:
    """The world with chunk requests: adds entries, starts workers, and knows what must be in the table."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.paths: list[str] = []
        self.workers: list[CliWorker] = []

    async def add(self, count: int) -> None:
        pipeline = self.world.redis.pipeline(transaction=False)
        for _ in range(count):
            number = len(self.paths)
            pipeline.xadd(self.world.stream, {"data": document(number)})
            self.paths.append(f"/{number}")
        await pipeline.execute()

    def start(self, **settings: str) -> CliWorker:
        environment = {"PIPELINES": "chunk_requests", "CHUNKLOG_BATCH_TIMEOUT": "50ms"}
        worker = CliWorker(self.world.environment | environment | settings, "run")
        self.workers.append(worker)
        return worker

    async def carried(self, timeout: float = 30.0) -> None:
        """Wait until every entry is a row, exactly once."""
        async with asyncio.timeout(timeout):
            while await self.world.sql.fetchval("SELECT count(*) FROM chunk_requests") < len(self.paths):
                for worker in self.workers:
                    if worker.process.poll() not in (None, -9):
                        raise AssertionError(worker.log)
                await asyncio.sleep(0.05)
        await self.assert_exact()

    async def assert_exact(self) -> None:
        rows = await self.world.sql.fetch("SELECT path FROM chunk_requests")
        assert sorted(row["path"] for row in rows) == sorted(self.paths)
        assert await self.world.sql.fetchval("SELECT count(*) FROM dead_letters") == 0


@pytest.fixture
async def carrier(world: World) -> AsyncIterator[Carrier]:
    made = Carrier(world)
    yield made
    for worker in made.workers:
        worker.close()


async def test_entries_become_rows_and_survive_a_kill(carrier: Carrier) -> None:
    await carrier.add(10)
    worker = carrier.start()
    await carrier.carried()
    await carrier.add(3000)
    await asyncio.sleep(0.05)
    worker.kill()
    await carrier.add(10)
    carrier.start()
    await carrier.carried()
