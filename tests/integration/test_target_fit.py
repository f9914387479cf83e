"""Which tables of the application can be kept up to date, and how ids are converted to their keys."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.support import vod_table
from tests.support.world import World
from worker.db.target.names import parse_target
from worker.db.target.table import TargetTable
from worker.errors import TargetUnusable
from worker.runtime.clock import SystemClock


@pytest.mark.parametrize(
    ("key_type", "ids", "expected"),
    [
        ("bigint", {"7": 1, "07": 2, "-3": 4, "x": 8, "99999999999999999999": 16, "7.0": 32}, {7: 3, -3: 4}),
        ("smallint", {"7": 1, "70000": 2, "٣": 4}, {7: 1}),
        (
            "uuid",
            {
                "11111111-2222-3333-4444-55555555abcd": 1,
                "11111111-2222-3333-4444-55555555ABCD": 2,
                "not a uuid": 4,
            },
            {UUID("11111111-2222-3333-4444-55555555abcd"): 3},
        ),
        ("varchar(4)", {"abcd": 1, "abcde": 2}, {"abcd": 1}),
        ("char(4)", {"ab": 1, "abcde": 2}, {"ab  ": 1}),
        ("short", {"ab": 1, "abcde": 2}, {"ab": 1}),
        ("shorter", {"abcd": 1, "abcde": 2}, {"abcd": 1}),
    ],
)
async def test_ids_are_converted_to_the_type_of_the_key_column(
    world: World, key_type: str, ids: dict[str, int], expected: dict[Any, int]
) -> None:
    await world.sql.execute("CREATE DOMAIN short AS varchar(4); CREATE DOMAIN shorter AS short")
    await world.sql.execute(
        f'CREATE SCHEMA app; CREATE TABLE app."Vod" (id {key_type} PRIMARY KEY, "viewCount" bigint)'
    )
    for key in expected:
        await world.sql.execute('INSERT INTO app."Vod" (id) VALUES ($1)', key)  # the total is NULL at first
    for vod_id, views in ids.items():
        await world.view(vod_id, views)
    worker = world.worker(**vod_table.SETTINGS | {"VIEW_TARGET_TABLE": "app.Vod"})
    await worker.cycle()
    found = {row["id"]: row["viewCount"] for row in await world.sql.fetch('SELECT * FROM app."Vod"')}
    assert found == expected
    assert sum(vod_table.skipped(worker).values()) == sum(ids.values()) - sum(expected.values())
    await world.assert_exact()


async def test_changed_type_of_the_key_is_detected(world: World) -> None:
    await world.sql.execute('CREATE TABLE "Vod" (id bigint PRIMARY KEY, "viewCount" int NOT NULL DEFAULT 0)')
    await world.sql.execute('INSERT INTO "Vod" VALUES (7)')
    worker = world.worker(**vod_table.SETTINGS)
    await world.view("7")
    await worker.cycle()
    await world.sql.execute('ALTER TABLE "Vod" ALTER id TYPE text')
    await world.view("7", 2)
    await worker.cycle()
    assert await vod_table.shown(world) == {"7": 3}
    await world.assert_exact()


@pytest.mark.parametrize(
    ("ddl", "problem"),
    [
        ("CREATE TABLE other (id text)", "there is no table Vod"),
        ('CREATE TABLE vod (id text PRIMARY KEY, "viewCount" int)', "there is no table Vod"),
        ('CREATE VIEW "Vod" AS SELECT 1 AS id, 2 AS "viewCount"', "Vod is not a table"),
        ('CREATE TABLE "Vod" (key text PRIMARY KEY, "viewCount" int)', "Vod has no column id"),
        ('CREATE TABLE "Vod" (id text PRIMARY KEY, viewcount int)', "Vod has no column viewCount"),
        ('CREATE TABLE "Vod" (id text PRIMARY KEY, "viewCount" text)', "Vod.viewCount is text, not an integer"),
        ('CREATE TABLE "Vod" (id text PRIMARY KEY, "viewCount" numeric)', "Vod.viewCount is numeric, not an integer"),
        (
            'CREATE TABLE "Vod" (id text PRIMARY KEY, n int, "viewCount" int GENERATED ALWAYS AS (n + 1) STORED)',
            "Vod.viewCount is generated, not an integer",
        ),
        ('CREATE TABLE "Vod" (id date PRIMARY KEY, "viewCount" int)', "Vod.id is date"),
        ('CREATE TABLE "Vod" (id name PRIMARY KEY, "viewCount" int)', "Vod.id is name"),
        ('CREATE TABLE "Vod" (id text, "viewCount" int)', "Vod.id is not unique"),
        ('CREATE TABLE "Vod" (id text, at date, "viewCount" int, PRIMARY KEY (id, at))', "Vod.id is not unique"),
        (
            'CREATE TABLE "Vod" (id text, "viewCount" int); CREATE UNIQUE INDEX ON "Vod" (id) WHERE id > \'a\'',
            "Vod.id is not unique",
        ),
        (
            'CREATE TABLE "Vod" (id text PRIMARY KEY, "viewCount" int); CREATE TABLE log (id text);'
            'CREATE RULE noting AS ON UPDATE TO "Vod" DO ALSO INSERT INTO log VALUES (new.id)',
            "Vod has the rule noting ON UPDATE",
        ),
    ],
)
async def test_unsuitable_table_is_reported_and_nothing_is_flushed(world: World, ddl: str, problem: str) -> None:
    await world.sql.execute(ddl)
    worker = world.worker(**vod_table.SETTINGS)
    await world.view("a")
    with pytest.raises(TargetUnusable, match=f"^{problem}") as caught:
        await worker.cycle()
    assert caught.value.remedy
    assert ("case matters" in caught.value.remedy) is ("vod (" in ddl or "viewcount" in ddl)
    assert await world.pending() == world.truth
    assert await world.totals() == Counter()


async def test_the_worker_s_own_table_is_refused(world: World) -> None:
    own = {"VIEW_TARGET_TABLE": "view_counts", "VIEW_TARGET_KEY": "vod_id", "VIEW_TARGET_COLUMN": "views"}
    await world.view("a")
    with pytest.raises(TargetUnusable, match="own table"):
        await world.worker(**own).cycle()


@pytest.fixture
async def role(world: World) -> AsyncIterator[str]:
    """A role with only the rights on the table that the worker needs."""
    name = f"limited_{uuid4().hex[:8]}"
    await vod_table.create(world)
    await world.sql.execute(f'CREATE ROLE {name}; GRANT SELECT, UPDATE ("viewCount") ON "Vod" TO {name}')
    yield name
    await world.sql.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def problem_of(world: World, role: str) -> TargetUnusable | None:
    target = TargetTable(parse_target("Vod", "id", "viewCount"), SystemClock())
    async with world.worker().database.transaction() as tx:
        await tx.exec_driver_sql(f"SET LOCAL ROLE {role}")
        try:
            await target.check(tx)
        except TargetUnusable as problem:
            return problem
    return None


async def test_missing_rights_are_named(world: World, role: str) -> None:
    assert await problem_of(world, role) is None
    await world.sql.execute(f'REVOKE UPDATE ("viewCount") ON "Vod" FROM {role}')
    problem = await problem_of(world, role)
    assert problem is not None
    assert "may not read and update" in str(problem)
    assert problem.remedy.startswith('GRANT SELECT ("id", "viewCount"), UPDATE ("viewCount") ON "Vod"')


@pytest.mark.parametrize(
    ("policies", "fits"),
    [
        ("SELECT", False),
        ("CREATE POLICY p ON \"Vod\" TO {role} USING (id <> 'b')", False),
        ('CREATE POLICY p ON "Vod" FOR SELECT TO {role} USING (true)', False),
        ("CREATE POLICY p ON \"Vod\" TO {role} USING (true) WITH CHECK (id <> 'b')", False),
        ('CREATE POLICY p ON "Vod" TO postgres USING (true)', False),
        ('CREATE POLICY p ON "Vod" TO {role} USING (true)', True),
        ('CREATE POLICY p ON "Vod" USING (true) WITH CHECK (true)', True),
        (
            'CREATE POLICY p ON "Vod" TO {role} USING (true);'
            "CREATE POLICY q ON \"Vod\" AS RESTRICTIVE TO {role} USING (id <> 'b')",
            False,
        ),
    ],
    ids=[
        "no policy",
        "some rows",
        "select only",
        "some updates",
        "another role",
        "all rows",
        "every role",
        "restrictive",
    ],
)
async def test_row_level_security_is_accepted_only_if_it_hides_no_rows(
    world: World, role: str, policies: str, fits: bool
) -> None:
    await world.sql.execute('ALTER TABLE "Vod" ENABLE ROW LEVEL SECURITY')
    await world.sql.execute(policies.format(role=role))
    problem = await problem_of(world, role)
    assert (problem is None) == fits
    assert problem is None or "row-level security may hide rows of Vod" in str(problem)


async def test_check_of_the_table_waits_for_no_lock(world: World, role: str) -> None:
    await world.sql.execute('ALTER TABLE "Vod" ENABLE ROW LEVEL SECURITY')
    await world.sql.execute(f'CREATE POLICY p ON "Vod" TO {role} USING (true) WITH CHECK (true)')
    async with world.sql.transaction():
        await world.sql.execute('LOCK TABLE "Vod" IN ACCESS EXCLUSIVE MODE')
        async with asyncio.timeout(10):
            assert await problem_of(world, role) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Vod", (None, "Vod")), ("app.Vod", ("app", "Vod")), ('"a.b"', (None, "a.b")), ('s."a""b"', ("s", 'a"b'))],
)
def test_names_are_used_exactly_as_written(name: str, expected: tuple[str | None, str]) -> None:
    names = parse_target(name, "id", "n")
    assert (names.schema, names.table) == expected


@pytest.mark.parametrize("name", ["", ".", "a.", ".a", "a.b.c", '"a', 'a"b"'])
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the exact name of a table"):
        parse_target(name, "id", "n")


async def test_hostile_names_are_quoted(world: World) -> None:
    await world.sql.execute('CREATE TABLE "x""; DROP TABLE y; --" ("i d" text PRIMARY KEY, "%(n)s :n" int)')
    await world.sql.execute("""INSERT INTO "x""; DROP TABLE y; --" VALUES ('a', 1)""")
    hostile = {
        "VIEW_TARGET_TABLE": '"x""; DROP TABLE y; --"',
        "VIEW_TARGET_KEY": "i d",
        "VIEW_TARGET_COLUMN": "%(n)s :n",
    }
    await world.view("a", 2)
    await world.worker(**hostile).cycle()
    assert await world.sql.fetchval('SELECT "%(n)s :n" FROM "x""; DROP TABLE y; --"') == 3
