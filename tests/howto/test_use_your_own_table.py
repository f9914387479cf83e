"""docs/how-to/use-your-own-table.md: the role, the import, the live number, and what is skipped."""

from __future__ import annotations

from collections.abc import Callable

import asyncpg
import pytest

from tests.howto.application import Application
from tests.howto.pages import joined, snippets
from tests.howto.programs import Programs
from tests.howto.waiting import until
from tests.support.world import World
from worker.dev.servers import free_port

_, SETTINGS, _, IMPORT, LIVE, SKIPPED, COMPARE = snippets("use-your-own-table").values()
MIGRATE = joined(then="viewer-worker migrate\n")


@pytest.fixture
def database_url(application: Application) -> str:
    return application.worker_url


async def test_the_role_may_lock_and_change_the_column(application: Application, world: World) -> None:
    await application.upload("vod_123", 40)
    async with world.sql.transaction():
        await world.sql.execute("""SELECT FROM "Vod" WHERE id = 'vod_123' FOR UPDATE SKIP LOCKED""")
        await world.sql.execute("""UPDATE "Vod" SET "viewCount" = "viewCount" + 2 WHERE id = 'vod_123'""")
    assert await application.columns() == {"vod_123": 42}


async def test_the_role_may_do_nothing_else_to_the_table(application: Application, world: World) -> None:
    await refused(world.sql, 'SELECT title FROM "Vod"')
    await refused(world.sql, """UPDATE "Vod" SET id = 'x'""")
    await refused(world.sql, 'DELETE FROM "Vod"')
    await refused(world.sql, 'TRUNCATE "Vod"')


async def refused(sql: asyncpg.Connection, statement: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await sql.execute(statement)


async def test_prints_the_sum_of_pending_views_and_the_column(
    application: Application, world: World, run: Callable[..., str]
) -> None:
    await application.upload("vod_123", 40)
    await application.upload("vod_1", 3)
    await world.view("vod_123", 2)
    assert [run(LIVE, VOD_ID=vod_id) for vod_id in ("vod_123", "vod_1")] == ["42", "3"]


async def test_the_comparison_finds_the_row_that_lacks_views(
    application: Application, world: World, run: Callable[..., str]
) -> None:
    run(MIGRATE)
    await application.upload("vod_123", 40)
    await application.upload("vod_1", 2)
    await world.view_many(["vod_123", "vod_1", "vod_1"])
    await world.worker().cycle()
    assert run(COMPARE) == "vod_123|40|1"


async def test_totals_continue_from_the_values_in_the_table(
    application: Application, world: World, run: Callable[..., str]
) -> None:
    await application.upload("vod_123", 40)
    await application.upload("vod_1", 3)
    await world.view("vod_123", 2)
    run(joined(SETTINGS, IMPORT))
    run(joined(SETTINGS, then="viewer-worker run --once\n"))
    assert await application.columns() == await world.totals() == {"vod_123": 42, "vod_1": 3}
    assert await world.pending() == {}
    assert run(COMPARE) == ""


async def test_views_that_the_table_cannot_store_are_counted_and_shown_as_skipped(
    application: Application, world: World, programs: Programs, run: Callable[..., str]
) -> None:
    await application.upload("vod_123")
    await application.upload("full", 2**31 - 1)
    run(joined(SETTINGS, IMPORT))
    await world.view_many(["vod_123", "full", "unknown"])
    port = {"HEALTH_CHECK_PORT": str(free_port())}
    with programs.started(joined(SETTINGS, then="exec viewer-worker run\n"), world.environment | port):
        await until(world.pending, {})
        shown = run(SKIPPED, **port)
    assert await application.columns() == {"vod_123": 1, "full": 2**31 - 1}
    assert await world.totals() == {"vod_123": 1, "full": 2**31, "unknown": 1}
    assert sum(float(line.split()[-1]) for line in shown.splitlines() if not line.startswith("#")) == 2
    assert run(COMPARE) == f"full|{2**31 - 1}|{2**31}"
