"""A missing marker: how the evidence is judged, on real servers that are emptied, restarted and restored."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.test_flush import committed_but_not_settled
from tests.support.world import SYNCHRONISE_AT_ONCE, World
from worker.counters.flush.agreement import ANOTHER_REDIS
from worker.counters.flush.outcome import Flushed
from worker.counters.flush.recovery import CREATE_MARKER, Recovery
from worker.counters.flush.verdict import Hold
from worker.dev.servers import ValkeyServer
from worker.errors import DatabaseUnavailable


async def test_marker_is_recreated_after_flushall_and_each_view_counts_once(
    valkey: ValkeyServer, database_url: str
) -> None:
    async with World(valkey.url, database_url) as world:
        worker = world.worker()
        await world.view("a", 5)
        await worker.cycle()
        await world.redis.flushall()
        await world.view("a", 2)
        await worker.cycle()
        await world.assert_exact()
        assert worker.metric("view_count_marker_losses_total") == 1


async def test_last_flush_is_not_subtracted_from_views_after_flushall(valkey: ValkeyServer, database_url: str) -> None:
    """The end of a cycle confirms its last settle, so there is nothing left to replay on the new data."""
    async with World(valkey.url, database_url) as world:
        await world.view("a", 100)
        await world.worker().cycle()
        source = await world.source()
        assert source["settled_id"] == source["last_flush_id"] == 1
        await world.redis.flushall()
        await world.view("a", 30)
        await world.worker().cycle()
        await world.assert_exact()


async def test_marker_deleted_between_commit_and_settle_counts_the_flush_once(world: World) -> None:
    await world.view("a", 5)
    await world.worker().cycle()
    await world.view("a", 7)
    await committed_but_not_settled(world, world.worker())
    await world.redis.delete(world.keys.marker)
    await world.view("a", 1)
    await world.worker().cycle()
    await world.assert_exact()


async def test_marker_deleted_after_an_unconfirmed_settle_never_counts_a_view_twice(world: World) -> None:
    """The one case in which a flush may be missing: it was settled, and the settle was not confirmed."""
    worker = world.worker()
    await world.view("a", 5)
    await world.view("b", 1)
    await worker.cycle()
    await world.sql.execute("UPDATE view_count_sources SET settled_id = 0")
    await world.redis.delete(world.keys.marker)
    await world.view("a", 2)
    await worker.cycle()
    assert await world.totals() == Counter(a=5, b=1)
    await world.assert_consistent()


async def test_marker_is_recreated_after_redis_restarted_empty(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        await world.view("a", 5)
        worker = world.worker()
        await worker.cycle()
        valkey.kill()
        shutil.rmtree(valkey.folder)
        valkey.folder.mkdir()
        await world.restart_redis(valkey)
        await world.view("a", 2)
        await worker.cycle()
        await world.assert_exact()
        assert worker.metric("view_count_marker_losses_total") == 1


async def test_restarted_redis_is_recognised_after_a_flush_of_nothing(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        await world.view("a", 5)
        worker = world.worker()
        await worker.cycle()
        valkey.stop()
        await world.restart_redis(valkey)
        await worker.cycle()  # it only compares both sides
        await world.redis.delete(world.keys.marker)
        await world.view("a", 2)
        assert await worker.cycle() == Flushed(flush_id=2, keys=1, views=2)
        await world.assert_exact()


async def test_writable_replica_is_not_taken_for_its_master(
    valkey: ValkeyServer, servers_folder: Path, database_url: str
) -> None:
    """It reports its master's `master_replid`, but counters and markers that were written to it are its own."""
    replica = ValkeyServer(servers_folder / "writable-replica", options=("--replica-read-only", "no"))
    replica.start()
    try:
        async with (
            World(valkey.url, database_url) as world,
            World(replica.url, database_url, prefix=world.prefix) as copy,
        ):
            await world.view("a", 5)
            await copy.redis.replicaof("127.0.0.1", str(valkey.port))  # type: ignore[no-untyped-call]
            while (await copy.redis.info("replication")).get("master_link_status") != "up":
                await copy.redis.ping()
            await world.worker().cycle()
            await copy.redis.set(copy.prefix + "a", 5)  # counted already
            await copy.redis.delete(copy.keys.marker)
            await world.five_minutes_later()
            assert isinstance(await copy.worker().cycle(), Hold)
            await world.view("a", 2)
            await world.worker().cycle()
            await world.assert_exact()
    finally:
        replica.kill()


