"""Flush, settle, replay, on a real Redis and a real Postgres."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections import Counter
from typing import Any

import asyncpg
import pytest

from tests.support.fakes import FakeClock
from tests.support.world import InProcessWorker, World
from worker.contract.keys import NOT_A_COUNT
from worker.counters.flush.commit import Committed
from worker.counters.flush.flusher import Flusher
from worker.counters.flush.marker import Marker
from worker.counters.flush.outcome import Busy, Flushed
from worker.counters.flush.settle import SETTLE
from worker.counters.flush.verdict import Hold
from worker.dev.servers import ValkeyServer
from worker.errors import DatabaseUnavailable, RedisUnavailable
from worker.observability.status import SERVERS


async def test_views_reach_postgres_and_leave_redis(world: World) -> None:
    await world.view("vod_1", 3)
    await world.view("vod_2")
    outcome = await world.worker().cycle()
    assert outcome == Flushed(flush_id=1, keys=2, views=4)
    await world.assert_exact()


async def test_totals_grow_over_many_flushes(world: World) -> None:
    worker = world.worker(BATCH_SIZE="7")
    rng = random.Random(1)
    for _ in range(5):
        await world.view_many([f"vod_{rng.randrange(30)}" for _ in range(200)])
        await worker.cycle()
    await world.assert_exact()
    assert worker.metric("view_count_flushed_views_total") == 1000
    assert worker.metric("view_count_pending_keys") == 0


async def test_first_run_creates_the_marker_even_without_views(world: World) -> None:
    assert await world.worker().cycle() == Flushed()
    marker, source = await world.marker(), await world.source()
    assert marker == Marker(source["lineage"], 0, source["last_nonce"])


async def test_cycle_without_pending_views_writes_nothing(world: World) -> None:
    worker = world.worker()
    await world.view("vod_1")
    await worker.cycle()
    await worker.cycle()
    assert (await world.source())["last_flush_id"] == 1


async def test_zero_counters_are_left_alone(world: World) -> None:
    await world.redis.set(world.prefix + "zero", "0")
    assert await world.worker().cycle() == Flushed()
    assert await world.redis.get(world.prefix + "zero") == b"0"


async def test_views_that_arrive_during_a_flush_stay_pending(world: World) -> None:
    worker = world.worker()
    await world.view("vod_1", 5)
    settle = worker.counters.flusher.settler.settle

    async def add_views_then_settle(*args: Any, **kwargs: Any) -> bool:
        await world.view("vod_1", 2)
        return await settle(*args, **kwargs)

    worker.counters.flusher.settler.settle = add_views_then_settle  # type: ignore[method-assign]
    await worker.cycle()
    assert await world.totals() == Counter(vod_1=5)
    assert await world.pending() == Counter(vod_1=2)
    worker.counters.flusher.settler.settle = settle  # type: ignore[method-assign]
    await worker.cycle()
    await world.assert_exact()


async def test_error_before_commit_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = world.worker()
    await world.view("vod_1", 5)
    await worker.cycle()
    await world.view("vod_1", 2)

    async def record_then_fail(self: Any, *args: Any) -> None:
        await original(self, *args)
        raise DatabaseUnavailable("gone before COMMIT")

    from worker.db.counters.ledger import Ledger

    original = Ledger.record
    monkeypatch.setattr(Ledger, "record", record_then_fail)
    with pytest.raises(DatabaseUnavailable):
        await worker.cycle()
    assert (await world.source())["last_flush_id"] == 1
    assert await world.pending() == Counter(vod_1=2)
    monkeypatch.undo()
    await world.worker().cycle()
    await world.assert_exact()


async def committed_but_not_settled(world: World, worker: InProcessWorker) -> None:
    """Leave one flush that is committed in Postgres and not settled in Redis."""

    async def no_reply(*_: Any, **__: Any) -> bool:
        raise RedisUnavailable("gone before settle")

    settle = worker.counters.flusher.settler.settle
    worker.counters.flusher.settler.settle = no_reply  # type: ignore[method-assign]
    with pytest.raises(RedisUnavailable):
        await worker.cycle()
    worker.counters.flusher.settler.settle = settle  # type: ignore[method-assign]


async def test_crash_between_commit_and_settle_is_replayed_by_the_next_worker(world: World) -> None:
    await world.view("vod_1", 5)
    await world.view("vod_2", 1)
    await committed_but_not_settled(world, world.worker())
    assert await world.totals() == world.truth
    assert await world.pending() == world.truth

    await world.view("vod_1", 2)
    successor = world.worker()
    await successor.cycle()
    await world.assert_exact()
    assert successor.metric("view_count_settle_replays_total") == 1


async def test_lost_settle_reply_is_harmless(world: World) -> None:
    worker = world.worker()
    await world.view("vod_1", 5)
    settle = worker.counters.flusher.settler.settle

    async def reply_is_lost(*args: Any, **kwargs: Any) -> bool:
        await settle(*args, **kwargs)
        raise RedisUnavailable("no answer in time")

    worker.counters.flusher.settler.settle = reply_is_lost  # type: ignore[method-assign]
    with pytest.raises(RedisUnavailable):
        await worker.cycle()
    worker.counters.flusher.settler.settle = settle  # type: ignore[method-assign]
    await world.view("vod_1", 1)
    await worker.cycle()
    await world.assert_exact()
    assert worker.metric("view_count_settle_replays_total") == 0


async def test_settling_twice_subtracts_once(world: World) -> None:
    worker = world.worker()
    await worker.cycle()
    before = await world.marker()
    assert before is not None
    await world.view("vod_1", 10)
    after = Marker(before.lineage, 1, before.nonce)
    for _ in range(2):
        assert await worker.counters.flusher.settler.settle(before, after, {"vod_1": 4})
    assert await world.pending() == Counter(vod_1=6)


async def test_flush_number_that_a_database_used_twice_is_detected(world: World) -> None:
    """The database loses a commit and reuses its number; then the settle of the lost commit arrives late."""
    worker = world.worker()
    await worker.cycle()
    first_marker = await world.marker()
    assert first_marker is not None
    await world.view("a", 5)
    await world.redis.set(world.prefix + "b", 3)
    lost = await worker.counters.flusher.committer.commit(["a"])
    assert isinstance(lost, Committed)
    await world.sql.execute("DELETE FROM view_counts; DELETE FROM view_count_flushes; DELETE FROM view_counts_hourly")
    await world.sql.execute("UPDATE view_count_sources SET last_flush_id = 0, last_nonce = $1", first_marker.nonce)
    again = await worker.counters.flusher.committer.commit(["b"])
    assert isinstance(again, Committed)
    settler = worker.counters.flusher.settler
    assert await settler.settle(lost.before, lost.marker, lost.flush.counted)
    assert not await settler.settle(again.before, again.marker, again.flush.counted)
    outcome = await worker.cycle()
    assert isinstance(outcome, Hold)
    assert outcome.cause == "Redis settled another flush 1 than the one in Postgres"
    assert await world.totals() == Counter(b=3)


async def test_redis_restored_from_an_older_snapshot_is_replayed(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        worker = world.worker(BATCH_SIZE="2")
        await world.view_many(["a", "b", "c", "d", "e"] * 3)
        await worker.cycle()
        await world.view_many(["a", "b", "c"])
        older = valkey.folder.with_name(valkey.folder.name + "-older")
        valkey.stop()
        shutil.copytree(valkey.folder, older)
        await world.restart_redis(valkey)
        await world.worker(BATCH_SIZE="2").cycle()
        await world.assert_exact()

        valkey.stop()
        shutil.rmtree(valkey.folder)
        older.rename(valkey.folder)
        await world.restart_redis(valkey)
        assert await world.pending() == Counter(a=1, b=1, c=1)  # already settled, but this Redis has the older state
        successor = world.worker()
        await world.view("a")
        await successor.cycle()
        await world.assert_exact()
        assert successor.metric("view_count_settle_replays_total") == 2


async def test_two_workers_at_once_count_each_view_once(world: World) -> None:
    workers = [world.worker(BATCH_SIZE="5"), world.worker(BATCH_SIZE="5")]
    rng = random.Random(2)
    done = asyncio.Event()

    async def work(worker: InProcessWorker) -> None:
        while not done.is_set():
            await worker.cycle_until_done()

    tasks = [asyncio.create_task(work(worker)) for worker in workers]
    for _ in range(100):
        await world.view_many([f"vod_{rng.randrange(40)}" for _ in range(50)])
        totals = await world.totals()
        assert totals <= world.truth
    done.set()
    await asyncio.gather(*tasks)
    await workers[0].cycle_until_done()
    await world.assert_exact()
    assert all(worker.metric("view_count_flushes_total") > 0 for worker in workers)


async def test_two_workers_that_start_at_once_create_one_lineage(world: World) -> None:
    await world.view("vod_1")
    await asyncio.gather(world.worker().cycle_until_done(), world.worker().cycle_until_done())
    await world.assert_exact()


async def test_worker_does_not_wait_while_another_has_the_source_row_locked(world: World) -> None:
    worker = world.worker()
    await worker.cycle()
    await world.view("vod_1")
    async with world.sql.transaction():
        await world.sql.execute("SELECT * FROM view_count_sources FOR UPDATE")
        assert await worker.counters.loop.cycle() == Busy()
    worker.counters.loop.sweep_soon()
    assert await worker.counters.loop.cycle() == Flushed(flush_id=1, keys=1, views=1)


async def test_reader_that_reads_redis_first_never_sees_too_few_views(world: World) -> None:
    worker = world.worker(BATCH_SIZE="3")
    await worker.cycle()
    done = asyncio.Event()

    async def work() -> None:
        while not done.is_set():
            await worker.cycle()

    task = asyncio.create_task(work())
    for _ in range(150):
        await world.view_many(["a", "b", "c", "d"])
        shown = await world.pending()
        shown += await world.totals()
        assert shown >= world.truth
    done.set()
    await task
    await worker.cycle()
    await world.assert_exact()


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        ("garbage", "the marker in Redis cannot be read"),
        ("foreign", "the marker in Redis belongs to another database"),
        ("ahead", "Postgres lacks 4 flushes that Redis has settled"),
        ("unknown nonce", "Redis settled another flush 1 than the one in Postgres"),
        ("pruned ledger", "flush 1 is no longer complete in the ledger"),
        ("wrong predecessor", "Redis settled another flush 0 than the one before 1"),
    ],
)
async def test_marker_that_does_not_match_is_a_hold(world: World, damage: str, cause: str) -> None:
    worker = world.worker()
    await worker.cycle()
    first_marker = await world.marker()
    await world.view("vod_1", 5)
    await worker.cycle()
    marker = await world.marker()
    assert marker is not None
    assert first_marker is not None
    match damage:
        case "garbage":
            await world.redis.set(world.keys.marker, "garbage")
        case "foreign":
            await world.redis.set(world.keys.marker, Marker(marker.nonce, 1, marker.nonce).encode())
        case "ahead":
            await world.redis.set(world.keys.marker, Marker(marker.lineage, 5, marker.nonce).encode())
        case "unknown nonce":
            await world.redis.set(world.keys.marker, Marker(marker.lineage, 1, marker.lineage).encode())
        case "pruned ledger":
            await world.redis.set(world.keys.marker, first_marker.encode())
            await world.sql.execute("DELETE FROM view_count_flushes")
        case "wrong predecessor":
            await world.redis.set(world.keys.marker, Marker(marker.lineage, 0, marker.lineage).encode())
    await world.view("vod_1", 2)
    outcome = await worker.cycle()
    assert isinstance(outcome, Hold)
    assert outcome.cause.startswith(cause)
    assert await world.totals() == Counter(vod_1=5)
    assert await world.pending() == Counter(vod_1=2)


async def test_marker_of_another_type_is_a_hold_even_before_the_first_flush(world: World) -> None:
    await world.redis.hset(world.keys.marker, "a", "b")
    outcome = await world.worker().cycle()
    assert isinstance(outcome, Hold)
    assert outcome.cause == "the marker's key holds a hash, not a string"
    await world.redis.delete(world.keys.marker)
    outcome = await world.worker().cycle()
    assert isinstance(outcome, Hold)  # remembered: from now on only `adopt` may create a marker


async def test_keys_that_cannot_be_counted_do_not_block_others(world: World) -> None:
    bad_values = [b"abc", b"12.5", b"+5", b" 12", b"", b"007", b"-3", b"9223372036854775808"]
    for number, value in enumerate(bad_values):
        await world.redis.set(f"{world.prefix}bad_{number}", value)
    await world.redis.hset(world.prefix + "hash", "a", "b")
    for bad_id in (b"", b"\xff\xfe", b"a\x00b", b"x" * 257):
        await world.redis.set(world.prefix.encode() + bad_id, 1)
    for good_id in ("a:b*{c}[d]\n?^", "ünïcödé", "x" * 256, " "):
        await world.view(good_id, 2)
    worker = world.worker()
    assert await worker.cycle() == Flushed(flush_id=1, keys=4, views=8)
    assert await world.totals() == world.truth
    assert worker.metric("view_count_quarantined_keys") == len(bad_values) + 1 + 4
    assert await world.redis.get(world.prefix + "bad_0") == b"abc"
    await world.assert_consistent()


async def test_huge_value_is_never_fetched(world: World) -> None:
    """It could take all memory of the worker, or longer than a command may."""
    await world.redis.set(world.prefix + "huge", b"7" * 2**20)
    await world.view("good", 2)

    async def sent() -> int:
        return int((await world.redis.info("stats"))["total_net_output_bytes"])

    worker, before = world.worker(), await sent()
    async with worker.listening():
        await worker.sweep_and_flush()
        await world.announce("huge")
        await world.announce("good")
        await worker.wait_until(lambda: len(worker.counters.backlog.announced) == 2)
        await worker.counters.loop.cycle()
    shown = await worker.counters.display.views(["good", "huge"])
    assert [number.views for number in shown] == [2, 0]
    assert await sent() - before < 2**20
    assert worker.counters.backlog.quarantine.listed() == {f"{world.prefix}huge": NOT_A_COUNT}


async def test_prefix_with_glob_characters_finds_only_its_own_keys(redis_url: str, database_url: str) -> None:
    async with World(redis_url, database_url, prefix="we[i]rd*?\\:") as world:
        await world.view("vod_1")
        await world.redis.incr("wei-other:vod_2")
        await world.worker().cycle()
        await world.assert_exact()
        assert await world.redis.getdel("wei-other:vod_2") == b"1"


@pytest.mark.parametrize("value", ["abc", "-3", "9223372036854775808"])
async def test_settle_skips_counters_that_became_invalid_and_settles_the_rest(world: World, value: str) -> None:
    worker = world.worker()
    await world.view("good", 3)
    await world.view("turned", 3)
    settle = worker.counters.flusher.settler.settle

    async def overwrite_then_settle(*args: Any, **kwargs: Any) -> bool:
        await world.redis.set(world.prefix + "turned", value)
        return await settle(*args, **kwargs)

    worker.counters.flusher.settler.settle = overwrite_then_settle  # type: ignore[method-assign]
    await worker.cycle()
    assert await world.redis.get(world.prefix + "good") is None
    assert await world.redis.get(world.prefix + "turned") == value.encode()
    marker = await world.marker()
    assert marker is not None
    assert marker.flush_id == 1


async def test_settle_never_goes_below_zero(world: World) -> None:
    worker = world.worker()
    await world.view("reset", 5)
    settle = worker.counters.flusher.settler.settle

    async def reset_then_settle(*args: Any, **kwargs: Any) -> bool:
        await world.redis.set(world.prefix + "reset", 2)
        return await settle(*args, **kwargs)

    worker.counters.flusher.settler.settle = reset_then_settle  # type: ignore[method-assign]
    await worker.cycle()
    assert await world.redis.get(world.prefix + "reset") is None


async def test_settle_is_exact_beyond_the_precision_of_lua_numbers(world: World) -> None:
    largest = 2**63 - 1
    worker = world.worker()
    await worker.cycle()
    before = await world.marker()
    assert before is not None
    await world.view("huge", largest)
    assert await worker.counters.flusher.settler.settle(
        before, Marker(before.lineage, 1, before.nonce), {"huge": 2**53 + 1}
    )
    assert await world.pending() == Counter(huge=largest - 2**53 - 1)


async def test_settle_without_the_right_to_delete_leaves_zeros_and_counts_once(
    valkey: ValkeyServer, database_url: str
) -> None:
    async with World(valkey.url, database_url) as world:
        await world.redis.acl_setuser(  # type: ignore[no-untyped-call]
            "limited", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-del"]
        )
        limited = valkey.url.replace("redis://", "redis://limited:x@")
        await world.view("vod_1", 5)
        worker = world.worker(REDIS_URL=limited)
        with pytest.raises(RedisUnavailable, match=r"(?i)permission|acl"):
            await worker.cycle()  # the creation of the marker ends with a DEL
        assert await worker.cycle() == Flushed(flush_id=1, keys=1, views=5)
        assert await world.redis.get(world.prefix + "vod_1") == b"0"
        assert await worker.cycle() == Flushed()
        assert await world.totals() == Counter(vod_1=5)


@pytest.mark.parametrize("denied", ["-set", "-decrby"])
async def test_settle_without_the_right_to_write_writes_nothing(
    valkey: ValkeyServer, database_url: str, denied: str
) -> None:
    async with World(valkey.url, database_url) as world:
        await world.worker().cycle()
        await world.redis.acl_setuser(  # type: ignore[no-untyped-call]
            "limited", enabled=True, nopass=True, keys=["*"], commands=["+@all", denied]
        )
        limited = world.worker(REDIS_URL=valkey.url.replace("redis://", "redis://limited:x@"))
        await world.view_many(["a", "b", "b"])
        settle = limited.counters.flusher.settler.settle

        async def add_views_then_settle(*args: Any, **kwargs: Any) -> bool:
            await world.view("a")
            return await settle(*args, **kwargs)

        limited.counters.flusher.settler.settle = add_views_then_settle  # type: ignore[method-assign]
        for _ in range(3):
            with pytest.raises(RedisUnavailable):
                await limited.cycle()
        assert await world.pending() == world.truth
        await world.worker().cycle()
        await world.assert_exact()


async def test_flush_and_settle_work_at_maxmemory(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        worker = world.worker()
        await world.view_many([f"vod_{number}" for number in range(100)])
        await worker.cycle()
        await world.view_many([f"vod_{number}" for number in range(100)])
        await world.redis.config_set("maxmemory", "1mb")
        await world.redis.config_set("maxmemory-policy", "noeviction")
        with pytest.raises(Exception, match=r"OOM|maxmemory"):
            await world.redis.set("another", "x")
        await worker.cycle()
        await world.assert_exact()


async def test_script_runs_on_servers_that_do_not_know_shebangs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from redis.exceptions import ResponseError

    worker = world.worker()
    evaluate = worker.redis._evaluate

    async def like_redis_6(digest: str, source: str, *rest: Any) -> Any:
        if source.startswith("#!"):
            raise ResponseError("Error compiling script (new function): user_script:1: unexpected symbol near '#'")
        return await evaluate(digest, source, *rest)

    monkeypatch.setattr(worker.redis, "_evaluate", like_redis_6)
    await world.view("vod_1", 4)
    await worker.cycle()
    await world.assert_exact()


async def test_scripts_survive_a_script_flush(world: World) -> None:
    worker = world.worker()
    await worker.cycle()
    await world.redis.script_flush()
    assert await world.redis.script_exists(SETTLE.flagged.digest) == [False]
    await world.view("vod_1")
    await worker.cycle()
    await world.assert_exact()


async def test_backlog_beyond_the_memory_limit_is_flushed_while_sweeping(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.counters.intake.backlog.PENDING_LIMIT", 500)
    await world.view_many([f"vod_{number}" for number in range(5000)])
    worker = world.worker(BATCH_SIZE="250", BATCH_INTERVAL_MS="60000")
    outcome = await worker.cycle()
    assert isinstance(outcome, Flushed)
    assert outcome.views == 5000
    await world.assert_exact()


async def test_stop_does_not_wait_for_messages_if_only_counters_are_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.redis.listener.MAX_DRAIN_S", 3600.0)
    worker, stop = world.worker(VIEW_COUNT_SOURCE="counters", SHUTDOWN_TIMEOUT="2h"), asyncio.Event()
    for check in SERVERS:
        worker.status.ok(check)
    await worker.counters.lease.take()
    await world.view("a", 3)
    stop.set()
    async with asyncio.timeout(30):
        await worker.counters.loop.run(stop)
    await world.assert_exact()


async def test_long_locks_do_not_block_other_ids(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tried = FakeClock(), []
    monkeypatch.setattr("worker.app.counters.SystemClock", lambda: clock)

    async def flush(_: object, ids: list[str]) -> Flushed:
        tried.append(ids)
        if any(vod_id.startswith("locked") for vod_id in ids):
            clock.advance(12)
            raise DatabaseUnavailable("locked") from asyncpg.LockNotAvailableError("locked")
        return Flushed(1, len(ids), len(ids))

    monkeypatch.setattr(Flusher, "_flush", flush)
    flusher = world.worker().counters.flusher
    assert await flusher.flush(["free", *(f"locked_{number}" for number in range(7))]) == Flushed(1, 1, 1)
    assert [len(ids) for ids in tried] == [8, 4, 2, 1, 1, 2, 1]
    with pytest.raises(DatabaseUnavailable):
        await flusher.flush([f"locked_{number}" for number in range(8)])
