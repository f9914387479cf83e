"""A Writer whose database is slow, away, or gone during a commit: the counters add up to the rows, exactly."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import text

from tests.integration.test_stream_holds import CHANGES
from tests.support.proxy import Mode, Proxy
from tests.support.written import WrittenRecords, assert_identity, event, paths_of
from worker.db import tickets
from worker.db.session import Database
from worker.db.tickets import Ticket
from worker.inprocess.stats import WriterStats
from worker.pipelines import drain
from worker.pipelines import sink as sink_module
from worker.pipelines.sources.buffered import BufferedSource

COMMIT = b"COMMIT"
ALL = 60


async def wait_for(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_restart_of_the_database_costs_nothing(written: WrittenRecords) -> None:
    async with written.writer(writers=3) as writer:
        for number in range(600):
            assert writer.send(event(number))
            if number % 100 == 99:
                await asyncio.sleep(0.02)
                await written.terminate_connections()
        assert await writer.flush(20)
    assert await written.paths() == paths_of(range(600))
    await written.assert_adds_up(writer.stats)


async def test_a_commit_whose_answer_is_lost_is_not_repeated(written: WrittenRecords) -> None:
    """The rows are there. The batch is tried again with its ticket, which shows it."""
    async with Proxy(written.url) as proxy, written.writer(proxy.url, writers=1) as writer:
        proxy.lose_answer_to(COMMIT)
        for number in range(10):
            assert writer.send(event(number))
        await written.wait_until(written.paths)
        assert_identity(writer.stats)
        assert writer.stats.queued == 10
        proxy.lose_answer_to(b"no such request")
        proxy.mode = Mode.FORWARD
        assert await writer.flush(20)
        assert writer.stats == WriterStats(accepted=10, written=10)
    assert await written.paths() == paths_of(range(10))
    assert await written.tickets() == 1


async def test_a_commit_that_does_not_arrive_is_repeated(written: WrittenRecords) -> None:
    """The rows are not there. For the Writer, it looks the same."""
    async with Proxy(written.url) as proxy, written.writer(proxy.url, writers=1) as writer:
        proxy.cut_before(COMMIT)
        for number in range(10):
            assert writer.send(event(number))
        await wait_for(lambda: proxy.cuts >= 2)
        assert await written.paths() == []
        proxy.cut_before(None)
        assert await writer.flush(20)
        assert writer.stats == WriterStats(accepted=10, written=10)
    assert await written.paths() == paths_of(range(10))
    assert await written.tickets() == 1


@pytest.mark.parametrize("arrives", [True, False], ids=["the rows are there", "the rows are not there"])
async def test_a_commit_that_has_no_answer_until_the_end_is_unknown(written: WrittenRecords, arrives: bool) -> None:
    async with Proxy(written.url) as proxy:
        writer = written.writer(proxy.url, writers=1, batch_size=10, capacity=25)
        await writer.start()
        if arrives:
            proxy.lose_answer_to(COMMIT)
        else:
            proxy.cut_before(COMMIT)
        accepted = sum(writer.send(event(number)) for number in range(30))
        await wait_for(lambda: proxy.cuts or proxy.mode is Mode.RESET)
        await wait_for(lambda: writer.pausing)
        assert not await writer.shutdown(0.1)
        assert writer.stats == WriterStats(accepted=accepted, refused=5, unknown=10, unwritten=15)
    assert await written.paths() == (paths_of(range(10)) if arrives else [])


@pytest.mark.parametrize("mode", [Mode.DROP_ALL, Mode.RESET], ids=["no answer", "refused"])
async def test_shutdown_while_the_database_is_away_ends_and_counts_what_is_left(
    written: WrittenRecords, mode: Mode, caplog: pytest.LogCaptureFixture
) -> None:
    async with Proxy(written.url) as proxy:
        writer = written.writer(proxy.url, capacity=ALL)
        await writer.start()
        for number in range(20):
            assert writer.send(event(number))
        assert await writer.flush(20)
        proxy.mode = mode
        while writer.send(event("lost")):
            pass
        assert not await writer.flush(0.1)
        assert not await writer.shutdown(0.1)
        stats = writer.stats
        assert (stats.accepted, stats.written, stats.queued) == (ALL + 20, 20, 0)
        assert stats.unwritten + stats.unknown == ALL
        assert_identity(stats)
        assert writer.held == 0
        assert "records left at shutdown" in caplog.text
    assert len(await written.paths()) <= 20 + stats.unknown


async def test_shutdown_writes_a_full_buffer(written: WrittenRecords) -> None:
    writer = written.writer(capacity=2000)
    sent = sum(writer.send(event(number)) for number in range(2500))
    await writer.start()
    assert await writer.shutdown(20)
    assert writer.stats == WriterStats(accepted=sent, refused=500, written=2000)
    await written.assert_adds_up(writer.stats)


async def test_a_database_that_is_away_at_the_start_is_waited_for(written: WrittenRecords) -> None:
    async with Proxy(written.url) as proxy:
        proxy.mode = Mode.RESET
        async with written.writer(proxy.url, capacity=20) as writer:
            accepted = sum(writer.send(event(number)) for number in range(30))
            assert not await writer.flush(0.2)
            proxy.mode = Mode.FORWARD
            assert await writer.flush(20)
    assert writer.stats == WriterStats(accepted=accepted, refused=10, written=20)
    await written.assert_adds_up(writer.stats)


async def test_a_slow_database_makes_the_buffer_refuse_and_loses_nothing(written: WrittenRecords) -> None:
    await written.sql.execute(
        """
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(0.05); RETURN NULL; END$$;
        CREATE TRIGGER slow BEFORE INSERT ON chunk_requests EXECUTE FUNCTION slow()
        """
    )
    accepted: list[int] = []
    async with written.writer(capacity=50) as writer:
        for number in range(400):
            if writer.send(event(number)):
                accepted.append(number)
            await asyncio.sleep(0)
            assert_identity(writer.stats)
            assert writer.held <= 50
    assert writer.stats == WriterStats(accepted=len(accepted), refused=400 - len(accepted), written=len(accepted))
    assert writer.stats.refused
    assert await written.paths() == paths_of(accepted)


async def test_a_statement_that_takes_too_long_is_tried_with_fewer_records(
    written: WrittenRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time for a batch grows with its size here, and exceeds the limit for more than five records."""
    apply = text("SELECT set_config('statement_timeout', '80ms', true)")
    monkeypatch.setattr(tickets, "APPLY_SETTINGS", apply)
    await written.sql.execute(
        """
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN PERFORM pg_sleep(0.013 * count(*)) FROM added; RETURN NULL; END$$;
        CREATE TRIGGER slow AFTER INSERT ON chunk_requests REFERENCING NEW TABLE AS added EXECUTE FUNCTION slow()
        """
    )
    async with written.writer(batch_size=16, writers=1) as writer:
        for number in range(16):
            assert writer.send(event(number))
        assert await writer.flush(20)
    assert writer.stats == WriterStats(accepted=16, written=16)
    assert await written.paths() == paths_of(range(16))
    assert await written.tickets() >= 4


