"""The application's own table, kept up to date in the same transaction."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import asyncpg
import pytest

from tests.support import vod_table
from tests.support.fakes import FakeClock
from tests.support.limits import limit_statements
from tests.support.world import World
from worker.counters.flush.outcome import Flushed
from worker.db.target.table import REST_S
from worker.errors import DatabaseUnavailable

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


async def test_each_change_is_added_and_ids_without_a_row_are_skipped(world: World) -> None:
    await vod_table.create(world)
    await world.sql.execute('UPDATE "Vod" SET "viewCount" = 100 WHERE id = \'a\'')
    worker = world.worker(BATCH_SIZE="2", **vod_table.SETTINGS)
    for _ in range(2):
        await world.view_many(["a", "b", "b", "gone", "gone", "gone"])
        await worker.cycle()
    assert await vod_table.shown(world) == {"a": 102, "b": 4, "c": 0}
    assert vod_table.skipped(worker) == {"unknown": 6}
    await world.assert_exact()


async def test_view_that_is_incremented_and_published_is_added_once(world: World) -> None:
    await vod_table.create(world)
    worker = world.worker(**vod_table.SETTINGS)
    async with worker.listening():
        await worker.sweep_and_flush()
        await world.redis.incrby(world.prefix + "a", 3)
        await worker.sweep_and_flush()  # counted, and announced only later
        await world.announce("a", 3)
        await world.announce("b", 2)
        await worker.wait_until(lambda: len(worker.counters.backlog.announced) == 2)
        await worker.sweep_and_flush()
    assert await vod_table.shown(world) == {"a": 3, "b": 2, "c": 0}


async def test_crash_between_commit_and_settle_adds_once(world: World) -> None:
    await vod_table.create(world)
    worker = world.worker(**vod_table.SETTINGS)
    await world.view_many(["a", "a", "b", "gone"])
    settle = worker.counters.flusher.settler.settle

    async def gone(*_: Any, **__: Any) -> bool:
        raise DatabaseUnavailable("gone")

    worker.counters.flusher.settler.settle = gone  # type: ignore[method-assign]
    with pytest.raises(DatabaseUnavailable):
        await worker.cycle()
    worker.counters.flusher.settler.settle = settle  # type: ignore[method-assign]
    assert vod_table.skipped(worker) == {"unknown": 1}
    assert worker.metric("view_count_flushed_views_total") == 4
    await world.worker(**vod_table.SETTINGS).cycle()
    assert await vod_table.shown(world) == {"a": 2, "b": 1, "c": 0}
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
async def test_row_that_refuses_does_not_block_others(world: World, refusing: str, expected: int) -> None:
    await vod_table.create(world, ids=",".join(["a", "b", "c", *(f"vod_{number}" for number in range(20))]))
    await world.sql.execute(refusing)
    worker = world.worker(**vod_table.SETTINGS)
    await world.view_many(["a", "c", *["b"] * 50, *(f"vod_{number}" for number in range(20))])
    await worker.cycle()
    found = await vod_table.shown(world)
    assert found.pop("b") == expected
    assert set(found.values()) == {1}
    assert vod_table.skipped(worker) == {"refused": 50}
    await world.assert_exact()


@pytest.mark.parametrize(
    "state",
    [
        *("PT403", "42501", "42P01", "55000", "21000"),
        *("0A000", "08001", "08006", "25006", "26000", "40001", "40P01", "53100", "53400", "57014", "57P01"),
    ],
)
async def test_row_whose_trigger_fails_with_any_error_does_not_block_others(world: World, state: str) -> None:
    await vod_table.create(world)
    await world.sql.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN IF new.id = 'b' THEN RAISE 'no' USING ERRCODE = '{state}'; END IF; RETURN new; END$$;
        CREATE TRIGGER t BEFORE UPDATE ON "Vod" FOR EACH ROW EXECUTE FUNCTION refuse()
        """
    )
    worker = world.worker(**vod_table.SETTINGS)
    await world.view_many(["a", "b", "b", "c"])
    await worker.cycle()
    assert await vod_table.shown(world) == {"a": 1, "b": 0, "c": 1}
    assert vod_table.skipped(worker) == {"refused": 2}
    await world.assert_exact()


SLOW = """
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
        $$BEGIN IF {} THEN PERFORM pg_sleep({}); END IF; RETURN new; END$$;
    CREATE TRIGGER t BEFORE UPDATE ON "Vod" FOR EACH ROW EXECUTE FUNCTION slow()
"""


