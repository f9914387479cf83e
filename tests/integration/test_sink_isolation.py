"""Any records of a batch may be bad: each becomes a row, a letter, or is dropped, in the ticket's transaction."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import uuid4

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.written import WrittenRecords, event
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.db.tickets import Ticket
from worker.db.upsert import RecordTable
from worker.errors import UnknownFailure
from worker.pipelines.model import Batch, Item, Letter, NotClaimed, Written
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS
from worker.pipelines.sink import PostgresSink

NOW = datetime.now(UTC)
# The path of a record says what the database makes of it.
DATABASE = """
    ALTER TABLE chunk_requests ADD CHECK (path NOT LIKE '/refused%');
    CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
        $$BEGIN RAISE EXCEPTION 'strange' USING ERRCODE = 'ZZ999'; END$$;
    CREATE TRIGGER strange BEFORE INSERT ON chunk_requests FOR EACH ROW
        WHEN (new.path LIKE '/strange%' OR new.path LIKE '/unkeepable%') EXECUTE FUNCTION fail();
    CREATE TRIGGER strange BEFORE INSERT ON dead_letters FOR EACH ROW
        WHEN (new.payload LIKE '/unkeepable%') EXECUTE FUNCTION fail();
"""
KINDS = ("good", "good", "good", "refused", "strange", "unkeepable", "letter", "unkeepable letter")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=40))
async def test_each_record_of_a_batch_ends_in_one_place(written: WrittenRecords, kinds: list[str]) -> None:
    if not await written.sql.fetchval("SELECT true FROM pg_proc WHERE proname = 'fail'"):
        await written.sql.execute(DATABASE)
    await written.sql.execute("TRUNCATE chunk_requests, dead_letters, ingest_batches")
    database = Database(parse_database_url(written.url), pool_size=1)
    sink = PostgresSink(database, CHUNK_REQUESTS, RecordTable(CHUNK_REQUESTS))
    numbered = [(number, f"/{kind} {number}") for number, kind in enumerate(kinds)]
    ticket = Ticket(uuid4(), "chunk_requests")
    batch = Batch(
        ticket,
        str(ticket.id),
        [Item(number, path.encode(), event(path[1:], time=NOW)) for number, path in numbered if "letter" not in path],
        [
            Letter(f"{ticket.id}/{number}", "not_json", "text", path.encode())
            for number, path in numbered
            if "letter" in path
        ],
    )
    try:
        fails = any(kind.startswith(("strange", "unkeepable")) for kind in kinds)
        try:
            outcome = await sink.write(batch)
        except UnknownFailure:
            assert fails
            assert await written.tickets() == 0
            outcome = await sink.write(batch, isolate=True)
        else:
            assert not fails
        assert await sink.write(batch, isolate=fails) == NotClaimed()
    finally:
        await database.close()
    rows = [path for _, path in numbered if path.startswith("/good")]
    letters = {number: path for number, path in numbered if path.startswith(("/refused", "/strange", "/letter"))}
    assert outcome == Written(len(rows), len(letters), dropped=len(kinds) - len(rows) - len(letters))
    assert await written.paths() == sorted(rows)
    found = {letter["origin"]: letter["payload"].decode() for letter in await written.letters()}
    assert found == {f"{ticket.id}/{number}": path for number, path in letters.items()}
    assert await written.tickets() == 1
