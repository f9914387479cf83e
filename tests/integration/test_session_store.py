"""SessionStore, SessionManager and EventTracker: the newest event by acceptance is in the table, once."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from prometheus_client import CollectorRegistry

from worker import EventTracker, SessionManager, SessionStore

FAST: dict[str, Any] = {"batch_timeout": 0.02, "retry_delay": 0.01}


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def stored(sql: asyncpg.Connection) -> dict[str, str]:
    found = await sql.fetch("SELECT session_id, last_event_id FROM session_events")
    return {row["session_id"]: row["last_event_id"] for row in found}


async def test_the_last_event_of_each_session_is_stored(database_url: str, sql: asyncpg.Connection) -> None:
    async with SessionStore(database_url, **FAST) as store:
        assert await store.get_last_event_id("a") is None
        for number in range(100):
            assert await store.store_last_event_id("a", f"a{number}")
            assert await store.store_last_event_id("b", f"b{number}")
        assert await store.get_last_event_id("a") == "a99"  # accepted, whether it is written or not
        assert await store.flush()
        assert await store.get_last_event_id("a") == "a99"
        assert await store.batch_store_event_ids([("a", "x"), ("c", "y"), ("a", "z")]) == 3
    assert await stored(sql) == {"a": "z", "b": "b99", "c": "y"}
    stats = store.stats
    assert stats.accepted == 203
    assert stats.accepted == stats.coalesced + stats.written


async def test_events_of_a_session_that_waits_take_no_further_room(database_url: str, sql: asyncpg.Connection) -> None:
    registry = CollectorRegistry()
    store = SessionStore(database_url, capacity=2, registry=registry, **FAST)
    assert store.offer("a", "1")
    assert store.offer("b", "1")
    assert not store.offer("c", "1")
    assert store.offer("a", "2")
    assert not await store.store_last_event_id("c", "2", timeout=0.01)
    await store.start()
    assert await store.store_last_event_id("c", "3", timeout=10)
    assert await store.close()
    assert await stored(sql) == {"a": "2", "b": "1", "c": "3"}
    assert (store.stats.refused, store.stats.coalesced) == (2, 1)
    labels = {"pipeline": "session_events"}
    assert registry.get_sample_value("persistence_queue_full_total", labels) == 2
    assert registry.get_sample_value("persistence_coalesced_total", labels) == 1
    assert registry.get_sample_value("persistence_success_total", labels) == 3


async def test_an_event_that_comes_while_its_session_is_being_written_goes_into_the_next_batch(
    database_url: str, sql: asyncpg.Connection
) -> None:
    await sql.execute("BEGIN; LOCK TABLE session_events")
    async with SessionStore(database_url, **FAST) as store:
        assert store.offer("a", "1")
        async with asyncio.timeout(10):
            while not store._writer.in_flight:
                await asyncio.sleep(0.01)
        assert await store.get_last_event_id("a") == "1"
        assert store.offer("a", "2")
        assert await store.get_last_event_id("a") == "2"
        await sql.execute("COMMIT")
    assert await stored(sql) == {"a": "2"}
    assert (store.stats.written, store.stats.coalesced) == (2, 0)


async def test_the_newest_of_two_processes_is_stored(database_url: str, sql: asyncpg.Connection) -> None:
    async with SessionStore(database_url, **FAST) as one, SessionStore(database_url, **FAST) as other:
        assert one.offer("a", "first")
        assert await one.flush()
        await asyncio.sleep(0.005)  # positions are milliseconds
        assert other.offer("a", "second")
        assert await other.flush()
        await asyncio.sleep(0.005)
        assert one.offer("a", "third")
    assert await stored(sql) == {"a": "third"}


async def test_an_id_that_is_not_valid_is_a_letter_and_replaces_no_other(
    database_url: str, sql: asyncpg.Connection
) -> None:
    invalid: list[Any] = ["", None, 7, ["a"], "x" * 257, "a\x00"]
    async with SessionStore(database_url, **FAST) as store:
        for session in [*invalid, "None", *invalid]:
            assert store.offer(session, "e")
    assert await stored(sql) == {"None": "e"}
    stats = store.stats
    assert stats.accepted == stats.coalesced + stats.dead + 1
    assert stats.dead == await sql.fetchval("SELECT count(*) FROM dead_letters") >= len(invalid)


async def test_trackers_never_make_a_task_and_one_task_writes_for_all(
    database_url: str, sql: asyncpg.Connection
) -> None:
    before = asyncio.all_tasks()
    async with SessionManager(SessionStore(database_url, **FAST)) as manager:
        trackers = [manager.create_event_tracker(f"s{number}") for number in range(100)]
        tasks = asyncio.all_tasks() - before
        assert len([task for task in tasks if task.get_name() == "session_events writer 0"]) == 1
        assert len(tasks) == 2  # the other one deletes old tickets, once an hour
        for number in range(50):
            assert all(tracker(f"e{number}") for tracker in trackers)
        assert asyncio.all_tasks() - before == tasks
    assert await stored(sql) == {f"s{number}": "e49" for number in range(100)}


async def test_a_tracker_remembers_what_is_not_written(database_url: str, sql: asyncpg.Connection) -> None:
    manager = SessionManager(store := SessionStore(database_url, capacity=1, **FAST))
    tracker: EventTracker = manager.create_event_tracker("a", max_pending=3)
    other = manager.create_event_tracker("b")
    assert all(tracker(f"e{number}") for number in range(5))
    assert not other("refused")
    assert (tracker.last_event_id, tracker.pending) == ("e4", ("e2", "e3", "e4"))
    assert (other.last_event_id, other.pending) == (None, ())
    await manager.start()
    assert await store.flush()
    assert tracker.pending == ()
    assert await manager.shutdown()
    assert not tracker("late")
    assert await stored(sql) == {"a": "e4"}


async def test_a_clean_stop_and_one_that_leaves_events_are_logged(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "worker.sessions"):
        async with SessionManager(SessionStore(database_url, **FAST)) as manager:
            assert manager.create_event_tracker("a")("1")
        away = SessionManager(SessionStore("postgresql://nobody@127.0.0.1:1/none", **FAST))
        await away.start()
        assert away.create_event_tracker("a")("1")
        assert not await away.shutdown(timeout=0.1)
    texts = [record.getMessage() for record in caplog.records if record.name == "worker.sessions"]
    # Another test of this process may have configured how fields are shown.
    assert len(texts) == 2
    assert "persistence worker shut down cleanly" in texts[0]
    assert "persistence worker shutdown timeout" in texts[1]
    assert "unwritten" in texts[1]


async def test_refusals_after_the_stop_are_counted(database_url: str) -> None:
    registry = CollectorRegistry()
    async with SessionStore(database_url, registry=registry, **FAST) as store:
        pass
    assert not store.offer("a", "1")
    assert not await store.store_last_event_id("a", "1")
    labels = {"pipeline": "session_events"}
    assert registry.get_sample_value("persistence_worker_stopped_total", labels) == 2
    assert registry.get_sample_value("persistence_queue_full_total", labels) == 0


async def test_a_database_that_fails_every_third_write_loses_nothing(
    database_url: str, sql: asyncpg.Connection
) -> None:
    """Of the seed: 99.9 % after retries."""
    await sql.execute(
        """
        CREATE SEQUENCE writes;
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
            IF nextval('writes') % 3 = 0 THEN RAISE EXCEPTION 'third' USING ERRCODE = '40001'; END IF; RETURN NULL;
        END$$;
        CREATE TRIGGER fail BEFORE INSERT ON session_events EXECUTE FUNCTION fail()
        """
    )
    async with SessionStore(database_url, capacity=10_000, **FAST) as store:
        for number in range(1000):
            assert await store.store_last_event_id(f"s{number}", f"e{number}", timeout=10)
        assert await store.flush(60)
    assert await stored(sql) == {f"s{number}": f"e{number}" for number in range(1000)}
    assert store.stats.written == 1000


async def test_connections_that_are_cut_at_random_leave_the_newest(database_url: str, sql: asyncpg.Connection) -> None:
    rng = random.Random(5)
    newest: dict[str, str] = {}
    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'viewer-worker'"
    async with SessionStore(database_url, **FAST) as store:
        for number in range(400):
            session = f"s{rng.randrange(20)}"
            if await store.store_last_event_id(session, f"e{number}", timeout=10):
                newest[session] = f"e{number}"
            if number % 40 == 20:
                await sql.execute(cut + " AND datname = current_database()")
            await asyncio.sleep(0.002)
        assert await store.flush(60)
    assert await stored(sql) == newest


async def test_an_idle_manager_needs_little_memory(database_url: str) -> None:
    """Of the seed: under 100 KB. What a first one loads once is not counted."""
    async with SessionManager(SessionStore(database_url)):
        pass
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    manager = SessionManager(SessionStore(database_url))
    await manager.start()
    gc.collect()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    await manager.shutdown()
    assert used < 100_000
