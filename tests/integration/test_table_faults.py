"""Faults of the worker's own tables, and of single ids in them."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.limits import limit_statements
from tests.support.world import World
from worker.counters.flush.outcome import Flushed
from worker.errors import DatabaseUnavailable, TableRefused
from worker.observability.status import State

REFUSE_ALL = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'no'; END$$;
    CREATE TRIGGER t BEFORE INSERT ON {} FOR EACH ROW EXECUTE FUNCTION refuse()
"""
DEFERRED = REFUSE_ALL.replace("TRIGGER t BEFORE", "CONSTRAINT TRIGGER t AFTER").replace(
    "FOR EACH", "DEFERRABLE INITIALLY DEFERRED FOR EACH"
)


@pytest.mark.parametrize("ids", [["a"], ["a", "b", "c"]], ids=["one id", "three ids"])
@pytest.mark.parametrize(
    ("fault", "repair"),
    [
        ("ALTER TABLE view_counts ADD tenant text NOT NULL", "ALTER TABLE view_counts DROP tenant"),
        ("ALTER TABLE view_count_flushes ADD tenant text NOT NULL", "ALTER TABLE view_count_flushes DROP tenant"),
        ("ALTER TABLE view_counts ADD CONSTRAINT c CHECK (views < 0)", "ALTER TABLE view_counts DROP CONSTRAINT c"),
        (REFUSE_ALL.format("view_count_flushes"), "DROP TRIGGER t ON view_count_flushes"),
        (DEFERRED.format("view_counts"), "DROP TRIGGER t ON view_counts"),
    ],
    ids=["a column that must not be NULL", "the same in the ledger", "constraint", "trigger", "deferred trigger"],
)
async def test_table_that_refuses_every_id_fails_the_flush_and_quarantines_nobody(
    world: World, fault: str, repair: str, ids: list[str]
) -> None:
    worker = world.worker()
    await worker.cycle()
    await world.sql.execute(fault)
    await world.view_many(ids)
    for _ in range(2):
        with pytest.raises(TableRefused):
            await worker.cycle()
    assert worker.metric("view_count_quarantined_keys") == 0
    assert await world.pending() == world.truth
    await world.sql.execute(repair)
    await worker.cycle()
    await world.assert_exact()


async def test_flush_fails_where_a_trigger_leaves_out_or_changes_a_row(world: World) -> None:
    """The changes are matched to the ids by position."""
    worker = world.worker()
    await world.view_many(["a", "b", "c"])
    await worker.cycle()
    await world.view_many(["a", "b", "c"])
    for action in ("RETURN NULL;", "NEW.vod_id = 'z'; RETURN NEW;"):
        await world.sql.execute(
            f"""
            CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN IF NEW.vod_id = 'b' THEN {action} END IF; RETURN NEW; END $$;
            CREATE TRIGGER t BEFORE INSERT ON view_counts FOR EACH ROW EXECUTE FUNCTION meddle();
            """
        )
        with pytest.raises(TableRefused, match='"changes"'):
            await worker.cycle()
        assert await world.pending() == Counter(a=1, b=1, c=1)
        await world.sql.execute("DROP FUNCTION meddle CASCADE")
    await worker.cycle()
    await world.assert_exact()


async def test_source_row_lost_beside_its_flushes_quarantines_nobody(world: World) -> None:
    await world.view("a")
    await world.worker().cycle()
    await world.sql.execute("DELETE FROM view_count_sources")
    await world.redis.delete(world.keys.marker)
    await world.view_many(["a", "b"])
    worker = world.worker()
    with pytest.raises(TableRefused, match="view_count_flushes_pkey"):
        await worker.cycle()
    assert worker.metric("view_count_quarantined_keys") == 0
    await worker.counters.loop._guarded_cycle()
    assert worker.status.checks["view_counts"].state is State.FAILING
    assert "view_count_flushes_pkey" in worker.status.checks["view_counts"].cause


async def test_single_id_that_a_constraint_refuses_is_quarantined_although_it_is_alone(world: World) -> None:
    """Only ids that the application knows are allowed, so an id that nobody uses is refused, too."""
    worker = world.worker()
    await world.view("known")
    await worker.cycle()
    await world.sql.execute("CREATE TABLE video (id text PRIMARY KEY); INSERT INTO video VALUES ('known')")
    await world.sql.execute("ALTER TABLE view_counts ADD FOREIGN KEY (vod_id) REFERENCES video")
    await world.redis.incr(world.prefix + "unknown")
    assert await worker.cycle() == Flushed()
    assert list(worker.counters.backlog.quarantine.listed()) == [world.prefix + "unknown"]
    assert await world.totals() == world.truth
    await world.view("known")
    assert await worker.cycle() == Flushed(flush_id=2, keys=1, views=1)
    await world.assert_consistent()


async def test_overflow_of_every_id_of_a_flush_is_the_ids_fault(world: World) -> None:
    worker = world.worker(BATCH_SIZE="2")
    largest = str(2**63 - 1)
    for vod_id in ("a", "b"):
        await world.redis.set(world.prefix + vod_id, largest)
    await worker.cycle()
    for vod_id in ("a", "b"):
        await world.redis.set(world.prefix + vod_id, largest)
    await worker.cycle()
    assert worker.metric("view_count_quarantined_keys") == 2
    await world.view("c")
    assert await worker.cycle() == Flushed(flush_id=2, keys=1, views=1)


SLOW = """
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
        $$BEGIN IF {} THEN PERFORM pg_sleep({}); END IF; RETURN new; END$$;
    CREATE TRIGGER t BEFORE INSERT ON view_counts FOR EACH ROW EXECUTE FUNCTION slow()
"""


async def test_flush_that_times_out_is_halved_until_it_does_not(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_statements(monkeypatch, "500ms")
    await world.sql.execute(SLOW.format("true", 0.05))
    worker = world.worker(BATCH_SIZE="16")
    await world.view_many([f"vod_{number}" for number in range(16)])
    await worker.cycle()
    await world.assert_exact()
    assert worker.counters.flusher.batch_size.keys <= 8


async def test_id_that_times_out_alone_is_quarantined(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_statements(monkeypatch, "700ms")
    await world.sql.execute(SLOW.format("new.vod_id = 'b'", 3))
    worker = world.worker()
    await world.view_many(["a", "c"])
    await world.redis.incr(world.prefix + "b")
    for _ in range(2):
        await worker.cycle()
    assert await world.totals() == Counter(a=1, c=1)
    assert "57014" in worker.counters.backlog.quarantine.listed()[world.prefix + "b"]


async def test_nobody_is_quarantined_while_every_flush_times_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_statements(monkeypatch, "100ms")
    await world.sql.execute(SLOW.format("true", 1))
    worker = world.worker()
    await world.view_many(["a", "b"])
    with pytest.raises(DatabaseUnavailable, match="57014"):
        await worker.cycle()
    assert worker.metric("view_count_quarantined_keys") == 0
    assert await world.pending() == world.truth