async def test_batches_shrink_until_a_slow_trigger_is_in_time_and_stay_small(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.db.target.table.ROWS_LIMIT_S", 0.5)
    ids = [f"vod_{number:02}" for number in range(16)]
    await vod_table.create(world, ids=",".join(ids))
    await world.sql.execute(SLOW.format("true", 0.06))
    worker = world.worker(BATCH_SIZE="16", **vod_table.SETTINGS)
    for _ in range(2):
        await world.view_many(ids)
        await worker.cycle()
    assert set((await vod_table.shown(world)).values()) == {2}
    assert worker.counters.flusher.batch_size.keys < 16
    await world.assert_exact()


async def test_row_whose_trigger_takes_too_long_even_alone_is_skipped(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.db.target.table.ROWS_LIMIT_S", 0.7)
    await vod_table.create(world)
    await world.sql.execute(SLOW.format("new.id = 'b'", 10))
    worker = world.worker(**vod_table.SETTINGS)
    await world.view_many(["a", "b", "b", "c"])
    await worker.cycle()
    await worker.sweep_and_flush()
    assert await vod_table.shown(world) == {"a": 1, "b": 0, "c": 1}
    assert vod_table.skipped(worker) == {"refused": 2}
    assert "statement timeout" in caplog.text
    await world.assert_exact()


async def test_trigger_that_refuses_every_statement_does_not_block_totals(world: World) -> None:
    await vod_table.create(world)
    await world.sql.execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'no'; END$$;
        CREATE TRIGGER t BEFORE UPDATE ON "Vod" FOR EACH STATEMENT EXECUTE FUNCTION refuse()
        """
    )
    worker = world.worker(**vod_table.SETTINGS)
    await world.view_many(["a", "b", "gone"])
    await worker.cycle()
    assert worker.metric("view_count_quarantined_keys") == 0
    assert vod_table.skipped(worker) == {"refused": 3}
    await world.assert_exact()


SLOW_STATEMENTS = """
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep({}); RETURN NULL; END$$;
    CREATE TRIGGER t AFTER UPDATE ON "Vod" FOR EACH STATEMENT EXECUTE FUNCTION slow()
"""


async def test_trigger_that_is_slow_for_every_statement_does_not_make_rows_refuse(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.db.target.table.ROWS_LIMIT_S", 1.0)
    await vod_table.create(world)
    await world.sql.execute(SLOW_STATEMENTS.format(1.1))
    await world.view_many(["a", "b"])
    await world.worker(**vod_table.SETTINGS).cycle()
    assert await vod_table.shown(world) == {"a": 1, "b": 1, "c": 0}
    await world.assert_exact()


async def test_trigger_that_times_out_for_every_statement_does_not_block_totals(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_statements(monkeypatch, "700ms")
    await vod_table.create(world)
    await world.sql.execute(SLOW_STATEMENTS.format(5))
    worker = world.worker(**vod_table.SETTINGS)
    await world.view_many(["a", "b"])
    assert await worker.cycle() == Flushed(flush_id=1, keys=2, views=2)
    assert vod_table.skipped(worker) == {"refused": 2}
    await world.assert_exact()


async def test_rows_whose_trigger_waits_for_a_lock_stay_pending_and_do_not_block_others(world: World) -> None:
    blocked, free = [f"blocked_{number:02}" for number in range(5)], [f"vod_{number:02}" for number in range(40)]
    await vod_table.create(world, ids=",".join(blocked + free))
    await world.sql.execute(
        """
        CREATE TABLE channel (n int); INSERT INTO channel VALUES (0);
        CREATE FUNCTION add() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN IF new.id LIKE 'blocked%' THEN UPDATE channel SET n = n + 1; END IF; RETURN new; END$$;
        CREATE TRIGGER t AFTER UPDATE ON "Vod" FOR EACH ROW EXECUTE FUNCTION add()
        """
    )
    worker = world.worker(**vod_table.SETTINGS)
    await worker.cycle()
    await world.view_many(blocked + free)
    async with world.sql.transaction():
        await world.sql.execute("UPDATE channel SET n = n + 1")
        await worker.sweep_and_flush()
    assert await world.pending() == Counter(blocked)
    assert await world.totals() == Counter(free)
    await worker.sweep_and_flush()
    assert set((await vod_table.shown(world)).values()) == {1}
    await world.assert_exact()


async def test_application_does_not_wait_for_rows_of_a_flush_that_waits_for_a_lock(world: World) -> None:
    await vod_table.create(world)
    await world.sql.execute(
        """
        CREATE TABLE channel (n int); INSERT INTO channel VALUES (0);
        CREATE FUNCTION add() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN UPDATE channel SET n = n + 1; RETURN new; END$$;
        CREATE TRIGGER t AFTER UPDATE OF "viewCount" ON "Vod" FOR EACH ROW EXECUTE FUNCTION add()
        """
    )
    worker = world.worker(**vod_table.SETTINGS)
    await worker.cycle()
    await world.view_many(["a", "b"])
    application = await asyncpg.connect(world.database_url)
    async with world.sql.transaction():
        await world.sql.execute("UPDATE channel SET n = n + 1")
        flush = asyncio.create_task(worker.sweep_and_flush())
        while not flush.done() and not await application.fetchval(WAITING):
            await asyncio.sleep(0.01)
        await application.execute("SET lock_timeout = '2s'")
        await application.execute("UPDATE \"Vod\" SET title = 'new' WHERE id = 'a'")
        await flush
    await application.close()
    await worker.sweep_and_flush()
    assert await vod_table.shown(world) == {"a": 1, "b": 1, "c": 0}
    await world.assert_exact()


async def test_row_that_refuses_is_not_retried_for_a_while(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await vod_table.create(world)
    # A sequence keeps its value when the transaction is rolled back.
    await world.sql.execute(
        """
        CREATE SEQUENCE tries;
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN IF new.id = 'b' THEN PERFORM nextval('tries'); RAISE EXCEPTION 'no'; END IF; RETURN new; END$$;
        CREATE TRIGGER t BEFORE UPDATE ON "Vod" FOR EACH ROW EXECUTE FUNCTION refuse()
        """
    )
    clock = FakeClock()
    monkeypatch.setattr("worker.app.counters.SystemClock", lambda: clock)
    worker = world.worker(**vod_table.SETTINGS)

    async def tries_of_a_flush() -> int:
        before: int = await world.sql.fetchval("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM tries")
        await world.view_many(["a", "b"])
        await worker.cycle()
        after: int = await world.sql.fetchval("SELECT last_value FROM tries")
        return after - before

    assert await tries_of_a_flush() > 0
    assert await tries_of_a_flush() == 0
    clock.advance(REST_S + 1)
    assert await tries_of_a_flush() > 0
    assert await vod_table.shown(world) == {"a": 3, "b": 0, "c": 0}
    assert vod_table.skipped(worker) == {"refused": 3}
    await world.assert_exact()


async def test_locked_row_stays_pending_and_does_not_block_others(world: World) -> None:
    await vod_table.create(world)
    worker = world.worker(**vod_table.SETTINGS)
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
    assert await vod_table.shown(world) == {"a": 1, "b": 2, "c": 0}
    assert vod_table.skipped(worker) == {}
    await world.assert_exact()


async def test_foreign_key_to_the_row_does_not_block_the_flush(world: World) -> None:
    await vod_table.create(world)
    await world.sql.execute('CREATE TABLE comment (vod text REFERENCES "Vod")')
    worker = world.worker(**vod_table.SETTINGS)
    await worker.cycle()
    await world.view("a")
    async with world.sql.transaction():
        await world.sql.execute("INSERT INTO comment VALUES ('a')")
        assert await worker.sweep_and_flush() == Flushed(flush_id=1, keys=1, views=1)


async def test_deadlock_with_the_application_is_retried(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trigger waits for a row that the application has locked, and the application waits for the worker's row."""
    # Otherwise the wait ends before Postgres looks for deadlocks, which it does after one second by default.
    monkeypatch.setattr("worker.db.target.table.LOCK_LIMIT_S", 20.0)
    monkeypatch.setattr("worker.db.target.table.ROWS_LIMIT_S", 20.0)
    await vod_table.create(world)
    await world.sql.execute(
        """
        CREATE TABLE audit (n int); INSERT INTO audit VALUES (0);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN UPDATE audit SET n = n + 1; RETURN new; END$$;
        CREATE TRIGGER t BEFORE UPDATE OF title, "viewCount" ON "Vod" FOR EACH ROW EXECUTE FUNCTION note();
        """
    )
    worker = world.worker(**vod_table.SETTINGS)
    await worker.cycle()
    await world.view("a")
    application = await asyncpg.connect(world.database_url)
    async with application.transaction():
        # Postgres checks the worker's wait first, so it aborts the worker's transaction.
        await application.execute("SET LOCAL deadlock_timeout = '20s'")
        await application.execute("UPDATE audit SET n = n + 1")
        flush = asyncio.create_task(worker.sweep_and_flush())
        async with asyncio.timeout(10):
            while not await world.sql.fetchval(WAITING):
                await asyncio.sleep(0.01)
        await application.execute("UPDATE \"Vod\" SET title = 'new' WHERE id = 'a'")
    await application.close()
    assert isinstance(await flush, Flushed)
    await worker.sweep_and_flush()
    assert (await vod_table.shown(world))["a"] == 1
    await world.assert_exact()


@pytest.mark.usefixtures("brief_locks")
async def test_locked_table_is_waited_for_once(world: World) -> None:
    await vod_table.create(world)
    worker = world.worker(**vod_table.SETTINGS)
    await worker.cycle()
    await world.view_many(["a", "b", "c"])
    async with world.sql.transaction():
        await world.sql.execute('LOCK TABLE "Vod" IN SHARE MODE')
        with pytest.raises(DatabaseUnavailable, match="the table Vod is locked"):
            await worker.sweep_and_flush()
    await worker.sweep_and_flush()
    await world.assert_exact()


async def test_row_that_fails_a_deferred_constraint_does_not_block_others(world: World) -> None:
    await vod_table.create(world)
    await world.sql.execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN IF new.id = 'b' THEN RAISE EXCEPTION 'no'; END IF; RETURN new; END$$;
        CREATE CONSTRAINT TRIGGER t AFTER UPDATE ON "Vod" DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION refuse()
        """
    )
    worker = world.worker(**vod_table.SETTINGS)
    await world.view_many(["a", "b", "b", "c"])
    await worker.cycle()
    assert await vod_table.shown(world) == {"a": 1, "b": 0, "c": 1}
    assert vod_table.skipped(worker) == {"refused": 2}
    await world.assert_exact()
