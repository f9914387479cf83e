"""Migrations: upgrade, downgrade, and comparison with the tables in the code."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from tests.support.world import clean_environment
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.db.tables import metadata
from worker.errors import SchemaNotCurrent
from worker.pipelines.model import RecordType
from worker.pipelines.records import RECORD_TYPES

ROOT = Path(__file__).parents[2]
TABLES = {*metadata.tables, *RECORD_TYPES}


@pytest.fixture
async def database(empty_database_url: str) -> AsyncIterator[Database]:
    made = Database(parse_database_url(empty_database_url))
    yield made
    await made.close()


async def tables(url: str) -> set[str]:
    sql = await asyncpg.connect(url)
    rows = await sql.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    await sql.close()
    return {row["tablename"] for row in rows} - {schema.VERSION_TABLE}


async def state(database: Database) -> schema.SchemaState:
    async with database.transaction() as tx:
        return await schema.read_schema(tx)


async def test_upgrade_creates_the_tables_and_downgrade_removes_them(
    database: Database, empty_database_url: str
) -> None:
    with pytest.raises(SchemaNotCurrent, match="no viewer-worker tables"):
        (await state(database)).require_current()
    await schema.upgrade(database)
    (await state(database)).require_current()
    assert await tables(empty_database_url) == TABLES
    await schema.upgrade(database)
    await schema.downgrade(database, "base")
    assert await tables(empty_database_url) == set()
    await schema.upgrade(database)
    assert await tables(empty_database_url) == TABLES


async def test_migrations_create_the_tables_in_the_code(database: Database) -> None:
    await schema.upgrade(database)

    def differences(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"version_table": schema.VERSION_TABLE})
        # The BRIN indexes stand in for hypertables and exist only where there is no TimescaleDB.
        return [
            difference
            for difference in compare_metadata(context, metadata)
            if not (difference[0] == "remove_index" and str(difference[1].name).endswith("_brin"))
            and not (difference[0] == "remove_table" and difference[1].name in RECORD_TYPES)
            and not (difference[0] == "remove_index" and difference[1].table.name in RECORD_TYPES)
        ]

    async with database.engine.connect() as connection:
        assert await connection.run_sync(differences) == []


@pytest.mark.parametrize("record", RECORD_TYPES.values(), ids=list(RECORD_TYPES))
async def test_tables_of_records_have_the_columns_of_the_record(
    database: Database, empty_database_url: str, record: RecordType[Any]
) -> None:
    await schema.upgrade(database)
    sql = await asyncpg.connect(empty_database_url)
    found = await sql.fetch(
        "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute "
        "WHERE attrelid = $1::text::regclass AND attnum > 0 ORDER BY attnum",
        record.name,
    )
    await sql.close()
    names = {"timestamptz": "timestamp with time zone"}
    assert [tuple(row) for row in found] == [(name, names.get(kind, kind)) for name, kind in record.columns]


async def test_time_columns_have_brin_indexes_without_timescaledb(database: Database, empty_database_url: str) -> None:
    await schema.upgrade(database)
    sql = await asyncpg.connect(empty_database_url)
    found = await sql.fetch("SELECT indexname FROM pg_indexes WHERE indexdef LIKE '%USING brin%' ORDER BY 1")
    await sql.close()
    assert [row["indexname"] for row in found] == [
        "chunk_requests_time_brin",
        "view_counts_hourly_bucket_brin",
        "view_events_time_brin",
    ]


async def test_replicas_that_migrate_at_once_wait_for_each_other(empty_database_url: str) -> None:
    replicas = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "worker", "migrate"),
            env=clean_environment() | {"DATABASE_URL": empty_database_url},
            stdout=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    outputs = [(await replica.communicate())[0] for replica in replicas]
    assert [replica.returncode for replica in replicas] == [0, 0, 0], outputs
    assert await tables(empty_database_url) == TABLES


async def test_alembic_version_of_the_application_is_left_alone(database: Database, empty_database_url: str) -> None:
    sql = await asyncpg.connect(empty_database_url)
    await sql.execute("CREATE TABLE alembic_version (version_num text); INSERT INTO alembic_version VALUES ('theirs')")
    await schema.upgrade(database)
    await schema.downgrade(database, "base")
    assert await sql.fetchval("SELECT version_num FROM alembic_version") == "theirs"
    await sql.close()


@pytest.mark.parametrize(
    ("revision", "remedy"),
    [("9999", "Run the version of viewer-worker that migrated this database, or a newer one.")],
)
async def test_revision_of_a_newer_version_is_refused(
    database: Database, empty_database_url: str, revision: str, remedy: str
) -> None:
    await schema.upgrade(database)
    sql = await asyncpg.connect(empty_database_url)
    await sql.execute(f"UPDATE {schema.VERSION_TABLE} SET version_num = $1", revision)
    await sql.close()
    found = await state(database)
    assert not found.is_behind
    with pytest.raises(SchemaNotCurrent) as caught:
        found.require_current()
    assert caught.value.remedy == remedy


async def test_alembic_command_works_from_the_checkout(empty_database_url: str) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=ROOT,
        env=clean_environment() | {"DATABASE_URL": empty_database_url},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert await tables(empty_database_url) == TABLES
    sql = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "alembic", "upgrade", "head", "--sql"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        check=False,
    )
    assert b"CREATE TABLE view_count_flushes" in sql.stdout
