"""Migrations: upgrade, downgrade, and comparison with the tables in the code."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from tests.support.world import World, clean_environment
from worker.counters.flush.marker import Marker
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


async def test_ledger_is_carried_over_to_one_row_a_flush_and_back(
    database: Database, redis_url: str, empty_database_url: str
) -> None:
    """Written by the version before; one flush had lost a row, so that it could not be settled from."""
    await schema.upgrade(database, "0010")
    sql = await asyncpg.connect(empty_database_url)
    lineage, nonces = uuid4(), [uuid4() for _ in range(5)]
    hour = "date_trunc('hour', now(), 'UTC')"
    await sql.execute(
        "INSERT INTO view_counts (vod_id, views, counted) VALUES ('a', 9, 9), ('b', 5, 5), ('c', 1, 1);"
        f"INSERT INTO view_counts_hourly VALUES ({hour}, 'a', 9), ({hour}, 'b', 5), ({hour}, 'c', 1)"
    )
    flushes: dict[int, dict[str, int]] = {1: {"c": 1}, 2: {"a": 1}, 3: {"b": 5, "a": 3}, 4: {"a": 5}}
    for flush_id, taken in flushes.items():
        await sql.execute(
            "INSERT INTO view_count_flushes VALUES ('default', $1, now(), $2, $3, $4, $5, 'w')",
            *(flush_id, nonces[flush_id], nonces[flush_id - 1], len(taken) + (flush_id == 1), sum(taken.values())),
        )
        await sql.executemany(
            "INSERT INTO view_count_deltas SELECT flushed_at, source, flush_id, $2, $3, 0, $3 "
            "FROM view_count_flushes WHERE flush_id = $1",
            [(flush_id, vod_id, count) for vod_id, count in taken.items()],
        )
    await sql.execute(
        "INSERT INTO view_count_sources (source, lineage, last_flush_id, last_nonce, settled_id) "
        "VALUES ('default', $1, 4, $2, 4)",
        *(lineage, nonces[4]),
    )
    await schema.upgrade(database)
    rows = "SELECT flush_id, vod_id, counted, announced, views FROM view_count_deltas ORDER BY 1, 2"
    kept = [(2, "a", 1, 0, 1), (3, "a", 3, 0, 3), (3, "b", 5, 0, 5), (4, "a", 5, 0, 5)]
    assert [tuple(row) for row in await sql.fetch(rows)] == kept
    assert await sql.fetchval("SELECT rolled_up_id FROM view_count_sources") == 4

    # Redis comes back from a snapshot: flushes 3 and 4 are settled from the ledger that was carried over.
    async with World(redis_url, empty_database_url) as world:
        await world.redis.set(world.keys.marker, Marker(lineage, 2, nonces[2]).encode())
        await world.redis.mset({world.prefix + "a": 10, world.prefix + "b": 5})
        worker = world.worker()
        await worker.cycle()
        assert worker.metric("view_count_settle_replays_total") == 2
        assert await world.totals() == Counter(a=11, b=5, c=1)

    await sql.execute("UPDATE view_count_sources SET rolled_up_id = 4")
    await sql.execute("DELETE FROM view_counts_hourly WHERE vod_id = 'a'")
    await schema.downgrade(database, "0010")
    assert [tuple(row) for row in await sql.fetch(rows)] == [*kept, (5, "a", 2, 0, 2)]
    assert await sql.fetchval("SELECT views FROM view_counts_hourly WHERE vod_id = 'a'") == 2
    await sql.close()


async def test_old_rows_can_be_deleted_under_a_publication_for_all_tables(
    database: Database, empty_database_url: str
) -> None:
    await schema.upgrade(database)
    sql = await asyncpg.connect(empty_database_url)
    await sql.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    tables = await sql.fetch("SELECT tablename FROM pg_publication_tables")
    assert {row["tablename"] for row in tables} >= TABLES
    for table in TABLES:
        await sql.execute(f"DELETE FROM {table}")
    await sql.close()