def copy_of(valkey: ValkeyServer, name: str) -> Path:
    valkey.stop()
    copy = valkey.folder.with_name(f"{valkey.folder.name}-{name}")
    shutil.copytree(valkey.folder, copy)
    valkey.start()
    return copy


def put_in_place(valkey: ValkeyServer, copy: Path) -> None:
    valkey.kill()
    shutil.rmtree(valkey.folder)
    copy.rename(valkey.folder)


@pytest.mark.parametrize(
    "valkey", [(), ("--aof-use-rdb-preamble", "no")], ids=["default", "no preamble"], indirect=True
)
async def test_copy_from_before_the_first_run_with_pending_views_is_a_hold(
    valkey: ValkeyServer, database_url: str
) -> None:
    """An AOF restart reports no loaded keys, like an empty start; only the base of the AOF distinguishes them."""
    async with World(valkey.url, database_url) as world:
        await world.view("a", 5)
        before = copy_of(valkey, "before")
        await world.redis.connection_pool.disconnect()
        await world.worker().cycle()
        put_in_place(valkey, before)
        await world.restart_redis(valkey)
        await world.five_minutes_later()
        outcome = await world.worker().cycle()
        assert isinstance(outcome, Hold)
        assert outcome.cause.startswith("the marker is missing in Redis, and Postgres has 1 flushes")
        assert await world.totals() == Counter(a=5)