@pytest.mark.parametrize("change", CHANGES)
async def test_a_table_that_does_not_fit_is_waited_for_and_nothing_becomes_a_letter(
    written: WrittenRecords, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "HOLD_S", 0.1)
    breaks, mends = CHANGES[change]
    await written.sql.execute(breaks)
    async with written.writer(capacity=30) as writer:
        for number in range(30):
            assert writer.send(event(number))
        assert not writer.send(event("too many"))
        await wait_for(lambda: writer.pausing)
        assert not writer.send(event("too many"))
        await written.sql.execute(mends)
        assert await writer.flush(20)
    assert writer.stats == WriterStats(accepted=30, refused=2, written=30)
    await written.assert_adds_up(writer.stats)


# Where a task of the Writer may be when it is cancelled: each is called once in each write, or read.
STEPS: dict[str, tuple[Any, str]] = {
    "while it takes a connection": (Database, "_connection"),
    "while it takes its ticket": (Ticket, "take"),
    "while it writes letters": (sink_module, "write_letters"),
    "while it waits for a batch": (BufferedSource, "wait"),
    "while it reads a batch": (BufferedSource, "_make"),
}


async def test_wherever_a_task_is_cancelled_the_counters_add_up(
    written: WrittenRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, (owner, name) in STEPS.items():
        for when in ("before", "after"):
            # Nothing is awaited after it took a connection, and this test would lose the connection.
            if (step, when) != ("while it takes a connection", "after"):
                with monkeypatch.context() as patched:
                    await written.sql.execute("TRUNCATE chunk_requests")
                    stats = await write_with_a_task_cancelled(written, patched, owner, name, when)
                assert (stats.accepted, stats.queued) == (40, 0), (step, when)
                assert_identity(stats)
                rows = await written.paths()
                assert len(rows) == len(set(rows)) == stats.written, (step, when)
                assert 0 <= stats.unwritten + stats.unknown <= 5, (step, when)


async def write_with_a_task_cancelled(
    written: WrittenRecords, patched: pytest.MonkeyPatch, owner: Any, name: str, when: str
) -> WriterStats:
    """Cancel the task that calls this function for the third time, before or after the call."""
    real = getattr(owner, name)
    countdown = 3

    async def cancel(*args: Any, **kwargs: Any) -> Any:
        nonlocal countdown
        countdown -= 1
        result = await real(*args, **kwargs) if when == "after" or countdown else None
        task = asyncio.current_task()
        if countdown == 0 and task is not None:
            task.cancel()
            await asyncio.sleep(0)
        return result

    patched.setattr(owner, name, cancel)
    async with written.writer(writers=2, batch_size=5) as writer:
        for number in range(40):
            assert writer.send(event(number))
            await asyncio.sleep(0.001)
        await wait_for(lambda: countdown <= 0)
    return writer.stats


async def test_a_shutdown_that_cancels_at_any_moment_adds_up(written: WrittenRecords) -> None:
    """What was cancelled during a write may be there or not, and what is counted as unwritten is not there."""
    rows = 0
    for moment in range(25):
        writer = written.writer(batch_size=3, writers=2)
        await writer.start()
        for number in range(12):
            assert writer.send(event(number))
        if moment < 5:
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(moment / 1000)
        await writer.shutdown(0)
        stats = writer.stats
        assert_identity(stats)
        assert (stats.accepted, stats.queued) == (12, 0)
        before, rows = rows, len(await written.paths())
        assert stats.written <= rows - before <= stats.written + stats.unknown


async def test_a_commit_that_is_cancelled_is_unknown(written: WrittenRecords) -> None:
    """At the deadline of a shutdown, the database has got the COMMIT, and has not answered."""
    async with Proxy(written.url) as proxy:
        writer = written.writer(proxy.url, writers=1, batch_size=10)
        await writer.start()
        proxy.lose_answer_to(COMMIT, Mode.DROP_ANSWERS)
        for number in range(10):
            assert writer.send(event(number))
        await written.wait_until(written.paths)
        assert not await writer.shutdown(0.01)
    assert writer.stats == WriterStats(accepted=10, unknown=10)
    assert await written.paths() == paths_of(range(10))


async def test_shutdown_goes_on_when_it_is_cancelled_and_may_be_called_again(written: WrittenRecords) -> None:
    writer = written.writer(writers=1)
    await writer.start()
    async with written.sql.transaction():
        await written.sql.execute("LOCK TABLE ingest_batches")
        for number in range(30):
            assert writer.send(event(number))
        first = asyncio.create_task(writer.shutdown(20))
        second = asyncio.create_task(writer.shutdown(0))  # the deadline of the first one counts
        await asyncio.sleep(0.05)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not second.done()
    assert await second
    assert await writer.shutdown()
    assert writer.stats == WriterStats(accepted=30, written=30)
    await written.assert_adds_up(writer.stats)


async def test_flush_and_put_that_wait_end_with_the_shutdown(written: WrittenRecords) -> None:
    writer = written.writer(capacity=5)
    await writer.start()
    async with written.sql.transaction():
        await written.sql.execute("LOCK TABLE ingest_batches")
        for number in range(5):
            assert writer.send(event(number))
        waiting = [asyncio.create_task(writer.flush(600)), asyncio.create_task(writer.put(event("late"), 600))]
        await asyncio.sleep(0.05)
        assert not await writer.shutdown(0.05)
        assert await asyncio.gather(*waiting) == [False, False]
    assert writer.stats.refused == 1
    assert_identity(writer.stats)


async def test_an_application_that_is_cancelled_leaves_nothing_behind(written: WrittenRecords) -> None:
    """Ctrl-C cancels the main task; `asyncio.run` cancels the others, that of the shutdown among them."""
    out, err = await written.run(
        """
async def main():
    async with Writer.chunk_requests(**ARGUMENTS) as writer:
        for number in range(30):
            writer.send(event(number))
        asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
        finally:
            print(writer.stats.accepted, flush=True)
try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted")
"""
    )
    assert (out.split(), err) == (["30", "interrupted"], "")
    assert await written.paths() == paths_of(range(30))


async def test_a_mistake_of_the_application_inside_the_block_still_writes_what_was_accepted(
    written: WrittenRecords,
) -> None:
    async def fail() -> None:
        async with written.writer() as writer:
            assert writer.send(event(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await written.paths() == ["/1"]


async def test_a_task_that_ends_by_a_mistake_is_logged_and_the_other_one_goes_on(
    written: WrittenRecords, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = BufferedSource._make
    failed = False

    async def fail_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        if not failed:
            failed = True
            raise ZeroDivisionError
        return await real(self, *args, **kwargs)

    monkeypatch.setattr(BufferedSource, "_make", fail_once)
    registry = CollectorRegistry()
    async with written.writer(registry=registry) as writer:
        for number in range(30):
            assert writer.send(event(number))
        await wait_for(lambda: writer.stats.written == 20)
    assert registry.get_sample_value("persistence_worker_stopped_total", {"pipeline": "chunk_requests"}) == 1
    assert writer.stats == WriterStats(accepted=30, written=20, unwritten=10)
    assert await written.paths() == paths_of(range(10, 30))
    assert "writer stopped" in caplog.text
    assert [record.levelno for record in caplog.records if "left" in record.getMessage()] == [logging.ERROR]


async def test_a_database_that_takes_no_connections_is_waited_for(written: WrittenRecords) -> None:
    """An error of unknown class while connecting used up the tries, and every record was dropped."""
    name = str(await written.sql.fetchval("SELECT current_database()"))
    admin = await asyncpg.connect(re.sub(r"/[^/]+$", "/postgres", written.url))
    await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    async with written.writer() as writer:
        assert writer.send(event(1))
        await asyncio.sleep(1)
        assert (writer.stats.queued, writer.stats.dropped) == (1, 0)
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    await admin.close()
    assert writer.stats.written == 1


async def test_a_buffer_smaller_than_a_batch_is_written_when_it_is_full(written: WrittenRecords) -> None:
    async with written.writer(capacity=5, batch_size=100, batch_timeout=3600) as writer:
        for number in range(23):
            assert await writer.put(event(number), timeout=10)
    assert writer.stats.written == 23
