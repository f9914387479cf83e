"""Real servers for the tests: embedded ones, started once, or those that TEST_REDIS_URL and TEST_DATABASE_URL name."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, settings

from tests.support.records import Records
from tests.support.world import SYNCHRONISE_AT_ONCE, World, database_url_for
from tests.support.written import WrittenRecords
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.db.transaction_settings import LOCAL_SETTINGS, SETTINGS
from worker.dev.servers import PostgresServer, ValkeyServer

# Tests call over gRPC from a process that also starts others.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# How long examples take depends on what else the machine does.
settings.register_profile("tests", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def servers_folder() -> Iterator[Path]:
    """A folder that Postgres can use even if the tests run as root."""
    folder = Path(tempfile.mkdtemp(prefix="viewer-worker-tests-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_url(servers_folder: Path) -> Iterator[str]:
    if url := os.environ.get("TEST_REDIS_URL"):
        yield url
        return
    server = ValkeyServer(servers_folder / "redis", options=SYNCHRONISE_AT_ONCE)
    server.start()
    yield server.url
    server.kill()


@pytest.fixture(scope="session")
def postgres_url(servers_folder: Path) -> Iterator[str]:
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
        return
    server = PostgresServer(servers_folder / "postgres", options=("fsync=off",))
    server.start()
    yield server.url
    server.kill()


@pytest.fixture(scope="session")
def template_database(postgres_url: str) -> Iterator[str]:
    """A migrated database. Each test gets a copy."""
    name = f"vw_template_{uuid4().hex[:12]}"

    async def create() -> None:
        await _admin(postgres_url, f"CREATE DATABASE {name}")
        database = Database(parse_database_url(database_url_for(postgres_url, name)))
        await schema.upgrade(database)
        await database.close()

    asyncio.run(create())
    yield name
    asyncio.run(_admin(postgres_url, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
async def empty_database_url(postgres_url: str) -> AsyncIterator[str]:
    """A database without any tables."""
    async with _database(postgres_url, "template0") as url:
        yield url


@pytest.fixture
async def database_url(postgres_url: str, template_database: str) -> AsyncIterator[str]:
    """A migrated database for one test."""
    async with _database(postgres_url, template_database) as url:
        yield url


@pytest.fixture
async def latin1_database_url(postgres_url: str) -> AsyncIterator[str]:
    """A migrated database whose encoding has no more than 255 characters."""
    async with _encoded_database(postgres_url, "LATIN1") as url:
        yield url


@pytest.fixture
async def euc_jp_database_url(postgres_url: str) -> AsyncIterator[str]:
    """A migrated database of which only Postgres knows the characters."""
    async with _encoded_database(postgres_url, "EUC_JP") as url:
        yield url


@asynccontextmanager
async def _encoded_database(postgres_url: str, encoding: str) -> AsyncIterator[str]:
    async with _database(postgres_url, f"template0 ENCODING {encoding} LOCALE 'C'") as url:
        database = Database(parse_database_url(url))
        await schema.upgrade(database)
        await database.close()
        yield url


class _database:  # noqa: N801 - used as `async with _database(…)`
    def __init__(self, postgres_url: str, template: str) -> None:
        self._postgres_url = postgres_url
        self._template = template
        self._name = f"vw_test_{uuid4().hex[:12]}"

    async def __aenter__(self) -> str:
        await _admin(self._postgres_url, f"CREATE DATABASE {self._name} TEMPLATE {self._template}")
        return database_url_for(self._postgres_url, self._name)

    async def __aexit__(self, *_: object) -> None:
        await _admin(self._postgres_url, f"DROP DATABASE {self._name} WITH (FORCE)")


async def _admin(postgres_url: str, statement: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture
async def world(redis_url: str, database_url: str) -> AsyncIterator[World]:
    """A Redis prefix and a database for one test, with workers that use them."""
    async with World(redis_url, database_url) as made:
        yield made


@pytest.fixture
async def written(database_url: str) -> AsyncIterator[WrittenRecords]:
    """A database for Writers, which need no Redis."""
    sql = await asyncpg.connect(database_url)
    yield WrittenRecords(database_url, sql)
    await sql.close()


@pytest.fixture
def brief_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transactions of this process wait half a second for a lock, not five."""
    lock_timeout = SETTINGS[[*LOCAL_SETTINGS].index("lock_timeout")]
    _, value, _ = lock_timeout.clauses
    monkeypatch.setattr(value, "value", "500ms")


@pytest.fixture
def records(world: World) -> Iterator[Records]:
    """Chunk requests in the world."""
    made = Records(world)
    yield made
    made.close()


@pytest.fixture
def valkey(request: pytest.FixtureRequest, servers_folder: Path) -> Iterator[ValkeyServer]:
    """A Redis for one test, which may kill, empty and restore it. An indirect parameter adds server options."""
    options = ("--appendfsync", "always", *SYNCHRONISE_AT_ONCE, *getattr(request, "param", ()))
    server = ValkeyServer(servers_folder / f"redis-{uuid4().hex[:8]}", options=options)
    server.start()
    yield server
    server.kill()
    shutil.rmtree(server.folder, ignore_errors=True)
