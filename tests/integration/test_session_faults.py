"""SessionStore and SessionManager under load, failures, threads, forks, cancellation: every event is counted once."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.support.proxy import Mode, Proxy
from tests.support.sessions import stored_events
from tests.support.world import CliWorker
from tests.support.written import WrittenRecords
from worker import SessionManager, SessionStore

FAST: dict[str, Any] = {"batch_timeout": 0.02, "retry_delay": 0.01}
LABELS = {"pipeline": "session_events"}
# Of the plan, and those that were added to it.
NAMES = {
    "persistence_queue_depth",
    "persistence_batch_size",
    "persistence_success_total",
    "persistence_failure_total",
    "persistence_retry_total",
    "persistence_dropped_total",
    "persistence_latency_seconds",
    "persistence_retry_queue_depth",
    "persistence_coalesced_total",
    "persistence_queue_full_total",
    "persistence_retry_exhausted_total",
    "persistence_worker_stopped_total",
}
REFUSE = "ALTER TABLE session_events ADD CONSTRAINT refused CHECK (last_event_id NOT LIKE 'refused%')"
# Its error is of a class that says nothing about the cause.
FAIL = """
    CREATE SEQUENCE tries;
    CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
        PERFORM nextval('tries'); RAISE EXCEPTION 'unknown' USING ERRCODE = 'Z0000';
    END$$;
    CREATE TRIGGER fail BEFORE INSERT ON session_events EXECUTE FUNCTION fail()
