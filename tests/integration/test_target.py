"""The application's own table, kept up to date in the same transaction."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.world import InProcessWorker, World
from worker.clock import SystemClock
from worker.counters.flush import Flushed
from worker.db.takeover import take_over
from worker.db.target import Page, TargetTable
from worker.db.target_names import parse_target
from worker.errors import DatabaseUnavailable, TargetUnusable

PRISMA = """
    CREATE TABLE "Vod" (
        id text PRIMARY KEY,
        title text NOT NULL DEFAULT 'untitled',
        "viewCount" integer NOT NULL DEFAULT 0
    )
"""
SETTINGS = {"VIEW_TARGET_TABLE": "Vod", "VIEW_TARGET_KEY": "id", "VIEW_TARGET_COLUMN": "viewCount"}


async def table(world: World, ddl: str = PRISMA, ids: str = "a,b,c") -> None:
    await world.sql.execute(ddl)
    for vod_id in ids.split(","):
        await world.sql.execute('INSERT INTO "Vod" (id) VALUES ($1)', vod_id)


async def shown(world: World) -> dict[Any, int]:
    return {row["id"]: row["viewCount"] for row in await world.sql.fetch('SELECT id, "viewCount" FROM "Vod"')}


def skipped(worker: InProcessWorker) -> dict[str, float]:
    reasons = ("unknown", "not_a_key", "refused")
    found = {reason: worker.metric("view_count_target_skipped_total", reason=reason) for reason in reasons}
    return {reason: views for reason, views in found.items() if views}


async def test_each_change_is_added_and_ids_without_a_row_are_skipped(world: World) -> None:
    await table(world)
    await world.sql.execute('UPDATE "Vod" SET "viewCount" = 100 WHERE id = \'a\'')
    worker = world.worker(BATCH_SIZE="2", **SETTINGS)
    for _ in range(2):
        await world.view_many(["a", "b", "b", "gone", "gone", "gone"])
        await worker.cycle()
    assert await shown(world) == {"a": 102, "b": 4, "c": 0}
    assert skipped(worker) == {"unknown": 6}
    await world.assert_exact()


async def test_it_is_given_what_both_witnesses_say_once(world: World) -> None:
    await table(world)
    worker = world.worker(**SETTINGS)
    async with worker.listening():
        await worker.sweep_and_flush()
        await world.redis.incrby(world.prefix + "a", 3)
        await worker.sweep_and_flush()  # counted, and announced only later
        await world.announce("a", 3)
        await world.announce("b", 2)
        await worker.heard(lambda: len(worker.counters.announced) == 2)
        await worker.sweep_and_flush()
    assert await shown(world) == {"a": 3, "b": 2, "c": 0}


async def test_crash_between_commit_and_settle_adds_once(world: World) -> None:
    await table(world)
    worker = world.worker(**SETTINGS)
    await world.view_many(["a", "a", "b"])
    settle = worker.counters.settler.settle

    async def gone(*_: Any, **__: Any) -> bool:
        raise DatabaseUnavailable("gone")

    worker.counters.settler.settle = gone  # type: ignore[method-assign]
    with pytest.raises(DatabaseUnavailable):
        await worker.cycle()
    worker.counters.settler.settle = settle  # type: ignore[method-assign]
    await world.worker(**SETTINGS).cycle()
    assert await shown(world) == {"a": 2, "b": 1, "c": 0}
    await world.assert_exact()


@pytest.mark.parametrize(
    ("refusing", "expected"),
    [
        ('UPDATE "Vod" SET "viewCount" = 2147483640 WHERE id = \'b\'', 2147483640),
        ('ALTER TABLE "Vod" ADD CHECK ("viewCount" < 5)', 0),
        (
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN IF new.id = 'b' THEN RAISE EXCEPTION 'no'; END IF; RETURN new; END$$;"
            'CREATE TRIGGER t BEFORE UPDATE ON "Vod" FOR EACH ROW EXECUTE FUNCTION refuse()',
            0,
        ),
    ],
    ids=["int4 overflow", "constraint", "trigger"],
)
async def test_row_that_refuses_hinders_no_other(world: World, refusing: str, expected: int) -> None:
    await table(world, ids=",".join(["a", "b", "c", *(f"vod_{number}" for number in range(20))]))
    await world.sql.execute(refusing)
    worker = world.worker(**SETTINGS)
    await world.view_many(["a", "c", *["b"] * 50, *(f"vod_{number}" for number in range(20))])
    await worker.cycle()
    found = await shown(world)
    assert found.pop("b") == expected
    assert set(found.values()) == {1}
    assert skipped(worker) == {"refused": 50}
    await world.assert_exact()


async def test_row_that_refuses_is_not_tried_again_for_a_while(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await table(world)
    # What a sequence counted stays counted when the transaction does not.
    await world.sql.execute(
        """
        CREATE SEQUENCE tries;
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN IF new.id = 'b' THEN PERFORM nextval('tries'); RAISE EXCEPTION 'no'; END IF; RETURN new; END$$;
        CREATE TRIGGER t BEFORE UPDATE ON "Vod" FOR EACH ROW EXECUTE FUNCTION refuse()
        """
    )
    worker = world.worker(**SETTINGS)

    async def tries_of_a_flush() -> int:
        before: int = await world.sql.fetchval("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM tries")
        await world.view_many(["a", "b"])
        await worker.cycle()
        after: int = await world.sql.fetchval("SELECT last_value FROM tries")
        return after - before

    assert await tries_of_a_flush() > 0
    assert await tries_of_a_flush() == 0
    monkeypatch.setattr("worker.db.target.REST_S", 0.0)
    assert await tries_of_a_flush() > 0
    assert await shown(world) == {"a": 3, "b": 0, "c": 0}
    assert skipped(worker) == {"refused": 3}
    await world.assert_exact()


async def test_row_that_somebody_has_locked_stays_pending_and_nobody_waits(world: World) -> None:
    await table(world)
    worker = world.worker(**SETTINGS)
    await worker.cycle()
    await world.view_many(["a", "b", "b"])
    async with world.sql.transaction():
        await world.sql.execute("SELECT FROM \"Vod\" WHERE id = 'b' FOR UPDATE")
        other = await asyncpg.connect(world.database_url)
        assert await worker.sweep_and_flush() == Flushed(flush_id=1, keys=1, views=1)
        assert await other.fetchval("SELECT count(*) FROM view_counts WHERE vod_id = 'b'") == 0
        await other.close()
    assert await world.pending() == Counter(b=2)
    await worker.sweep_and_flush()
    assert await shown(world) == {"a": 1, "b": 2, "c": 0}
    assert skipped(worker) == {}
    await world.assert_exact()


async def test_foreign_key_to_the_row_is_no_hindrance(world: World) -> None:
    await table(world)
    await world.sql.execute('CREATE TABLE comment (vod text REFERENCES "Vod")')
    worker = world.worker(**SETTINGS)
    await worker.cycle()
    await world.view("a")
    async with world.sql.transaction():
        await world.sql.execute("INSERT INTO comment VALUES ('a')")
        assert await worker.sweep_and_flush() == Flushed(flush_id=1, keys=1, views=1)


async def test_deadlock_with_the_application_is_tried_again(world: World) -> None:
    """A trigger wants a row that a transaction of the application has, and that one wants the worker's row."""
    await table(world)
    await world.sql.execute(
        """
        CREATE TABLE audit (n int); INSERT INTO audit VALUES (0);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN UPDATE audit SET n = n + 1; RETURN new; END$$;
        CREATE TRIGGER t BEFORE UPDATE OF title, "viewCount" ON "Vod" FOR EACH ROW EXECUTE FUNCTION note();
        """
    )
    worker = world.worker(**SETTINGS)
    await worker.cycle()
    await world.view("a")
    application = await asyncpg.connect(world.database_url)
    async with application.transaction():
        # The worker's wait is looked at first, so it is the one that is sacrificed.
        await application.execute("SET LOCAL deadlock_timeout = '20s'")
        await application.execute("UPDATE audit SET n = n + 1")
        flush = asyncio.create_task(worker.sweep_and_flush())
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        async with asyncio.timeout(10):
            while not await world.sql.fetch(waiting):
                await asyncio.sleep(0.01)
        await application.execute("UPDATE \"Vod\" SET title = 'new' WHERE id = 'a'")
    await application.close()
    assert isinstance(await flush, Flushed)
    await worker.sweep_and_flush()
    assert (await shown(world))["a"] == 1
    await world.assert_exact()