async def test_another_numbered_database_of_the_same_redis_is_a_hold(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        await world.view("a", 5)
        valkey.kill()
        await world.restart_redis(valkey)
        await world.worker().cycle()
        async with World(f"{valkey.url}/1", database_url, prefix=world.prefix) as other:
            await other.redis.incrby(world.prefix + "a", 100)
            await world.five_minutes_later()
            assert isinstance(await other.worker().cycle(), Hold)
        await world.view("a", 2)
        await world.worker().cycle()
        await world.assert_exact()


async def test_marker_is_recreated_on_a_copy_without_pending_views(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        await world.redis.set("something else", 1)
        before = copy_of(valkey, "before")
        await world.redis.connection_pool.disconnect()
        await world.view("a", 5)
        await world.worker().cycle()
        put_in_place(valkey, before)
        await world.restart_redis(valkey)
        await world.five_minutes_later()
        assert await world.worker().cycle() == Flushed()
        await world.view("a", 2)
        await world.worker().cycle()
        await world.assert_exact()


async def test_with_fresh_any_lost_marker_is_recreated(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        await world.view("a", 5)
        await world.worker().cycle()
        await world.view("b", 1)
        await world.redis.delete(world.keys.marker)
        valkey.stop()
        await world.restart_redis(valkey)
        await world.five_minutes_later()
        assert isinstance(await world.worker().cycle(), Hold)
        assert await world.worker(VIEW_ON_LOST_MARKER="fresh").cycle() == Flushed(flush_id=2, keys=1, views=1)
        await world.assert_exact()


@pytest.mark.parametrize("moment", ["before the lineage is created", "before the marker is created"])
async def test_marker_is_not_created_on_a_copy_that_was_restored_after_the_evidence_was_judged(
    valkey: ValkeyServer, database_url: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis is judged to be empty; then an old copy replaces it, with views that are already counted."""
    async with World(valkey.url, database_url) as world:
        await world.view("a", 5)
        old = copy_of(valkey, "old")
        await world.redis.connection_pool.disconnect()
        await world.worker().cycle()
        await world.redis.flushall()
        worker = world.worker()
        run = worker.redis.run

        async def restore_copy() -> None:
            if old.exists():
                put_in_place(valkey, old)
                await world.restart_redis(valkey)
                await worker.redis.close()

        async def before_creation(script: object, *rest: object) -> object:
            if script is CREATE_MARKER and moment == "before the marker is created":
                await restore_copy()
            return await run(script, *rest)  # type: ignore[arg-type]

        async def after_the_evidence(self: Recovery, *rest: object) -> object:
            found = await evidence(self, *rest)  # type: ignore[arg-type]
            if moment == "before the lineage is created":
                await restore_copy()
            return found

        evidence = Recovery.evidence
        worker.redis.run = before_creation  # type: ignore[method-assign]
        monkeypatch.setattr(Recovery, "evidence", after_the_evidence)
        outcome = await worker.cycle()
        assert isinstance(outcome, Hold)
        assert await world.totals() == Counter(a=5)
        assert await world.pending() == Counter(a=5)


async def test_second_database_does_not_take_over_after_flushall(
    world: World, empty_database_url: str, redis_url: str
) -> None:
    from worker.db import schema

    await world.view("a", 5)
    await world.worker().cycle()
    wrong = World(redis_url, empty_database_url, prefix=world.prefix)
    async with wrong:
        stranger = wrong.worker()
        await schema.upgrade(stranger.database)
        assert isinstance(await stranger.cycle(), Hold)
        await world.redis.delete(world.keys.marker)  # as FLUSHALL does
        await world.view("a", 2)
        outcome = await stranger.cycle()
        assert isinstance(outcome, Hold)
        assert outcome.cause.startswith("this database refused a marker before")
        assert await wrong.totals() == Counter()
        await world.worker().cycle()
        await world.assert_exact()


async def test_database_restored_to_an_older_state_is_a_hold_that_names_what_is_missing(world: World) -> None:
    worker = world.worker()
    await world.view("a", 5)
    await worker.cycle()
    older = await world.source()
    for _ in range(3):
        await world.view("a")
        await worker.cycle()
    await world.sql.execute("DELETE FROM view_count_flushes WHERE flush_id > 1")
    await world.sql.execute(
        "UPDATE view_count_sources SET last_flush_id = $1, last_nonce = $2, settled_id = $3, rolled_up_id = $1",
        older["last_flush_id"],
        older["last_nonce"],
        older["settled_id"],
    )
    outcome = await worker.cycle()
    assert isinstance(outcome, Hold)
    assert outcome.cause.startswith("Postgres lacks 3 flushes")


async def test_retention_keeps_what_a_marker_may_need(world: World) -> None:
    worker = world.worker(VIEW_LEDGER_RETENTION="1d")
    for _ in range(5):
        await world.view("a")
        await worker.cycle()
    await world.sql.execute("UPDATE view_count_flushes SET flushed_at = flushed_at - interval '2 days'")
    await world.sql.execute("UPDATE view_count_sources SET settled_id = 4")
    assert await worker.counters.retention.prune() == 3  # flush 5 may not be settled, and 4 is its predecessor
    left = await world.sql.fetch("SELECT flush_id FROM view_count_flushes ORDER BY 1")
    assert [row["flush_id"] for row in left] == [4, 5]
    assert await world.sql.fetchval("SELECT count(*) FROM view_count_deltas") == 2
    assert await worker.counters.retention.prune() == 0


async def test_retention_keeps_recent_flushes(world: World) -> None:
    worker = world.worker()
    for _ in range(3):
        await world.view("a")
        await worker.cycle()
    assert await worker.counters.retention.prune() == 0


async def test_snapshot_older_than_the_ledger_is_a_hold(world: World) -> None:
    worker = world.worker(VIEW_LEDGER_RETENTION="1d")
    await worker.cycle()
    first_marker = await world.marker()
    assert first_marker is not None
    for _ in range(5):
        await world.view("a")
        await worker.cycle()
    await world.sql.execute("UPDATE view_count_flushes SET flushed_at = flushed_at - interval '2 days'")
    assert await worker.counters.retention.prune() == 4
    await world.redis.set(world.keys.marker, first_marker.encode())
    outcome = await worker.cycle()
    assert isinstance(outcome, Hold)
    assert outcome.cause.startswith("flush 1 is no longer complete in the ledger")


@pytest.mark.parametrize("number", [1, 3])
async def test_total_that_would_overflow_stays_pending_and_does_not_block_others(world: World, number: int) -> None:
    for index in range(number):
        await world.view(f"full_{index}", 2**63 - 1)
    worker = world.worker()
    await worker.cycle()
    await world.assert_exact()
    for index in range(number):
        await world.redis.incr(f"{world.prefix}full_{index}")
    await world.view("other", 3)
    assert await worker.cycle() == Flushed(flush_id=2, keys=1, views=3)
    assert await world.totals() == world.truth
    assert worker.metric("view_count_quarantined_keys") == number
    await world.assert_consistent()


@pytest.mark.parametrize("constraint", ["CHECK (vod_id <> 'bad')", "trigger"])
async def test_id_that_postgres_refuses_does_not_block_others(world: World, constraint: str) -> None:
    if constraint == "trigger":
        await world.sql.execute(
            """
            CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN IF new.vod_id = 'bad' THEN RAISE 'no'; END IF; RETURN new; END $$;
            CREATE TRIGGER no BEFORE INSERT ON view_counts FOR EACH ROW EXECUTE FUNCTION no()
            """
        )
    else:
        await world.sql.execute(f"ALTER TABLE view_counts ADD {constraint}")
    await world.view_many([f"good_{number}" for number in range(20)])
    await world.redis.incr(world.prefix + "bad")
    worker = world.worker()
    for _ in range(2):
        await worker.cycle()
        assert await world.totals() == world.truth
        assert await world.pending() == Counter(bad=1)
        assert worker.metric("view_count_quarantined_keys") == 1
    await world.assert_consistent()


@pytest.mark.usefixtures("brief_locks")
async def test_locked_row_stays_pending_and_does_not_block_others(world: World) -> None:
    worker = world.worker()
    await world.view_many(["a", "b"])
    await worker.cycle()
    await world.view_many(["a", "b"])
    async with world.sql.transaction():
        await world.sql.execute("SELECT * FROM view_counts WHERE vod_id = 'b' FOR UPDATE")
        await worker.cycle()
        assert await world.pending() == Counter(b=1)
    await worker.cycle()
    await world.assert_exact()


@pytest.mark.usefixtures("brief_locks")
async def test_locked_table_is_not_waited_for_once_per_id(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.counters.flush.flusher.HOLDUP_LIMIT_S", 0.2)
    worker = world.worker()
    await worker.cycle()
    await world.view_many(["a", "b", "c", "d"])
    async with world.sql.transaction():
        await world.sql.execute("LOCK TABLE view_counts IN SHARE MODE")
        with pytest.raises(DatabaseUnavailable):
            await worker.cycle()
    await worker.cycle()
    await world.assert_exact()


async def test_two_redis_servers_do_not_share_a_lineage(
    valkey: ValkeyServer, redis_url: str, database_url: str
) -> None:
    """A worker ran on an empty Redis by mistake; its flushes must not be settled in the right one."""
    async with World(redis_url, database_url) as wrong, World(valkey.url, database_url, prefix=wrong.prefix) as right:
        assert await wrong.worker().cycle() == Flushed()
        await wrong.five_minutes_later()
        assert await right.worker().cycle() == Flushed()
        await right.view("v", 10)
        await right.worker().cycle()
        await wrong.redis.incrby(wrong.prefix + "v", 7)
        assert await wrong.worker().cycle() == ANOTHER_REDIS
        await right.assert_exact()


async def test_two_prefixes_do_not_share_a_lineage(redis_url: str, database_url: str) -> None:
    async with World(redis_url, database_url) as one, World(redis_url, database_url) as other:
        await one.worker().cycle()
        await one.five_minutes_later()
        await other.worker().cycle()
        await one.view("v", 7)
        await other.view("v", 10)
        await other.worker().cycle()
        assert await one.worker().cycle() == ANOTHER_REDIS
        await other.assert_exact()
        assert await one.pending() == one.truth


async def test_server_that_was_demoted_synchronised_and_promoted_is_another_data_set(
    valkey: ValkeyServer, servers_folder: Path, database_url: str
) -> None:
    """It keeps its run_id but has the other server's data; only its `master_replid` shows that."""
    other = ValkeyServer(servers_folder / "other-redis", options=SYNCHRONISE_AT_ONCE)
    other.start()
    try:
        async with (
            World(valkey.url, database_url) as world,
            World(other.url, database_url, prefix=world.prefix) as copy,
        ):
            await world.view("a", 5)
            await world.worker().cycle()
            await copy.redis.incrby(copy.prefix + "a", 5)  # views that are counted already, without a marker
            run_id = (await world.redis.info("server"))["run_id"]
            await world.redis.replicaof("127.0.0.1", str(other.port))  # type: ignore[no-untyped-call]
            while (await world.redis.info("replication")).get("master_link_status") != "up":
                await world.redis.ping()
            await world.redis.replicaof("NO", "ONE")  # type: ignore[no-untyped-call]
            await world.five_minutes_later()
            assert (await world.redis.info("server"))["run_id"] == run_id
            assert isinstance(await world.worker().cycle(), Hold)
            assert await world.totals() == Counter(a=5)
    finally:
        other.kill()


@pytest.mark.parametrize("policy", ["noeviction", "volatile-lru", "volatile-ttl"])
async def test_first_start_at_maxmemory_flushes(valkey: ValkeyServer, database_url: str, policy: str) -> None:
    async with World(valkey.url, database_url) as world:
        await world.view_many([f"vod_{number}" for number in range(100)])
        await world.redis.config_set("maxmemory-policy", policy)
        await world.redis.config_set("maxmemory", "1mb")
        await world.worker().cycle()
        await world.assert_exact()


async def test_worker_that_is_cut_off_from_redis_does_not_take_the_row_lock(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.db.counters.source_row import SourceRow
    from worker.errors import RedisUnavailable

    worker = world.worker()
    await worker.cycle()
    locked: list[bool] = []
    lock = SourceRow.lock

    async def record_lock(self: SourceRow, *args: object, **kwargs: bool) -> object:
        locked.append(True)
        return await lock(self, *args, **kwargs)  # type: ignore[arg-type]

    async def no_answer() -> str:
        raise RedisUnavailable("no answer in time")

    monkeypatch.setattr(SourceRow, "lock", record_lock)
    worker.redis.probe = no_answer  # type: ignore[method-assign]
    with pytest.raises(RedisUnavailable):
        await worker.cycle()
    assert locked == []


async def test_row_lock_that_another_session_keeps_is_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.counters.loop.BUSY_LIMIT_S", 0.0)
    worker = world.worker()
    await worker.cycle()
    async with world.sql.transaction():
        await world.sql.execute("SELECT * FROM view_count_sources FOR UPDATE")
        for _ in range(2):
            await worker.counters.loop._guarded_cycle()
        assert worker.status.checks["view_counts"].cause.startswith("another session keeps the row")
    await worker.counters.loop._guarded_cycle()
    assert worker.status.is_ok("view_counts")


async def test_connections_that_the_server_closed_are_replaced(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        worker = world.worker()
        for _ in range(3):
            await world.view("a")
            await worker.cycle()
            await world.redis.client_kill_filter(_type="normal", skipme=True)  # type: ignore[no-untyped-call]
        await world.assert_exact()
