"""An application's Writer on a real database: what it accepts becomes rows and dead letters, each record once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from prometheus_client import CollectorRegistry

from tests.integration.test_stream_holds import POISON, STRANGE
from tests.support.records import Records
from tests.support.written import WrittenRecords, assert_identity, event, paths_of
from worker import ChunkEvent, Writer
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.db.tickets import Ticket
from worker.inprocess import ticket_pruning
from worker.inprocess.stats import WriterStats

COUNT = 10_000


async def test_ten_thousand_records_are_rows_and_no_task_is_made_for_them(written: WrittenRecords) -> None:
    async with written.writer(batch_size=500) as writer:
        tasks = len(asyncio.all_tasks())
        for number in range(COUNT):
            assert writer.send(event(number))
            assert number % 1000 or len(asyncio.all_tasks()) == tasks
        assert len(asyncio.all_tasks()) == tasks
        assert_identity(writer.stats)
        assert await writer.flush(30)
        assert writer.stats == WriterStats(accepted=COUNT, written=COUNT)
        assert len(asyncio.all_tasks()) <= tasks
    await written.assert_adds_up(writer.stats)
    assert await written.paths() == paths_of(range(COUNT))


async def test_every_field_is_stored_as_it_was_sent(written: WrittenRecords) -> None:
    time = datetime.now(UTC) - timedelta(hours=1)
    texts = {"referer": "ref", "user_agent": 'ä"\\\n', "sid": "s", "uid": "u", "event_id": "e"}
    async with written.writer() as writer:
        assert writer.send(ChunkEvent(time=time, path="/x", ip="2001:DB8::1", **texts))
    row = await written.sql.fetchrow("SELECT *, host(ip) AS host FROM chunk_requests")
    assert {name: row[name] for name in texts} == texts
    assert (row["time"], row["path"], row["host"]) == (time, "/x", "2001:db8::1")


async def test_a_record_without_a_time_gets_that_of_its_acceptance(written: WrittenRecords) -> None:
    writer = written.writer()
    before = datetime.now(UTC)
    assert writer.send(event(1))
    after = datetime.now(UTC)
    async with writer:
        pass
    assert before <= await written.sql.fetchval("SELECT time FROM chunk_requests") <= after


async def test_repeated_events_are_counted_apart(written: WrittenRecords) -> None:
    time = datetime.now(UTC)
    async with written.writer(batch_size=2) as writer:
        for _ in range(5):
            assert writer.send(event(1, time=time, event_id="one"))
    assert writer.stats == WriterStats(accepted=5, written=1, repeated=4)
    await written.assert_adds_up(writer.stats)


INVALID: dict[str, dict[str, Any]] = {
    "an address that is none": {"ip": "300.1.1.1"},
    "a NUL": {"path": "/\x00"},
    "a time far ahead": {"time": datetime(2100, 1, 1, tzinfo=UTC)},
    "an event_id without a time": {"event_id": "e"},
    "a text that is too long": {"uid": "x" * 70_000},
    "a field of another type": {"sid": 5},
}


async def test_invalid_records_are_accepted_and_become_letters(written: WrittenRecords) -> None:
    async with written.writer(batch_size=4) as writer:
        for fields in INVALID.values():
            assert writer.send(event("good"))
            assert writer.send(event("bad", **fields))
    assert writer.stats == WriterStats(accepted=12, written=6, dead=6)
    await written.assert_adds_up(writer.stats)
    for letter in await written.letters():
        ticket, _, place = letter["origin"].partition("/")
        assert await written.sql.fetchval("SELECT pipeline FROM ingest_batches WHERE id = $1::uuid", ticket)
        assert int(place) in (1, 3)


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError


IMPOSSIBLE = [None, object(), {"path": "/x"}, "text", event(1, sid=Unprintable()), event(1, user_agent=b"x")]


async def test_what_cannot_be_encoded_is_refused_and_counted(written: WrittenRecords) -> None:
    registry = CollectorRegistry()
    async with written.writer(registry=registry) as writer:
        for record in IMPOSSIBLE:
            assert not writer.send(record)  # type: ignore[arg-type]
            assert not await writer.put(record, 10)  # type: ignore[arg-type]
        assert writer.send(event("good"))
    refused = 2 * len(IMPOSSIBLE)
    assert writer.stats == WriterStats(accepted=1, written=1, refused=refused)
    assert registry.get_sample_value("persistence_dropped_total", {"pipeline": "chunk_requests"}) == refused
    assert registry.get_sample_value("persistence_queue_full_total", {"pipeline": "chunk_requests"}) == 0
    await written.assert_adds_up(writer.stats)


async def test_what_is_not_unicode_in_a_text_is_replaced(written: WrittenRecords) -> None:
    """A client could keep its requests out of the table by one byte in a header."""
    async with written.writer() as writer:
        assert writer.send(event(1, user_agent="a\udcffb"))
    assert writer.stats.written == 1
    assert await written.sql.fetchval("SELECT user_agent FROM chunk_requests") == "a\ufffdb"


async def test_an_overflow_is_refused_and_what_was_accepted_is_written(written: WrittenRecords) -> None:
    writer = written.writer(capacity=25)
    accepted = [number for number in range(100) if writer.send(event(number))]
    assert accepted == list(range(25))
    async with writer:
        assert await writer.flush(10)
        assert writer.send(event("later"))
    assert writer.stats == WriterStats(accepted=26, refused=75, written=26)
    assert await written.paths() == paths_of([*accepted, "later"])


async def test_bytes_are_bounded_too(written: WrittenRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUFFER_MAX_BYTES", "1MiB")
    writers = [written.writer() for _ in range(2)]
    for writer in writers:
        while writer.send(event("long", uid="x" * 60_000)):
            pass
    assert [writer.stats.accepted for writer in writers] == [17, 0]  # they share the bytes
    async with writers[0]:
        assert await writers[0].flush(10)
        assert writers[1].send(event("long", uid="x" * 60_000))
        async with writers[1]:
            pass
    await written.assert_adds_up(*(writer.stats for writer in writers))


async def test_put_waits_for_room(written: WrittenRecords) -> None:
    async with written.writer(capacity=10) as writer:
        puts = await asyncio.gather(*(writer.put(event(number), 20) for number in range(200)))
    assert all(puts)
    assert await written.paths() == paths_of(range(200))
    await written.assert_adds_up(writer.stats)


async def test_put_is_refused_when_there_is_no_room_in_time(written: WrittenRecords) -> None:
    async with written.writer(capacity=5) as writer, written.sql.transaction():
        await written.sql.execute("LOCK TABLE ingest_batches")
        for number in range(5):
            assert await writer.put(event(number), 0)
        assert not await writer.put(event("late"), 0)
        assert not await writer.put(event("late"), 0.01)
        assert not await writer.flush(0.01)
        assert writer.stats == WriterStats(accepted=5, refused=2, queued=5)
        assert writer.held == 5


async def test_put_takes_room_that_another_writer_left_in_the_shared_bytes(
    written: WrittenRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUFFER_MAX_BYTES", "1MiB")
    async with written.writer() as first, written.writer() as second:
        while first.send(event("long", uid="x" * 60_000)):
            pass
        put = asyncio.create_task(second.put(event("waits", uid="x" * 60_000), 0.5))
        assert await first.flush(10)
        assert await put
    await written.assert_adds_up(first.stats, second.stats)


async def test_a_cancelled_put_adds_nothing(written: WrittenRecords) -> None:
    async with written.writer(capacity=1) as writer:
        async with written.sql.transaction():
            await written.sql.execute("LOCK TABLE ingest_batches")
            assert writer.send(event("first"))
            put = asyncio.create_task(writer.put(event("second"), 20))
            flush = asyncio.create_task(writer.flush(20))
            await asyncio.sleep(0.05)
            put.cancel()
            flush.cancel()
            results = await asyncio.gather(put, flush, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert writer.stats == WriterStats(accepted=1, written=1)
    assert await written.paths() == ["/first"]


async def test_flush_writes_what_is_waiting_without_waiting_for_more(written: WrittenRecords) -> None:
    async with written.writer(batch_size=1000, batch_timeout=3600) as writer:
        for number in range(3):
            assert writer.send(event(number))
        assert await writer.flush(10)
        assert await written.paths() == paths_of(range(3))


async def test_before_the_start_a_flush_reports_whether_anything_waits(written: WrittenRecords) -> None:
    writer = written.writer()
    assert await writer.flush(0)
    assert writer.send(event(1))
    assert not await writer.flush(0)
    async with writer:
        assert await writer.flush(10)


async def test_after_shutdown_nothing_is_accepted(written: WrittenRecords) -> None:
    async with written.writer() as writer:
        assert writer.send(event(1))
    await writer.start()
    assert not writer.send(event(2))
    assert not await writer.put(event(3), 5)
    assert await writer.flush(5)
    assert await writer.shutdown()
    assert writer.stats == WriterStats(accepted=1, written=1, refused=2)


async def test_a_writer_that_was_never_started_counts_what_it_leaves(written: WrittenRecords) -> None:
    writer = written.writer()
    assert writer.send(event(1))
    assert not await writer.shutdown()
    assert writer.stats == WriterStats(accepted=1, unwritten=1)
    assert writer.held == 0
    assert not await writer.flush(5)


async def test_a_writer_that_is_not_enabled_accepts_everything_and_does_nothing() -> None:
    async with Writer.chunk_requests("postgresql://nobody@127.0.0.1:1/none", enabled=False) as writer:
        assert writer.send(event(1))
        assert await writer.put(event(2), 0)
        assert await writer.flush(0)
    assert writer.stats == WriterStats()


async def test_two_writers_write_to_one_table(written: WrittenRecords) -> None:
    async with written.writer(writers=3) as first, written.writer(writers=1) as second:
        for number in range(500):
            assert (first, second)[number % 2].send(event(number))
            if number % 50 == 0:
                await asyncio.sleep(0)
    assert await written.paths() == paths_of(range(500))
    await written.assert_adds_up(first.stats, second.stats)


@pytest.mark.parametrize("kind", POISON)
async def test_what_the_table_refuses_becomes_a_letter_and_the_others_rows(written: WrittenRecords, kind: str) -> None:
    await written.sql.execute(POISON[kind])
    poison = {"path": "/bad", "uid": "long", "referer": "".join(chr(0x4E00 + i * 37 % 20000) for i in range(20_000))}
    async with written.writer(batch_size=40) as writer:
        for number in range(30):
            assert writer.send(event(number, **(poison if number % 10 == 9 else {})))
    assert writer.stats == WriterStats(accepted=30, written=27, dead=3)
    await written.assert_adds_up(writer.stats)
    for letter in await written.letters():
        assert letter["error_class"] == "refused"
        assert letter["sqlstate"]
        assert b'"/bad"' in letter["payload"]


STRANGE_PATH = (
    STRANGE.replace("BEGIN RAISE", "BEGIN IF new.path = '/bad' THEN RAISE")
    .replace("END$$", "END IF; RETURN new; END$$", 1)
    .replace("EXECUTE", "FOR EACH ROW EXECUTE")
)


async def test_a_record_that_fails_for_an_unknown_reason_becomes_a_letter_after_the_tries(
    written: WrittenRecords,
) -> None:
    await written.sql.execute(STRANGE_PATH)
    registry = CollectorRegistry()
    async with written.writer(max_retries=2, registry=registry) as writer:
        for number in range(30):
            assert writer.send(event("bad" if number == 15 else number))
        assert await writer.flush(20)
    assert writer.stats == WriterStats(accepted=30, written=29, dead=1)
    await written.assert_adds_up(writer.stats)
    (letter,) = await written.letters()
    assert (letter["error_class"], letter["sqlstate"]) == ("refused", "ZZ999")
    metric = registry.get_sample_value("persistence_retry_exhausted_total", {"pipeline": "chunk_requests"})
    assert metric == 10


async def test_a_record_that_cannot_even_become_a_letter_is_dropped(written: WrittenRecords) -> None:
    await written.sql.execute(STRANGE_PATH)
    await written.sql.execute(
        """
        CREATE FUNCTION refuse_letter() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN IF new.payload LIKE '%"/bad"%' THEN RAISE EXCEPTION 'no' USING ERRCODE = 'ZZ998'; END IF;
            RETURN new; END$$;
        CREATE TRIGGER t BEFORE INSERT ON dead_letters FOR EACH ROW EXECUTE FUNCTION refuse_letter()
        """
    )
    async with written.writer() as writer:
        for number in range(10):
            assert writer.send(event("bad" if number == 3 else number))
        assert writer.send(event(10, ip="none"))
        assert await writer.flush(20)
    assert writer.stats == WriterStats(accepted=11, written=9, dead=1, dropped=1)
    await written.assert_adds_up(writer.stats)


async def test_letters_of_a_writer_can_be_replayed(records: Records, written: WrittenRecords) -> None:
    await written.sql.execute(POISON["a check"])
    async with written.writer() as writer:
        for number in range(5):
            assert writer.send(event("bad" if number == 2 else number, uid=str(number)))
        assert writer.send(event("worse", ip="none"))
    assert writer.stats.dead == 2
    sent = await written.sql.fetchval("SELECT payload FROM dead_letters WHERE error_class = 'refused'")
    await written.sql.execute("ALTER TABLE chunk_requests DROP CONSTRAINT chunk_requests_path_check")
    replay = records.start("dead-letters", "replay")
    assert await replay.wait() == 1, replay.log
    assert await written.paths() == ["/0", "/1", "/3", "/4", "/bad"], replay.log
    (left,) = await written.letters()
    assert b"worse" in left["payload"]
    row = await written.sql.fetchrow("SELECT * FROM chunk_requests WHERE path = '/bad'")
    assert row["uid"] == "2"
    assert row["time"].isoformat()[:19].encode() in sent


async def test_one_ticket_is_taken_once_however_often_its_batch_is_tried(written: WrittenRecords) -> None:
    database = Database(parse_database_url(written.url))
    ticket = Ticket(uuid4(), "chunk_requests")

    async def take(error: type[Exception] | None = None) -> bool:
        async with database.transaction() as tx:
            taken = await ticket.take(tx)
            if error is not None:
                raise error
            return taken

    with pytest.raises(ZeroDivisionError):
        await take(ZeroDivisionError)
    assert [await take() for _ in range(3)] == [True, False, False]
    await database.close()
    assert await written.tickets() == 1


async def test_each_batch_leaves_a_ticket_and_old_ones_are_pruned(
    written: WrittenRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticket_pruning, "FIRST_PRUNE_S", 0.01)
    monkeypatch.setattr(ticket_pruning, "TICKETS_AT_ONCE", 10)
    old = "INSERT INTO ingest_batches SELECT gen_random_uuid(), 'old', now() - $1::interval FROM generate_series(1, 35)"
    await written.sql.execute(old, timedelta(days=1, seconds=5))
    await written.sql.execute(old.replace("'old'", "'kept'"), timedelta(hours=23))

    async def pruned() -> bool:
        return not await written.sql.fetchval("SELECT count(*) FROM ingest_batches WHERE pipeline = 'old'")

    async with written.writer(writers=1) as writer:
        for number in range(20):
            assert writer.send(event(number))
        await written.wait_until(pruned)
    tickets = await written.sql.fetch("SELECT pipeline, count(*) FROM ingest_batches GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in tickets] == [("chunk_requests", 2), ("kept", 35)]


async def test_tickets_that_cannot_be_pruned_do_not_disturb_the_writer(
    written: WrittenRecords, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ticket_pruning, "FIRST_PRUNE_S", 0.001)
    await written.sql.execute("ALTER TABLE ingest_batches RENAME at TO made")

    async def warned() -> bool:
        return "tickets not pruned" in caplog.text

    async with written.writer() as writer:
        await written.wait_until(warned)
        assert writer.send(event(1))
    assert await written.paths() == ["/1"]