@pytest.mark.parametrize(
    ("key_type", "ids", "given"),
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
async def test_ids_become_keys_of_the_column_s_own_type(
    world: World, key_type: str, ids: dict[str, int], given: dict[Any, int]
) -> None:
    await world.sql.execute("CREATE DOMAIN short AS varchar(4); CREATE DOMAIN shorter AS short")
    await world.sql.execute(
        f'CREATE SCHEMA app; CREATE TABLE app."Vod" (id {key_type} PRIMARY KEY, "viewCount" bigint)'
    )
    for key in given:
        await world.sql.execute('INSERT INTO app."Vod" (id) VALUES ($1)', key)  # the total is NULL at first
    for vod_id, views in ids.items():
        await world.view(vod_id, views)
    worker = world.worker(**SETTINGS | {"VIEW_TARGET_TABLE": "app.Vod"})
    await worker.cycle()
    found = {row["id"]: row["viewCount"] for row in await world.sql.fetch('SELECT * FROM app."Vod"')}
    assert found == given
    assert sum(skipped(worker).values()) == sum(ids.values()) - sum(given.values())
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
    ],
)
async def test_table_that_does_not_fit_is_told_and_nothing_is_flushed(world: World, ddl: str, problem: str) -> None:
    await world.sql.execute(ddl)
    worker = world.worker(**SETTINGS)
    await world.view("a")
    with pytest.raises(TargetUnusable, match=f"^{problem}") as caught:
        await worker.cycle()
    assert caught.value.remedy
    assert await world.pending() == world.truth
    assert await world.totals() == Counter()