"""


async def wait_for(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


# The load


@pytest.mark.parametrize(("sessions", "transactions"), [(100, 200), (5000, 200)], ids=["few sessions", "many sessions"])
async def test_batches_make_few_transactions_of_many_events(
    written: WrittenRecords, sessions: int, transactions: int
) -> None:
    async with SessionStore(written.url) as store:
        for number in range(5000):
            assert await store.store_last_event_id(f"s{number % sessions}", f"e{number}", timeout=20)
        assert await store.flush(20)
    assert await stored_events(written.sql) == {
        f"s{number % sessions}": f"e{number}" for number in range(5000 - sessions, 5000)
    }
    tickets = await written.tickets()
    print(f"5,000 events of {sessions:,} sessions: {tickets} transactions")
    assert tickets <= transactions


async def test_no_task_and_no_thread_is_made_for_an_event(written: WrittenRecords) -> None:
    manager = SessionManager(SessionStore(written.url))
    before, threads = asyncio.all_tasks(), threading.active_count()
    await manager.start()
    of_the_manager = asyncio.all_tasks() - before
    trackers = [manager.create_event_tracker(f"s{number}") for number in range(500)]
    for number in range(20):
        for tracker in trackers:
            tracker(f"e{number}")
            assert threading.active_count() == threads
        assert asyncio.all_tasks() - before == of_the_manager
        await asyncio.sleep(0.01)
    assert len(of_the_manager) == 2  # one writes, one deletes old tickets
    assert await manager.shutdown()
    assert asyncio.all_tasks() - before == set()


async def test_a_thousand_sessions_that_wait_take_bounded_memory(written: WrittenRecords) -> None:
    """Printed only: what a session takes differs by interpreter. The bound is that of records."""
    store = SessionStore(written.url)
    store.offer("first", "e")
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    accepted = sum(store.offer(f"session {number}", f"event {number}") for number in range(5000))
    gc.collect()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    print(f"1,000 sessions that wait: {used / 1024:.0f} KiB")
    assert accepted == 999
    assert store.stats.queued == 1000
    assert not await store.close()


# Threads and tasks


async def test_events_of_several_tasks_and_threads_are_written_once_each(written: WrittenRecords) -> None:
    """Each writer has sessions of its own, and one that all of them have."""

    async def write(name: int) -> None:
        for number in range(200):
            assert await store.store_last_event_id(f"task {name} {number % 7}", f"e{number}", timeout=20)
            await store.store_last_event_id("all", f"task {name} {number}", timeout=20)
            if not number % 10:
                await asyncio.sleep(0)

    def track(name: int) -> None:
        trackers = [manager.create_event_tracker(f"thread {name} {number}") for number in range(7)]
        for number in range(200):
            assert trackers[number % 7](f"e{number}")
            assert manager.create_event_tracker("all")(f"thread {name} {number}")
            assert len(trackers[number % 7].pending) < 200

    store = SessionStore(written.url, **FAST)
    async with SessionManager(store) as manager:
        in_threads = [asyncio.to_thread(track, name) for name in range(3)]
        await asyncio.gather(*(write(name) for name in range(3)), *in_threads)
        assert await store.flush(20)
        last_of_all = await store.get_last_event_id("all")
    found = await stored_events(written.sql)
    assert found.pop("all") == last_of_all
    expected = {number % 7: f"e{number}" for number in range(193, 200)}
    assert found == {
        f"{kind} {name} {number}": event
        for kind in ("task", "thread")
        for name in range(3)
        for number, event in expected.items()
    }
    assert store.stats.accepted == 2 * 6 * 200
    assert_sums_up(store)


async def test_managers_have_a_task_each_and_stop_apart(written: WrittenRecords) -> None:
    first, second = (SessionManager(SessionStore(written.url, **FAST)) for _ in range(2))
    async with second:
        async with first:
            assert first.create_event_tracker("a")("1")
            names = [task.get_name() for task in asyncio.all_tasks()]
            assert names.count("session_events writer 0") == 2
        assert second.create_event_tracker("b")("1")
    assert await stored_events(written.sql) == {"a": "1", "b": "1"}


async def test_a_writer_that_is_cancelled_while_it_waits_for_room_adds_nothing(written: WrittenRecords) -> None:
    await written.sql.execute("BEGIN; LOCK TABLE session_events")
    async with SessionStore(written.url, capacity=1, **FAST) as store:
        assert store.offer("a", "1")
        waiting = asyncio.create_task(store.store_last_event_id("b", "1", timeout=20))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await written.sql.execute("COMMIT")
    assert await stored_events(written.sql) == {"a": "1"}
    assert (store.stats.accepted, store.stats.refused) == (1, 0)


# The end


async def test_shutdown_writes_what_waits_also_when_it_is_cancelled_and_called_again(written: WrittenRecords) -> None:
    manager = SessionManager(store := SessionStore(written.url, batch_timeout=60))
    await manager.start()
    assert all(manager.create_event_tracker(f"s{number}")("e") for number in range(777))
    stopping = asyncio.create_task(manager.shutdown())
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert await manager.shutdown()
    assert await manager.shutdown()
    assert len(await stored_events(written.sql)) == store.stats.written == 777
    assert not manager.create_event_tracker("late")("e")


async def test_shutdown_ends_within_five_seconds_while_the_database_does_not_answer(written: WrittenRecords) -> None:
    async with Proxy(written.url) as proxy:
        manager = SessionManager(store := SessionStore(proxy.url, **FAST))
        await manager.start()
        assert manager.create_event_tracker("before")("e")
        assert await store.flush(20)
        proxy.mode = Mode.DROP_ALL
        for number in range(100):
            assert manager.create_event_tracker(f"s{number}")("e")
        now = asyncio.get_running_loop().time
        began = now()
        assert not await manager.shutdown()
        assert now() - began < 5 + 1
    assert store.stats.unwritten + store.stats.unknown == 100
    assert store.stats.queued == 0
    assert_sums_up(store)
    assert await stored_events(written.sql) == {"before": "e"}


async def test_a_manager_that_was_never_started_counts_what_it_accepted(written: WrittenRecords) -> None:
    manager = SessionManager(store := SessionStore(written.url))
    assert manager.create_event_tracker("a")("1")
    assert not await manager.shutdown()
    assert store.stats.unwritten == 1


# Retries


async def test_attempts_are_counted_for_an_unknown_error_and_then_each_event_is_tried_alone(
    written: WrittenRecords,
) -> None:
    """The three attempts of the plan. What fails alone becomes a dead letter; a later event of it is tried again."""
    registry = CollectorRegistry()
    await written.sql.execute(FAIL)
    async with SessionStore(written.url, registry=registry, **FAST) as store:
        assert store.offer("a", "1")
        assert await store.flush(20)
        assert await written.sql.fetchval("SELECT last_value FROM tries") == 4
        assert registry.get_sample_value("persistence_retry_exhausted_total", LABELS) == 1
        assert (store.stats.dead, store.stats.dropped) == (1, 0)
        await written.sql.execute("DROP TRIGGER fail ON session_events")
        assert store.offer("a", "2")
    assert await stored_events(written.sql) == {"a": "2"}
    (letter,) = await written.letters()
    assert json.loads(letter["payload"]) == {"session_id": "a", "event_id": "1"}


async def test_what_heals_is_tried_longer_than_the_attempts_and_newer_events_wait_behind_it(
    written: WrittenRecords,
) -> None:
    async with Proxy(written.url) as proxy, SessionStore(proxy.url, max_attempts=1, **FAST) as store:
        proxy.mode = Mode.RESET
        assert store.offer("a", "old")
        await wait_for(lambda: store._writer.pausing)
        assert store.offer("a", "new")
        await asyncio.sleep(0.5)
        proxy.mode = Mode.FORWARD
        assert await store.flush(20)
    assert await stored_events(written.sql) == {"a": "new"}
    assert (store.stats.written, store.stats.coalesced) == (2, 0)


async def test_a_commit_without_an_answer_is_not_written_over_a_newer_event(written: WrittenRecords) -> None:
    """The batch is tried again with its ticket, after another process stored a newer event."""
    async with Proxy(written.url) as proxy, SessionStore(proxy.url, **FAST) as store:
        proxy.lose_answer_to(b"COMMIT")
        assert store.offer("a", "old")
        await wait_for(lambda: store._writer.pausing)
        async with SessionStore(written.url, **FAST) as other:
            assert other.offer("a", "new")
        proxy.lose_answer_to(b"no such request")
        proxy.mode = Mode.FORWARD
        assert await store.flush(20)
    assert await stored_events(written.sql) == {"a": "new"}
    assert store.stats.written == 1


# Bad ids and dead letters


async def test_a_bad_event_is_a_letter_and_does_not_replace_a_good_one(written: WrittenRecords) -> None:
    bad: list[Any] = ["", "x" * 257, "ü" * 129, "a\0b", 5, None, ["e"]]
    async with SessionStore(written.url, **FAST) as store:
        tracker = SessionManager(store).create_event_tracker("s")
        assert tracker("good")
        for event_id in bad:
            assert tracker(event_id)
            assert await store.get_last_event_id("s") == "good"
        for session_id in ("", "", "x" * 257, "a\0b", 5):
            assert store.offer(session_id, "e")  # type: ignore[arg-type]
        assert await store.flush(20)
    assert await stored_events(written.sql) == {"s": "good"}
    assert (store.stats.written, store.stats.dead, store.stats.coalesced) == (1, len(bad) + 5, 0)
    assert_sums_up(store)


@pytest.mark.parametrize("session_id", ["", "x" * 257, "a\0b", "\ud800", 5, None, ["s"]])
async def test_an_id_that_no_session_can_have_is_unknown(written: WrittenRecords, session_id: Any) -> None:
    async with SessionStore(written.url) as store:
        assert await store.get_last_event_id(session_id) is None


async def test_what_is_not_unicode_is_stored_and_the_newest_of_it_wins(written: WrittenRecords) -> None:
    async with SessionStore(written.url, **FAST) as store:
        for number in range(3):
            assert store.offer("a\udcff", f"e{number}\udcff")
    assert await stored_events(written.sql) == {"a\ufffd": "e2\ufffd"}


async def test_replay_of_a_letter_of_this_process_does_not_replace_a_newer_event(written: WrittenRecords) -> None:
    """The letter is written later than the newer event was accepted: its own age decides, not that of the letter."""
    await written.sql.execute(REFUSE)
    await written.sql.execute("BEGIN; LOCK TABLE session_events")
    async with SessionStore(written.url, batch_size=1, **FAST) as store:
        assert store.offer("a", "refused")
        await wait_for(lambda: store._writer.in_flight)
        assert store.offer("a", "newer")
        assert store.offer("b", "refused, too")
        await asyncio.sleep(0.1)
        await written.sql.execute("COMMIT")
        assert await store.flush(20)
    assert (store.stats.written, store.stats.dead) == (1, 2)
    await written.sql.execute("ALTER TABLE session_events DROP CONSTRAINT refused")
    replay = CliWorker({"DATABASE_URL": written.url}, "dead-letters", "replay")
    assert await replay.wait() == 0, replay.log
    replay.close()
    assert await stored_events(written.sql) == {"a": "newer", "b": "refused, too"}
    assert await written.letters() == []


# Batches that were taken, while their sessions go on


async def test_the_newest_is_found_while_a_large_batch_is_parsed_and_written(written: WrittenRecords) -> None:
    async with SessionStore(written.url, capacity=5000, batch_size=5000, batch_timeout=0.005) as store:
        trackers = [SessionManager(store).create_event_tracker(f"s{number}") for number in range(2000)]
        for round_ in range(5):
            for tracker in trackers:
                assert tracker(f"e{round_}")
            for _ in range(20):
                await asyncio.sleep(0.001)
                assert await store.get_last_event_id("s1999") == f"e{round_}"
        assert await store.flush(20)


@pytest.mark.parametrize("seed", range(3))
async def test_every_event_is_counted_once_whatever_happens(written: WrittenRecords, seed: int) -> None:
    """Random steps: events, bad ones, connections that are cut, a table that refuses, flushes, and an end."""
    rng = random.Random(seed)
    newest: dict[str, str] = {}
    store = SessionStore(written.url, capacity=30, batch_size=5, max_attempts=2, **FAST)
    await store.start()
    await written.sql.execute(REFUSE)
    for number in range(600):
        session, event = f"s{rng.randrange(40)}", f"e{number}"
        if await take_step(rng, store, written, session, event):
            newest[session] = event
        assert_sums_up(store)
    is_clean = await store.close(20 if seed else 0)
    stats = store.stats
    assert_sums_up(store)
    assert (stats.queued, stats.dropped) == (0, 0)
    assert is_clean == (not stats.unwritten and not stats.unknown)
    found = await stored_events(written.sql)
    if seed:
        assert is_clean
        assert found == newest
    assert stats.dead <= len(await written.letters()) <= stats.dead + stats.unknown


async def take_step(rng: random.Random, store: SessionStore, written: WrittenRecords, session: str, event: str) -> bool:
    """Do something. True: this event of this session was accepted and is good."""
    match rng.choices(["offer", "store", "bad", "refused", "cut", "flush", "wait"], [40, 20, 3, 3, 1, 2, 10])[0]:
        case "offer":
            return store.offer(session, event)
        case "store":
            return await store.store_last_event_id(session, event, timeout=0.05)
        case "bad":
            store.offer(session, rng.choice(["", "x" * 300, "a\0b"]))
        case "refused":
            store.offer(f"other {session}", f"refused {event}")
        case "cut":
            await written.terminate_connections()
        case "flush":
            await store.flush(0.05)
        case "wait":
            await asyncio.sleep(0.01)
    return False


def assert_sums_up(store: SessionStore) -> None:
    stats = store.stats
    became = stats.coalesced + stats.written + stats.dead + stats.dropped + stats.unwritten + stats.unknown
    assert stats.accepted == became + stats.queued
    assert stats.repeated == 0
    assert stats.queued >= 0


# Metrics


async def test_every_metric_of_the_plan_is_there_and_moves(written: WrittenRecords) -> None:
    registry = CollectorRegistry()

    def read(name: str) -> float:
        value = registry.get_sample_value(name, LABELS)
        assert value is not None, name
        return value

    store = SessionStore(written.url, capacity=3, registry=registry, max_attempts=2, **FAST)
    assert [store.offer(session, "1") for session in "aabcd"] == [True, True, True, True, False]
    assert read("persistence_queue_depth") == 3
    await written.sql.execute(FAIL)
    await store.start()
    exported = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in registry.collect()
        if any(sample.labels.get("pipeline") == "session_events" for sample in metric.samples)
    }
    assert exported >= NAMES
    assert exported >= {"timescale_write_total", "timescale_write_errors_total", "timescale_write_latency_seconds"}
    assert read("persistence_success_total") == 0
    await wait_for(lambda: read("persistence_retry_queue_depth") == 3)
    await wait_for(lambda: store.stats.dead == 3)
    await written.sql.execute("DROP TRIGGER fail ON session_events")
    assert await store.store_last_event_id("e", "1", timeout=20)
    assert await store.close()
    assert not store.offer("late", "1")
    assert read("persistence_success_total") == 1
    assert read("persistence_coalesced_total") == 1
    assert read("persistence_queue_full_total") == 1
    assert read("persistence_worker_stopped_total") == 1
    assert read("persistence_dropped_total") == 2
    assert read("persistence_failure_total") == 6
    assert read("persistence_retry_total") >= 3
    assert read("persistence_retry_exhausted_total") == 3
    assert read("persistence_dead_letters_total") == 3
    assert read("persistence_batch_size_count") >= 2
    assert read("persistence_latency_seconds_count") >= 2
    assert (read("persistence_queue_depth"), read("persistence_retry_queue_depth")) == (0, 0)


# Forks


async def test_in_the_child_of_a_fork_a_store_accepts_nothing_and_reads_on_a_connection_of_its_own(
    written: WrittenRecords,
) -> None:
    program = """
from worker import SessionManager, SessionStore

async def use(store, tracker):
    found = await store.get_last_event_id("a"), store.offer("child", "1"), tracker("2"), tracker.pending
    return *found, await store.close(), store.stats.refused

async def main():
    store = SessionStore(batch_timeout=30.0)
    async with SessionManager(store) as manager:
        tracker = manager.create_event_tracker("b")
        assert store.offer("a", "1")
        assert await store.flush(20)
        assert await SessionStore().get_last_event_id("a") == await store.get_last_event_id("a") == "1"
        assert tracker("1")
        if not (pid := os.fork()):
            raise SystemExit(child(store, tracker))
        assert os.waitpid(pid, 0)[1] == 0
        assert await store.get_last_event_id("a") == "1"  # on the connection that was open at the fork
        assert tracker.pending == ("1",)

def child(store, tracker):
    found = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(use(store, tracker))))
    thread.start()
    thread.join()
    print(found, flush=True)
    os._exit(0)

asyncio.run(main())
"""
    out, err = await written.run(program)
    assert out == "[('1', False, False, (), True, 2)]\n"
    assert "shut down" in err
    assert await stored_events(written.sql) == {"a": "1", "b": "1"}
