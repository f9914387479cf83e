"""What the database refuses: records become letters, tables a hold that ends by itself."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.records import Records
from worker.observability.status import State

POISON = {
    "a check": "ALTER TABLE chunk_requests ADD CHECK (path <> '/bad')",
    "a trigger": """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN IF new.path = '/bad' THEN RAISE EXCEPTION 'no'; END IF; RETURN new; END$$;
        CREATE TRIGGER t BEFORE INSERT ON chunk_requests FOR EACH ROW EXECUTE FUNCTION refuse()
    """,
    "a deferred trigger": """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN IF new.path = '/bad' THEN RAISE EXCEPTION 'no'; END IF; RETURN new; END$$;
        CREATE CONSTRAINT TRIGGER t AFTER INSERT ON chunk_requests DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION refuse()
    """,
    "a shorter column": "ALTER TABLE chunk_requests ALTER uid TYPE varchar(2)",
    "an index on a long value": "CREATE INDEX ON chunk_requests (referer)",
}


@pytest.mark.parametrize("kind", POISON)
async def test_records_that_the_table_refuses_become_letters_and_the_others_rows(records: Records, kind: str) -> None:
    await records.world.sql.execute(POISON[kind])
    poison = {"path": "/bad", "uid": "long", "referer": "".join(chr(0x4E00 + i * 37 % 20000) for i in range(20_000))}
    for _ in range(3):
        await records.add(9, uid="u", referer=None)
        await records.add(1, **poison)
        records.paths.pop()
    async with records.carrier().running():
        await records.carried(letters=3)
    for letter in await records.letters():
        assert letter["error_class"] == "refused"
        assert letter["sqlstate"]
        assert b'"/bad"' in letter["payload"]


CHANGES = {
    "a renamed column": ("ALTER TABLE chunk_requests RENAME sid TO s", "ALTER TABLE chunk_requests RENAME s TO sid"),
    "a dropped table": ("ALTER TABLE chunk_requests RENAME TO gone", "ALTER TABLE gone RENAME TO chunk_requests"),
    "a new column without a default": (
        "ALTER TABLE chunk_requests ADD more int NOT NULL",
        "ALTER TABLE chunk_requests DROP more",
    ),
    "a new type": (
        "ALTER TABLE chunk_requests ALTER path TYPE bytea USING ''::bytea",
        "ALTER TABLE chunk_requests ALTER path TYPE text USING ''",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_table_that_does_not_fit_is_a_hold_that_ends_by_itself(records: Records, change: str) -> None:
    breaks, mends = CHANGES[change]
    await records.world.sql.execute(breaks)
    await records.add(20)
    carrier = records.carrier()
    async with carrier.running():
        await carrier.reaches(State.HOLD)
        await records.world.view("a", 3)
        await records.world.worker().cycle()  # the counters go on
        assert carrier.metric("stream_holds", stream=records.world.stream) == 1
        await records.world.sql.execute(mends)
        await records.carried()
        await carrier.reaches(State.OK)
    assert await records.world.totals() == records.world.truth


async def test_a_revoked_right_is_a_hold(records: Records) -> None:
    """The role of the test is a superuser: it acts as another one."""
    sql, role = records.world.sql, f"role_{records.world.stream[-6:-1]}"
    await sql.execute(f"CREATE ROLE {role}; GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    await sql.execute(f"REVOKE INSERT ON chunk_requests FROM {role}")
    database = await sql.fetchval("SELECT current_database()")
    await sql.execute(f"ALTER DATABASE {database} SET role = {role}")
    await records.add(5)
    carrier = records.carrier()
    async with carrier.running():
        assert "permission denied" in await carrier.reaches(State.HOLD)
        await sql.execute(f"GRANT INSERT ON chunk_requests TO {role}")
        await records.carried()
    await sql.execute(f"ALTER DATABASE {database} RESET role; DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_table_that_refuses_every_record_is_a_hold_after_a_thousand_letters(records: Records) -> None:
    await records.add(1500)
    records.paths.clear()
    await records.world.sql.execute("ALTER TABLE chunk_requests ADD CHECK (path = '')")
    carrier = records.carrier()
    async with carrier.running():
        assert "refuses every record" in await carrier.reaches(State.HOLD, timeout=60)
        written = len(await records.letters())
        assert 500 < written <= 1000
        await records.world.sql.execute("ALTER TABLE chunk_requests DROP CONSTRAINT chunk_requests_path_check")
        records.paths = [f"/{number}" for number in range(written, 1500)]
        await records.carried(letters=written)


STRANGE = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$BEGIN RAISE EXCEPTION 'strange' USING ERRCODE = 'ZZ999'; END$$;
    CREATE TRIGGER strange BEFORE INSERT ON chunk_requests EXECUTE FUNCTION refuse()
"""


async def test_an_unknown_error_is_shown_while_it_is_tried_again_and_then_is_a_hold(records: Records) -> None:
    await records.world.sql.execute(STRANGE)
    await records.add(3)
    carrier = records.carrier(CHUNKLOG_MAX_RETRIES="2", CHUNKLOG_RETRY_DELAY="500ms")
    async with carrier.running():
        assert "strange (SQLSTATE ZZ999)" in await carrier.reaches(State.FAILING)
        assert await records.letters() == []
        assert "strange" in await carrier.reaches(State.HOLD)
        assert carrier.metric("persistence_retry_total") == 2 * 3
        assert carrier.metric("persistence_retry_exhausted_total") == 3
        await records.world.sql.execute("DROP TRIGGER strange ON chunk_requests")
        await records.carried()


async def test_a_stop_does_not_wait_for_the_tries_after_an_unknown_error(records: Records) -> None:
    """The pauses between the tries ignored it: ten seconds each, with their defaults."""
    await records.world.sql.execute(STRANGE)
    await records.add(3)
    worker = records.start(CHUNKLOG_MAX_RETRIES="100", CHUNKLOG_RETRY_DELAY="100s")
    await worker.wait_for_log("pipeline interrupted")
    worker.terminate()
    assert await worker.wait(timeout=4) == 0


async def test_records_that_were_there_already_are_counted_apart(records: Records) -> None:
    await records.add(2, event_id="one")
    records.paths.pop()
    carrier = records.carrier()
    async with carrier.running():
        await records.carried()
    assert (carrier.metric("persistence_success_total"), carrier.metric("persistence_repeated_total")) == (1, 1)


async def test_a_bad_record_after_a_thousand_does_not_hold_up_good_ones(records: Records) -> None:
    await records.world.sql.execute("ALTER TABLE chunk_requests ADD CHECK (path <> '/bad')")
    await records.add(1000, path="/bad")
    records.paths.clear()
    async with records.carrier().running():
        await records.carried(letters=1000, timeout=60)
        await records.add(1, path="/bad")
        records.paths.clear()
        await records.add(3)
        await records.carried(letters=1001)


async def test_a_stream_of_another_type_is_a_hold(records: Records) -> None:
    await records.world.redis.set(records.world.stream, "text")
    carrier = records.carrier()
    async with carrier.running():
        assert "holds a string" in await carrier.reaches(State.HOLD)
        await records.world.redis.delete(records.world.stream)
        await records.add(3)
        await records.carried()


async def test_postgres_that_is_away_for_a_moment_costs_nothing(records: Records) -> None:
    await records.add(50)
    carrier = records.carrier()
    async with carrier.running():
        await records.carried()
        for _ in range(5):
            await records.add(500)
            await records.world.sql.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            await asyncio.sleep(0.1)
        await records.carried()