async def test_the_worker_s_own_table_is_refused(world: World) -> None:
    own = {"VIEW_TARGET_TABLE": "view_counts", "VIEW_TARGET_KEY": "vod_id", "VIEW_TARGET_COLUMN": "views"}
    await world.view("a")
    with pytest.raises(TargetUnusable, match="own table"):
        await world.worker(**own).cycle()


@pytest.fixture
async def role(world: World) -> AsyncIterator[str]:
    """One that may do what the worker needs, in this database."""
    name = f"limited_{uuid4().hex[:8]}"
    await table(world)
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


async def test_rights_that_are_missing_are_named(world: World, role: str) -> None:
    assert await problem_of(world, role) is None
    await world.sql.execute(f'REVOKE UPDATE ("viewCount") ON "Vod" FROM {role}')
    problem = await problem_of(world, role)
    assert problem is not None
    assert "may not read and update" in str(problem)
    assert problem.remedy.startswith("GRANT SELECT (id, viewCount), UPDATE (viewCount)")


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
    ids=["none", "some rows", "reading", "some changes", "another's", "all", "everybody's", "restricted"],
)
async def test_rows_that_row_level_security_may_hide_are_not_guessed_about(
    world: World, role: str, policies: str, fits: bool
) -> None:
    await world.sql.execute('ALTER TABLE "Vod" ENABLE ROW LEVEL SECURITY')
    await world.sql.execute(policies.format(role=role))
    problem = await problem_of(world, role)
    assert (problem is None) == fits
    assert problem is None or "row-level security may hide rows of Vod" in str(problem)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Vod", (None, "Vod")), ("app.Vod", ("app", "Vod")), ('"a.b"', (None, "a.b")), ('s."a""b"', ("s", 'a"b'))],
)
def test_names_are_taken_as_they_are_written(name: str, expected: tuple[str | None, str]) -> None:
    names = parse_target(name, "id", "n")
    assert (names.schema, names.table) == expected


@pytest.mark.parametrize("name", ["", ".", "a.", ".a", "a.b.c", '"a', 'a"b"'])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a table such as"):
        parse_target(name, "id", "n")


async def test_hostile_names_are_only_names(world: World) -> None:
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


async def imported(world: World, worker: InProcessWorker) -> tuple[int, int]:
    target = worker.counters.flusher.target
    assert target is not None
    pages = [page async for page in take_over(worker.database, target)]
    return sum(page.ids for page in pages), sum(page.views for page in pages)


async def test_totals_of_the_application_are_taken_over_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.db.takeover.ROWS_AT_ONCE", 2)
    await table(world, ids="a,b,c,d,e")
    await world.sql.execute("UPDATE \"Vod\" SET \"viewCount\" = 100 WHERE id IN ('a', 'b', 'd')")
    await world.sql.execute('UPDATE "Vod" SET "viewCount" = -5 WHERE id = \'e\'')
    worker = world.worker(**SETTINGS)
    await world.view("a", 3)
    await worker.cycle()  # what was flushed before stands in the table too
    assert await imported(world, worker) == (3, 300)
    assert await imported(world, worker) == (0, 0)
    await world.view("b", 2)
    await worker.cycle()
    assert await world.totals() == Counter(a=103, b=102, d=100)
    assert await shown(world) == {"a": 103, "b": 102, "c": 0, "d": 100, "e": -5}
    assert await imported(world, worker) == (0, 0)
    await world.assert_consistent()
    (number,) = await worker.counters.display.views(["b"])
    assert number.views == 102


