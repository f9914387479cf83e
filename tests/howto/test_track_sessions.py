"""docs/how-to/track-sessions.md: the programs print what the page shows, and its role has the rights of a store."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest

from tests.howto.pages import HOW_TO, Snippet, joined, snippets
from tests.howto.programs import Programs
from tests.howto.waiting import until
from tests.support.world import World, database_url_for
from worker import SessionStore
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.db.tickets import prune_tickets
from worker.dev.servers import PostgresServer
from worker.errors import DatabaseUnavailable
from worker.observability.metrics import Metrics

PAGE = snippets("track-sessions")
RIGHTS = [
    ("session_events", "SELECT"),
    ("session_events", "INSERT"),
    ("session_events", "UPDATE"),
    ("dead_letters", "INSERT"),
    ("ingest_batches", "SELECT"),
    ("ingest_batches", "INSERT"),
    ("ingest_batches", "DELETE"),
]


@pytest.mark.parametrize("name", ["sessions", "resume"])
async def test_page_prints_what_it_shows(name: str, programs: Programs, database_url: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text(PAGE[f"{name}.py"].code)
    block = PAGE.get(f"{name}.sh", Snippet(f"{name}.sh", "sh", f"python {name}.py\n"))
    there = joined(Snippet("cd.sh", "sh", f"cd {tmp_path}\n"), block)
    ended = await asyncio.to_thread(programs.run, there, {"DATABASE_URL": database_url})
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == PAGE[f"{name}.txt"].code
    assert ended.stderr == ""


async def test_entry_of_the_page_is_a_row(world: World, programs: Programs, run: Callable[..., str]) -> None:
    run(PAGE["add-event.sh"])
    worker = Snippet("worker.sh", "sh", "exec viewer-worker run\n")
    with programs.started(worker, world.environment | {"PIPELINES": "session_events"}):
        await until(lambda: world.sql.fetchval("SELECT count(*) FROM session_events"), 1)
    assert run(PAGE["last-event.sql"]).startswith("event-7|")


def test_alerts_name_metrics_that_exist() -> None:
    names = {sample.name for metric in Metrics().registry.collect() for sample in metric.samples}
    names |= {metric.name + suffix for metric in Metrics().registry.collect() for suffix in ("", "_total", "_bucket")}
    used = set(re.findall(r"((?:persistence|stream)_\w+)\{", (HOW_TO / "track-sessions.md").read_text()))
    assert len(used) == 6
    assert used <= names


@pytest.fixture
async def owner(application_server: PostgresServer) -> AsyncIterator[asyncpg.Connection]:
    """The owner of a migrated database on a server of its own, with the role `application` as the page makes it."""
    admin = await asyncpg.connect(application_server.url)
    await admin.execute("CREATE DATABASE sessions")
    url = database_url_for(application_server.url, "sessions")
    database = Database(parse_database_url(url))
    await schema.upgrade(database)
    await database.close()
    owner = await asyncpg.connect(url)
    await owner.execute("CREATE ROLE application LOGIN")
    await owner.execute(PAGE["sessions-role.sql"].code)
    yield owner
    await owner.close()
    await admin.execute("DROP DATABASE sessions WITH (FORCE)")
    await admin.execute("DROP ROLE application")
    await admin.close()


@pytest.fixture
def role_url(application_server: PostgresServer) -> str:
    return database_url_for(application_server.url, "sessions").replace("//postgres@", "//application@")


async def use_every_right(url: str, patience: float = 1.0) -> bool:
    """Do all that a SessionStore does with the tables: write, replace, read, a dead letter, and old tickets.

    False where one of them is not done within `patience` seconds.
    """
    database = Database(parse_database_url(url))
    store = SessionStore(url, batch_timeout=0.01)
    try:
        async with database.transaction() as tx:
            await prune_tickets(tx, timedelta(0), at_most=10)
        await store.start()
        for event_id in ("1", "2", ""):
            assert store.offer("s", event_id)
            if not await store.flush(patience):
                return False
        return await store.get_last_event_id("s") == "2"
    except DatabaseUnavailable:
        return False
    finally:
        await store.close(0)
        await database.close()


async def test_role_has_the_rights_of_the_list_and_no_others(owner: asyncpg.Connection) -> None:
    granted = await owner.fetch(
        "SELECT table_name, privilege_type FROM information_schema.role_table_grants WHERE grantee = 'application'"
    )
    assert sorted(map(tuple, granted)) == sorted(RIGHTS)


async def test_role_can_do_all_that_a_store_does(owner: asyncpg.Connection, role_url: str) -> None:
    assert await use_every_right(role_url, patience=20)
    assert await owner.fetchval("SELECT count(*) FROM dead_letters") == 1


@pytest.mark.parametrize(("table", "right"), RIGHTS)
async def test_each_right_of_the_role_is_needed(
    owner: asyncpg.Connection, role_url: str, table: str, right: str
) -> None:
    await owner.execute(f"REVOKE {right} ON {table} FROM application")
    assert not await use_every_right(role_url)
