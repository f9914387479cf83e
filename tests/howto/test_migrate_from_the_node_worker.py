"""docs/how-to/migrate-from-the-node-worker.md: after each step, and after going back, each view is counted once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from tests.howto.application import Application
from tests.howto.pages import joined, snippets
from tests.howto.programs import Programs
from tests.howto.waiting import until
from tests.support.world import World
from worker.dev.servers import free_port

STOPPED, SETTINGS, MIGRATE, START, HEALTH, PENDING, COMPARE = snippets("migrate-from-the-node-worker").values()


@pytest.fixture
def database_url(application: Application) -> str:
    return application.worker_url


@pytest.fixture
def port() -> dict[str, str]:
    return {"HEALTH_CHECK_PORT": str(free_port())}


async def old_worker(world: World, application: Application) -> None:
    """One batch of the old worker, which removes counters from Redis and then writes them."""
    for vod_id in await world.pending():
        views = int(await world.redis.getdel(world.prefix + vod_id))
        await application.sql.execute('UPDATE "Vod" SET "viewCount" = "viewCount" + $2 WHERE id = $1', vod_id, views)


async def status(run: Callable[..., str], port: dict[str, str]) -> object:
    return json.loads(run(HEALTH, **port))["status"]


async def test_page_shows_whether_the_old_worker_still_listens(world: World, run: Callable[..., str]) -> None:
    async with world.redis.pubsub() as old:
        await old.subscribe("view_count_updates")
        assert run(STOPPED) == "view_count_updates\n1"
        await old.unsubscribe()
    await until(lambda: world.redis.pubsub_numsub("view_count_updates"), [(b"view_count_updates", 0)])
    assert run(STOPPED) == "view_count_updates\n0"


async def test_started_worker_is_healthy_and_empties_the_counters(
    world: World, programs: Programs, port: dict[str, str], run: Callable[..., str]
) -> None:
    run(joined(then="viewer-worker migrate\n"))
    await world.view("clx1k2v9u0000")
    assert run(PENDING) == "vod:views:clx1k2v9u0000"
    with programs.started(START, world.environment | port):
        await until(world.pending, {})
        assert run(PENDING) == ""
        await until(lambda: status(run, port), "healthy")


async def test_each_view_is_counted_once_after_migrating_and_going_back(
    application: Application, world: World, programs: Programs, port: dict[str, str], run: Callable[..., str]
) -> None:
    await application.upload("clx1k2v9u0000", 40)
    await application.upload("clx1k2v9u0001")
    await world.view_many(["clx1k2v9u0000", "clx1k2v9u0001", "clx1k2v9u0001"])
    run(joined(SETTINGS, MIGRATE))
    await world.view("clx1k2v9u0000")
    with programs.started(joined(SETTINGS, START), world.environment | port) as worker:
        await until(world.pending, {})
        await until(lambda: status(run, port), "healthy")
        assert run(COMPARE) == ""
        await world.view("clx1k2v9u0001")
        worker.terminate()
        assert await asyncio.to_thread(worker.wait) == 0
    assert await application.columns() == {"clx1k2v9u0000": 42, "clx1k2v9u0001": 3}

    await world.view("clx1k2v9u0000", 5)
    await old_worker(world, application)
    assert await application.columns() == {"clx1k2v9u0000": 47, "clx1k2v9u0001": 3}
    assert run(COMPARE) == "clx1k2v9u0000|47|42"

    await world.view("clx1k2v9u0001")
    run(joined(SETTINGS, then="viewer-worker run --once\n"))
    assert await application.columns() == {"clx1k2v9u0000": 47, "clx1k2v9u0001": 4}
