"""A Redis, a database and the tools of every language for the snippets of docs/how-to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg
import pytest

from tests.howto.application import ROLE, TABLE, Application
from tests.howto.pages import Snippet
from tests.howto.programs import Programs
from tests.support.world import World, database_url_for
from worker.dev.servers import PostgresServer, ValkeyServer


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("howto"))


@pytest.fixture
async def world(valkey: ValkeyServer, database_url: str) -> AsyncIterator[World]:
    """The pages use the prefix `vod:views:`, so each test has its own Redis."""
    async with World(valkey.url, database_url, prefix="vod:views:") as made:
        yield made


@pytest.fixture(scope="session")
def application_server(servers_folder: Path) -> Iterator[PostgresServer]:
    """A separate Postgres: the pages create a role, and a role belongs to the whole server."""
    server = PostgresServer(servers_folder / "application", options=("fsync=off",))
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def application(application_server: PostgresServer) -> AsyncIterator[Application]:
    admin = await asyncpg.connect(application_server.url)
    await admin.execute("CREATE DATABASE streamix")
    owner_url = database_url_for(application_server.url, "streamix")
    owner = await asyncpg.connect(owner_url)
    await owner.execute(TABLE.code)
    await owner.execute(ROLE.code)
    yield Application(owner, owner_url.replace("//postgres@", "//viewer_worker@"))
    await owner.close()
    await admin.execute("DROP DATABASE streamix WITH (FORCE)")
    await admin.execute("DROP ROLE viewer_worker")
    await admin.close()


@pytest.fixture
def run(programs: Programs, world: World) -> Callable[..., str]:
    """Runs a snippet on the world's servers, and returns what it printed."""

    def run(snippet: Snippet, **environment: str) -> str:
        ended = programs.run(snippet, world.environment | environment)
        assert ended.returncode == 0, ended.stderr + ended.stdout
        return ended.stdout.strip()

    return run
