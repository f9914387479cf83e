"""Chunk requests in a world: adds entries, runs workers on them, and knows what must be in the table."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from tests.support.world import CliWorker, World
from worker.app.pipelines import Pipelines, build_pipelines, name_checks
from worker.db.session import Database
from worker.observability.metrics import Metrics
from worker.observability.status import SERVERS, State, Status
from worker.redis.client import RedisClient
from worker.runtime.clock import SystemClock
from worker.settings.environment import load_settings

CHECK = "chunk_requests"
SETTINGS = {"PIPELINES": "view_counts,chunk_requests", "CHUNKLOG_BATCH_TIMEOUT": "50ms"}


def make_document(number: int, **fields: Any) -> str:
    return json.dumps({"time": "2026-11-27T10:00:00Z", "path": f"/{number}", "ip": "203.0.113.7", **fields})


class InProcessCarrier:
    """The loops of the pipelines, in this process."""

    def __init__(self, environment: dict[str, str]) -> None:
        settings = load_settings(environ=environment)
        self.database = Database(settings.database)
        self.redis = RedisClient(settings.redis)
        self.metrics = Metrics()
        self.status = Status(SystemClock().monotonic, (*SERVERS, *name_checks(settings)))
        self.pipelines: Pipelines = build_pipelines(settings, self.database, self.redis, self.status, self.metrics)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        for server in SERVERS:
            self.status.ok(server)
        stop = asyncio.Event()
        tasks = [asyncio.create_task(loop.run(stop), name=name) for name, loop in self.pipelines.loops().items()]
        try:
            yield
        finally:
            stop.set()
            done, late = await asyncio.wait(tasks, timeout=10)
            await self.database.close()
            await self.redis.close()
        assert not late
        for task in done:
            task.result()

    async def reaches(self, state: State, timeout: float = 15.0) -> str:
        """Wait for a state of the check; its cause."""
        async with asyncio.timeout(timeout):
            while self.status.checks[CHECK].state is not state:
                await asyncio.sleep(0.02)
        return self.status.checks[CHECK].cause

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"pipeline": CHECK, **labels}) or 0.0


class Records:
    """`paths` are those that must be in the table, once each."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.paths: list[str] = []
        self.added = 0
        self.workers: list[CliWorker] = []

    async def add(self, count: int = 1, **fields: Any) -> None:
        pipeline = self.world.redis.pipeline(transaction=False)
        for _ in range(count):
            pipeline.xadd(self.world.stream, {"data": make_document(self.added, **fields)})
            self.paths.append(f"/{self.added}")
            self.added += 1
        await pipeline.execute()

    async def add_bad(self, document: str | bytes) -> None:
        """An entry that must become a dead letter."""
        await self.world.redis.xadd(self.world.stream, {"data": document})

    def carrier(self, **settings: str) -> InProcessCarrier:
        return InProcessCarrier(self.world.environment | SETTINGS | settings)

    def start(
        self, *arguments: str, script: Path | None = None, program: list[str] | None = None, **settings: str
    ) -> CliWorker:
        environment = self.world.environment | SETTINGS | settings
        worker = CliWorker(environment, *(arguments or ("run",)), script=script, program=program)
        self.workers.append(worker)
        return worker

    async def wait(self, condition: Callable[[], Any], timeout: float = 30.0) -> None:
        async with asyncio.timeout(timeout):
            while not await condition():
                await asyncio.sleep(0.05)

    async def rows(self) -> int:
        return int(await self.world.sql.fetchval("SELECT count(*) FROM chunk_requests"))

    async def letters(self) -> list[Any]:
        return list(await self.world.sql.fetch("SELECT * FROM dead_letters ORDER BY id"))

    async def carried(self, letters: int = 0, timeout: float = 30.0) -> None:
        """Wait until every good entry is a row and every bad one a letter; then each must be there exactly once."""

        async def all_there() -> bool:
            return await self.rows() >= len(self.paths) and len(await self.letters()) >= letters

        await self.wait(all_there, timeout)
        await self.assert_exact(letters)

    async def assert_exact(self, letters: int = 0) -> None:
        rows = await self.world.sql.fetch("SELECT path FROM chunk_requests")
        assert sorted(row["path"] for row in rows) == sorted(self.paths)
        assert len(await self.letters()) == letters

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
