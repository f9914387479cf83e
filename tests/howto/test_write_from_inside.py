"""docs/how-to/write-from-inside.md: every program stores what it sent, also when it is stopped at once."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest

from tests.howto import asgi_server
from tests.howto.pages import Snippet, joined, snippets
from tests.howto.programs import Programs
from tests.support.world import database_url_for
from worker import ChunkEvent, Writer
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.rights import WRITER_COLUMN_RIGHTS, WRITER_RIGHTS
from worker.db.session import Database
from worker.db.tickets import prune_tickets
from worker.dev.servers import PostgresServer, free_port

PAGE = snippets("write-from-inside")
SERVERS = ("aiohttp_server.py", "asgi.py", "wsgi.py")
HOSTILE_PATH = "/\"ü\" 'x' \\ %s <c>&\t{💡}"
each_server = pytest.mark.parametrize("title", SERVERS)


class RunningServer:
    """A server of the page, started. `stop` sends SIGTERM and returns the exit code."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self._port = port

    async def is_up(self) -> None:
        async with asyncio.timeout(20):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    return

    async def get(self, path: str, *headers: bytes) -> bytes:
        """The response to GET, complete."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        lines = [f"GET {path} HTTP/1.1".encode(), b"Host: localhost", b"Connection: close", *headers, b"", b""]
        writer.write(b"\r\n".join(lines))
        response = b""
        while not response.endswith((b"\r\n\r\nok\n", b"0\r\n\r\n")):
            read = await reader.read(4096)
            assert read, response
            response += read
        writer.close()
        return response

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(20)


@pytest.fixture
def serve(programs: Programs) -> Callable[..., object]:
    """Starts a server of the page with this environment, for a block."""

    @contextmanager
    def serve(title: str, **environment: str) -> Iterator[RunningServer]:
        port = free_port()
        command = programs.command(PAGE[title])
        if title == "asgi.py":
            command = [command[0], asgi_server.__file__, *command[1:]]
        process = subprocess.Popen(
            command, env=programs.environment({"PORT": str(port), **environment}), stdin=subprocess.DEVNULL, text=True
        )
        try:
            yield RunningServer(process, port)
        finally:
            process.kill()
            process.wait()

    return serve


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def paths(sql: asyncpg.Connection) -> Counter[str]:
    return Counter(row["path"] for row in await sql.fetch("SELECT path FROM chunk_requests"))


def test_page_has_a_server_of_each_kind() -> None:
    assert [title for title in PAGE if title in SERVERS] == list(SERVERS)
    assert "wsgi:app" in PAGE["wsgi.py"].code
    assert "asgi:app" in PAGE["asgi.py"].code


@each_server
async def test_every_request_before_sigterm_is_a_row(
    title: str, serve: Callable[..., RunningServer], database_url: str, sql: asyncpg.Connection
) -> None:
    with serve(title, DATABASE_URL=database_url) as server:
        await server.is_up()
        for first in range(0, 40, 4):
            await asyncio.gather(*(server.get(f"/{number}.ts") for number in range(first, first + 4)))
        assert await asyncio.to_thread(server.stop) == 0
    assert await paths(sql) == Counter(f"/{number}.ts" for number in range(40))
    assert await sql.fetchval("SELECT count(*) FROM dead_letters") == 0


@each_server
async def test_row_has_what_the_client_sent(
    title: str, serve: Callable[..., RunningServer], database_url: str, sql: asyncpg.Connection
) -> None:
    with serve(title, DATABASE_URL=database_url) as server:
        await server.is_up()
        headers = ("User-Agent: ü".encode(), b"Referer: a\xffb")
        await server.get(quote(HOSTILE_PATH), *headers)
        assert await asyncio.to_thread(server.stop) == 0
    (row,) = await sql.fetch("SELECT *, now() - time AS age FROM chunk_requests")
    assert (row["path"], row["user_agent"], row["referer"]) == (HOSTILE_PATH, "ü", "a\ufffdb")
    assert str(row["ip"]) == "127.0.0.1"
    assert timedelta(0) < row["age"] < timedelta(minutes=1)


@each_server
async def test_server_without_a_database_answers_when_the_writer_is_switched_off(
    title: str, serve: Callable[..., RunningServer]
) -> None:
    nowhere = f"postgresql://me@127.0.0.1:{free_port()}/nothing"
    with serve(title, DATABASE_URL=nowhere, CHUNKLOG_ENABLED="false") as server:
        await server.is_up()
        assert b"200 OK" in await server.get("/a.ts")
        assert await asyncio.to_thread(server.stop) == 0


@each_server
async def test_server_answers_while_its_database_is_away(title: str, serve: Callable[..., RunningServer]) -> None:
    nowhere = f"postgresql://me@127.0.0.1:{free_port()}/nothing"
    with serve(title, DATABASE_URL=nowhere, SHUTDOWN_TIMEOUT="1s") as server:
        await server.is_up()
        assert b"200 OK" in await server.get("/a.ts")
        assert await asyncio.to_thread(server.stop) == 0


@pytest.mark.parametrize("name", ["first", "backfill", "metrics"])
async def test_page_prints_what_it_shows(name: str, programs: Programs, database_url: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text(PAGE[f"{name}.py"].code)
    block = PAGE.get(f"{name}.sh", Snippet(f"{name}.sh", "sh", f"python {name}.py\n"))
    there = joined(Snippet("cd.sh", "sh", f"cd {tmp_path}\n"), block)
    ended = await asyncio.to_thread(programs.run, there, {"DATABASE_URL": database_url})
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == PAGE[f"{name}.txt"].code
    assert ended.stderr == ""


@pytest.fixture
async def owner(application_server: PostgresServer) -> AsyncIterator[asyncpg.Connection]:
    """The owner of a migrated database on a server of its own, with the role `application` as the page makes it."""
    admin = await asyncpg.connect(application_server.url)
    await admin.execute("CREATE DATABASE requests")
    url = database_url_for(application_server.url, "requests")
    database = Database(parse_database_url(url))
    await schema.upgrade(database)
    await database.close()
    owner = await asyncpg.connect(url)
    await owner.execute("CREATE ROLE application LOGIN")
    await owner.execute(PAGE["writer-role.sql"].code)
    yield owner
    await owner.close()
    await admin.execute("DROP DATABASE requests WITH (FORCE)")
    await admin.execute("DROP ROLE application")
    await admin.close()


@pytest.fixture
def role_url(application_server: PostgresServer) -> str:
    return database_url_for(application_server.url, "requests").replace("//postgres@", "//application@")


async def use_every_right(url: str, patience: float = 1.0) -> bool:
    """Do all that a Writer does with the tables: a row, a row with an event_id, a dead letter, and old tickets.

    False where one of them is not done within `patience` seconds.
    """
    database = Database(parse_database_url(url))
    try:
        async with database.transaction() as tx:
            await prune_tickets(tx, timedelta(0), at_most=10)
    except Exception:
        return False
    finally:
        await database.close()
    writer = Writer.chunk_requests(url)
    await writer.start()
    for event in (
        ChunkEvent(path="/a"),
        ChunkEvent(path="/b", time=datetime.now(UTC), event_id="b"),
        ChunkEvent(path="/c", ip="not an address"),
    ):
        assert writer.send(event)
        if not await writer.flush(patience):
            break
    await writer.shutdown(0)
    return (writer.stats.written, writer.stats.dead) == (2, 1)


async def test_role_has_the_rights_of_the_list_and_no_others(owner: asyncpg.Connection) -> None:
    tables = await owner.fetch(
        "SELECT table_name, privilege_type FROM information_schema.role_table_grants WHERE grantee = 'application'"
    )
    assert {tuple(row) for row in tables} == {
        (table, right) for table in WRITER_RIGHTS for right in WRITER_RIGHTS[table]
    }
    columns = await owner.fetch(
        """
        SELECT table_name, privilege_type, column_name FROM information_schema.role_column_grants
        WHERE grantee = 'application' AND (table_name, privilege_type) NOT IN (
            SELECT table_name, privilege_type FROM information_schema.role_table_grants WHERE grantee = 'application')
        """
    )
    assert {tuple(row) for row in columns} == {
        (table, right, column)
        for table, rights in WRITER_COLUMN_RIGHTS.items()
        for right, names in rights.items()
        for column in names
    }


async def test_role_can_do_all_that_a_writer_does(owner: asyncpg.Connection, role_url: str) -> None:
    assert await use_every_right(role_url, patience=20)
    assert await owner.fetchval("SELECT count(*) FROM ingest_batches") == 3
    reader = await asyncpg.connect(role_url)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await reader.fetch("SELECT path FROM chunk_requests")
    await reader.close()


@pytest.mark.parametrize(
    ("right", "table"),
    [(right, table) for table, rights in WRITER_RIGHTS.items() for right in rights]
    + [
        (f"{right} ({column})", table)
        for table, rights in WRITER_COLUMN_RIGHTS.items()
        for right, columns in rights.items()
        for column in columns
    ],
)
async def test_each_right_of_the_role_is_needed(
    owner: asyncpg.Connection, role_url: str, right: str, table: str
) -> None:
    await owner.execute(f"REVOKE {right} ON {table} FROM application")
    assert not await use_every_right(role_url)


async def test_schema_right_is_needed(owner: asyncpg.Connection, role_url: str) -> None:
    await owner.execute("REVOKE USAGE ON SCHEMA public FROM application, PUBLIC")
    assert not await use_every_right(role_url)
