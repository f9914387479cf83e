"""An application beside the worker: it INCRs, then PUBLISHes, and shows GET + its own column."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp
import asyncpg

from tests.support.guarded import on_guarded_servers, on_open_and_guarded_servers
from tests.support.world import CliWorker, World

Start = Callable[..., CliWorker]
TARGET = {"VIEW_TARGET_TABLE": "Vod", "VIEW_TARGET_KEY": "id", "VIEW_TARGET_COLUMN": "viewCount"}
VODS = [f"cm{number:04}" for number in range(40)]
UNKNOWN = ["deleted", "not_yet"]
KILLS = 4


class Application:
    """Its table has a mixed-case name and an int4 column, and nothing made for the worker."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.seen: Counter[str] = Counter()
        self.samples = 0
        self.done = asyncio.Event()

    async def create_table(self) -> None:
        await self.world.sql.execute(
            'CREATE TABLE "Vod" (id text PRIMARY KEY, title text, "viewCount" integer NOT NULL DEFAULT 0)'
        )
        # As docs/how-to/use-your-own-table.md says, where the worker has a role of its own.
        if await self.world.sql.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = 'viewer_worker'"):
            await self.world.sql.execute(
                'GRANT SELECT (id, "viewCount"), UPDATE ("viewCount") ON "Vod" TO viewer_worker'
            )
        await self.world.sql.executemany('INSERT INTO "Vod" (id) VALUES ($1)', [(vod_id,) for vod_id in VODS])

    async def viewers(self, rng: random.Random) -> None:
        while not self.done.is_set():
            vod_id = rng.choice(VODS + UNKNOWN)
            await self.world.redis.incr(self.world.prefix + vod_id)
            self.seen[vod_id] += 1
            await self.world.publish(json.dumps({"vodId": vod_id, "count": 1}))
            await asyncio.sleep(0.001)

    async def page(self) -> None:
        """Read Redis, then the column: the sum is never below the views recorded before."""
        sql = await asyncpg.connect(self.world.database_url)
        while not self.done.is_set():
            at_least = self.seen.copy()
            pending = await self.world.redis.mget([self.world.prefix + vod_id for vod_id in VODS])
            stored = {row["id"]: row["viewCount"] for row in await sql.fetch('SELECT id, "viewCount" FROM "Vod"')}
            for vod_id, value in zip(VODS, pending, strict=True):
                assert int(value or 0) + stored[vod_id] >= at_least[vod_id], f"{vod_id} dips"
            self.samples += 1
            await asyncio.sleep(0.01)
        await sql.close()


@on_guarded_servers
async def test_column_is_exact_and_the_page_never_too_low_while_the_worker_is_killed(
    world: World, start: Start
) -> None:
    application, rng = Application(world), random.Random(1)
    await application.create_table()
    settings = world.environment | TARGET | {"BATCH_INTERVAL_MS": "50", "BATCH_SIZE": "7"}
    others = [asyncio.create_task(application.viewers(rng)), asyncio.create_task(application.page())]
    for _ in range(KILLS):
        worker = start(settings, "run")
        await worker.wait_for_log("batch flushed")
        await asyncio.sleep(rng.uniform(0.1, 0.6))
        worker.kill()
        await world.expire_lease()
    last = start(settings, "run")
    await last.wait_for_log("batch flushed")
    application.done.set()
    await asyncio.gather(*others)
    last.terminate()
    assert await last.wait() == 0
    world.truth = application.seen
    await world.assert_exact()
    column = {row["id"]: row["viewCount"] for row in await world.sql.fetch('SELECT id, "viewCount" FROM "Vod"')}
    assert column == {vod_id: application.seen[vod_id] for vod_id in VODS}
    assert application.samples > 20
    assert application.seen.total() > 500
    assert all(application.seen[vod_id] for vod_id in UNKNOWN)


@on_open_and_guarded_servers
async def test_views_count_once_by_incr_publish_or_both_and_are_answered_over_http(world: World, start: Start) -> None:
    worker = start(world.environment, "run")
    await worker.wait_for_log('"listening"')
    url = json.loads(await worker.wait_for_log('"started"'))["url"]
    for _ in range(5):
        await world.redis.incr(world.prefix + "both")
        await world.announce("both")
        await world.redis.incr(world.prefix + "incr")
        await world.announce("publish")
    async with aiohttp.ClientSession(url) as session, asyncio.timeout(20):
        answer = {}
        while answer != {"both": 5, "incr": 5, "publish": 5}:
            async with session.get("/v1/views?ids=both,incr,publish") as response:
                answer = {entry["vodId"]: entry["views"] for entry in (await response.json())["views"]}
            assert max(answer.values()) <= 5
        top: list[Any] = []
        while len(top) < 2:  # the history follows the flushes
            async with session.get("/v1/top?window=1h&limit=2") as response:
                top = (await response.json())["top"]
        async with session.get("/metrics") as response:
            metrics = await response.text()
    assert "view_count_updates_total 10.0" in metrics
    assert "view_count_subscription_gaps_total 0.0" in metrics


@on_open_and_guarded_servers
async def test_views_that_were_only_published_before_a_clean_stop_are_kept(world: World, start: Start) -> None:
    worker = start(world.environment | {"BATCH_INTERVAL_MS": "3600000"}, "run")
    await worker.wait_for_log('"listening"')
    for _ in range(300):
        await world.announce("a")
    worker.terminate()
    assert await worker.wait() == 0, worker.log
    assert await world.totals() == Counter(a=300)


@on_open_and_guarded_servers
async def test_missing_table_is_waited_for(world: World, start: Start) -> None:
    worker = start(world.environment | TARGET, "run")
    line = json.loads(await worker.wait_for_log('"schema failing"'))
    assert line["cause"] == "there is no table Vod"
    await world.view(VODS[0], 3)
    await asyncio.sleep(0.3)
    assert await world.pending() == world.truth
    await Application(world).create_table()
    await worker.wait_for_log("batch flushed")
    assert await world.sql.fetchval('SELECT "viewCount" FROM "Vod" WHERE id = $1', VODS[0]) == 3
    with contextlib.suppress(ProcessLookupError):
        worker.terminate()
    assert await worker.wait() == 0
