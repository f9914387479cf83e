"""docs/how-to/read-views.md: every program prints the live number, and reads Redis first."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable

import pytest

from tests.howto.pages import Snippet, snippets
from tests.howto.programs import Programs
from tests.howto.waiting import until
from tests.support.world import CliWorker, World
from worker.dev.servers import ValkeyServer

PAGE = snippets("read-views")
HTTP = ["http-one.sh", "http-many.sh", "http-top.sh"]
LIVE = ["live-ioredis.mjs", "live-redis-py.py"]
SHAPES = ["http-one.json", "message.json"]
TOTALS = [title for title in PAGE if title not in (*HTTP, *LIVE, *SHAPES)]

totals = pytest.mark.parametrize("snippet", [pytest.param(PAGE[title], id=title) for title in TOTALS])
live = pytest.mark.parametrize("snippet", [pytest.param(PAGE[title], id=title) for title in LIVE])


async def flushed_and_pending(world: World) -> None:
    """40 views of vod_123 are in the database and 2 in Redis. vod_1 is only in the database, vod_2 only in Redis."""
    await world.view("vod_123", 40)
    await world.view("vod_1", 3)
    await world.worker().cycle()
    await world.view("vod_123", 2)
    await world.view("vod_2", 5)


@totals
async def test_prints_the_sum_of_pending_and_stored_views(
    snippet: Snippet, run: Callable[..., str], world: World
) -> None:
    await flushed_and_pending(world)
    printed = {vod_id: run(snippet, VOD_ID=vod_id) for vod_id in ("vod_123", "vod_1", "vod_2", "never seen")}
    assert printed == {"vod_123": "42", "vod_1": "3", "vod_2": "5", "never seen": "0"}


@totals
async def test_reads_redis_before_the_database(snippet: Snippet, programs: Programs, world: World) -> None:
    await flushed_and_pending(world)
    await world.sql.execute("BEGIN; LOCK TABLE view_counts IN ACCESS EXCLUSIVE MODE")
    with programs.started(snippet, world.environment | {"VOD_ID": "vod_123"}) as program:
        await wait_for_a_blocked_query(world)
        await world.view("vod_123", 100)
        await world.sql.execute("COMMIT")
        assert await next_line(program) == "42"


async def test_announced_views_are_not_added_to_pending_views(run: Callable[..., str], world: World) -> None:
    await flushed_and_pending(world)
    await world.sql.execute("UPDATE view_counts SET announced = 50, views = 50 WHERE vod_id = 'vod_123'")
    assert run(PAGE["exact.sh"], VOD_ID="vod_123") == "50"


@live
async def test_follows_the_channel_of_totals(snippet: Snippet, programs: Programs, world: World) -> None:
    with programs.started(snippet, world.environment) as program:
        await wait_for_a_subscriber(world)
        await world.redis.publish("view_counts", PAGE["message.json"].code)
        assert await next_line(program) == "vod_123 42"


@live
async def test_follows_again_after_redis_restarted(
    snippet: Snippet, programs: Programs, world: World, valkey: ValkeyServer
) -> None:
    with programs.started(snippet, world.environment) as program:
        await wait_for_a_subscriber(world)
        valkey.kill()
        await world.restart_redis(valkey)
        await wait_for_a_subscriber(world)
        await world.redis.publish("view_counts", PAGE["message.json"].code)
        assert await next_line(program) == "vod_123 42"


@live
async def test_follows_the_totals_that_the_worker_publishes(snippet: Snippet, programs: Programs, world: World) -> None:
    await flushed_and_pending(world)
    with programs.started(snippet, world.environment) as program:
        await wait_for_a_subscriber(world)
        subscription = world.redis.pubsub(ignore_subscribe_messages=True)
        await subscription.subscribe("view_counts")
        await world.worker().cycle()
        assert {await next_line(program), await next_line(program)} == {"vod_123 42", "vod_2 5"}
        message = await anext(subscription.listen())
        await subscription.aclose()
    assert json.loads(message["data"]).keys() == json.loads(PAGE["message.json"].code).keys()


async def test_the_worker_answers_with_the_live_number(run: Callable[..., str], world: World) -> None:
    await world.view("vod_123", 40)
    worker = CliWorker(world.environment | {"BATCH_INTERVAL_MS": "86400000"}, "run")
    try:
        url = json.loads(await worker.wait_for_log('"started"'))["url"]
        await until(world.pending, {})
        await world.view("vod_123", 2)
        environment = {"VOD_ID": "vod_123", "HEALTH_CHECK_PORT": url.rpartition(":")[2]}
        one, *others = [json.loads(run(PAGE[title], **environment)) for title in HTTP]
    finally:
        worker.close()
    assert one == json.loads(PAGE["http-one.json"].code)
    assert all("vod_123" in json.dumps(answer) for answer in others)


async def next_line(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    return (await asyncio.to_thread(program.stdout.readline)).strip()


async def wait_for_a_subscriber(world: World) -> None:
    await until(lambda: world.redis.pubsub_numsub("view_counts"), [(b"view_counts", 1)])


async def wait_for_a_blocked_query(world: World) -> None:
    query = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'view_counts'::regclass"
    await until(lambda: world.sql.fetchval(query), 1)