@pytest.mark.parametrize("key_type", ["bigint", "uuid", "varchar(40)"])
async def test_totals_are_taken_over_for_every_kind_of_key(
    world: World, monkeypatch: pytest.MonkeyPatch, key_type: str
) -> None:
    monkeypatch.setattr("worker.db.takeover.ROWS_AT_ONCE", 3)
    make = "gen_random_uuid()" if key_type == "uuid" else f"CAST(n AS {key_type})"
    await world.sql.execute(f'CREATE TABLE "Vod" (id {key_type} PRIMARY KEY, "viewCount" bigint)')
    await world.sql.execute(f'INSERT INTO "Vod" SELECT {make}, n FROM generate_series(1, 10) n')
    assert await imported(world, world.worker(**SETTINGS)) == (10, 55)
    expected = {str(vod_id): views for vod_id, views in (await shown(world)).items()}
    assert dict(await world.totals()) == expected


async def test_taking_over_while_the_worker_flushes_misses_nothing(world: World) -> None:
    await table(world, ids=",".join(f"vod_{number:03}" for number in range(100)))
    await world.sql.execute('UPDATE "Vod" SET "viewCount" = 1000')
    worker = world.worker(BATCH_SIZE="10", **SETTINGS)
    done = asyncio.Event()

    async def flush() -> None:
        while not done.is_set():
            await world.view_many([f"vod_{number:03}" for number in range(100)])
            await worker.cycle_until_done()

    flushing = asyncio.create_task(flush())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.db.takeover.ROWS_AT_ONCE", 7)
        await asyncio.sleep(0.1)
        assert await imported(world, world.worker(**SETTINGS)) == (100, 100_000)
    done.set()
    await flushing
    flushes = worker.metric("view_count_flushed_views_total") / 100
    assert set((await shown(world)).values()) == {1000 + flushes}
    assert dict(await world.totals()) == await shown(world)


async def test_a_worker_that_never_ran_before_does_not_flush_into_a_taking_over(world: World) -> None:
    await table(world, ids="a")
    await world.view("a", 3)
    reading, go_on = asyncio.Event(), asyncio.Event()
    take_page = TargetTable.take_over

    async def take_page_later(*args: Any) -> Page:
        reading.set()
        await go_on.wait()
        return await take_page(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TargetTable, "take_over", take_page_later)
        taking_over = asyncio.create_task(imported(world, world.worker(**SETTINGS)))
        await reading.wait()
        flush = asyncio.create_task(world.worker(**SETTINGS).cycle())
        done, _ = await asyncio.wait({flush}, timeout=0.5)
        go_on.set()
        await asyncio.gather(taking_over, flush)
    assert not done
    assert await shown(world) == {"a": 3}
    await world.assert_exact()


async def test_key_whose_type_the_application_changes_is_looked_at_anew(world: World) -> None:
    await world.sql.execute('CREATE TABLE "Vod" (id bigint PRIMARY KEY, "viewCount" int NOT NULL DEFAULT 0)')
    await world.sql.execute('INSERT INTO "Vod" VALUES (7)')
    worker = world.worker(**SETTINGS)
    await world.view("7")
    await worker.cycle()
    await world.sql.execute('ALTER TABLE "Vod" ALTER id TYPE text')
    await world.view("7", 2)
    await worker.cycle()
    assert await shown(world) == {"7": 3}
    await world.assert_exact()


async def test_table_that_is_locked_as_a_whole_is_waited_for_once(world: World) -> None:
    await table(world)
    worker = world.worker(**SETTINGS)
    await worker.cycle()
    await world.view_many(["a", "b", "c"])
    async with world.sql.transaction():
        await world.sql.execute('LOCK TABLE "Vod" IN SHARE MODE')
        with pytest.raises(DatabaseUnavailable, match="the table Vod is locked"):
            await worker.sweep_and_flush()
    await worker.sweep_and_flush()
    await world.assert_exact()


async def test_constraint_that_is_checked_late_hinders_no_other(world: World) -> None:
    await table(world)
    await world.sql.execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN IF new.id = 'b' THEN RAISE EXCEPTION 'no'; END IF; RETURN new; END$$;
        CREATE CONSTRAINT TRIGGER t AFTER UPDATE ON "Vod" DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION refuse()
        """
    )
    worker = world.worker(**SETTINGS)
    await world.view_many(["a", "b", "b", "c"])
    await worker.cycle()
    assert await shown(world) == {"a": 1, "b": 0, "c": 1}
    assert skipped(worker) == {"refused": 2}
    await world.assert_exact()
