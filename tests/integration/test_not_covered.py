"""What docs/protocol.md lists as not covered: what happens then, on real servers."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.test_flush import committed_but_not_settled
from tests.integration.test_recovery import copy_of, put_in_place
from tests.support.world import World
from worker.counters.flush.outcome import Flushed
from worker.counters.flush.verdict import Hold
from worker.dev.servers import ValkeyServer

AT_REST = {
    "RENAME a b": {"b": 7},
    "COPY a b REPLACE": {"a": 7, "b": 7},
    "GETDEL a": {"b": 1},
    "DECRBY a 2": {"a": 5, "b": 1},
    "SET a 3": {"a": 3, "b": 1},
}
BEFORE_THE_SETTLE = {
    "RENAME a b": {"a": 7, "b": 1 + 6},
    "COPY a b REPLACE": {"a": 7, "b": 1 + 6},
    "GETDEL a": {"a": 7, "b": 1},
    "DECRBY a 2": {"a": 7, "b": 1},
    "SET a 3": {"a": 7, "b": 1},
    "SET a 100": {"a": 100, "b": 1},
}


async def change(world: World, command: str) -> None:
    """Run a Redis command on counters: the words `a` and `b` are ids."""
    words = [world.prefix + word if word in ("a", "b") else word for word in command.split()]
    await world.redis.execute_command(*words)


@pytest.mark.parametrize("command", AT_REST)
async def test_counters_changed_by_others(world: World, command: str) -> None:
    await world.view_many(["a"] * 7 + ["b"])
    await change(world, command)
    await world.worker().cycle()
    assert await world.totals() == Counter(AT_REST[command])


@pytest.mark.parametrize("command", BEFORE_THE_SETTLE)
async def test_counters_changed_by_others_between_commit_and_settle(world: World, command: str) -> None:
    await world.view_many(["a"] * 7 + ["b"])
    await committed_but_not_settled(world, world.worker())
    await change(world, command)
    await world.worker().cycle()
    assert await world.totals() == Counter(BEFORE_THE_SETTLE[command])
    await world.assert_consistent()


async def test_views_that_follow_a_getdel_before_the_settle_are_lost(world: World) -> None:
    await world.view("a", 7)
    await committed_but_not_settled(world, world.worker())
    await change(world, "GETDEL a")
    await world.view("a", 3)
    await world.worker().cycle()
    assert await world.totals() == Counter(a=7)


@pytest.mark.parametrize("everything", [False, True], ids=["marker alone", "everything"])
async def test_marker_lost_at_the_wrong_moment_costs_at_most_one_flush(
    valkey: ValkeyServer, database_url: str, everything: bool
) -> None:
    """Alone: after the settle, before it was confirmed. With the counters: also between commit and settle."""
    async with World(valkey.url, database_url) as world:
        worker = world.worker()
        await world.view_many(["a"] * 5 + ["b"] * 4)
        if everything:
            await committed_but_not_settled(world, worker)
            await world.redis.flushall()
        else:
            await worker.cycle()
            await world.view_many(["a"] * 5 + ["b"] * 4)
            assert await worker.counters.flusher.flush(["a", "b"]) == Flushed(flush_id=2, keys=2, views=9)
            await world.redis.delete(world.keys.marker)
        await world.view_many(["a"] * 9 + ["b"] + ["c"] * 2)
        for _ in range(2):
            await world.worker().cycle()
        assert world.truth - await world.totals() == Counter(a=5, b=1)


async def test_sum_of_get_and_total_drops_after_redis_lost_views_that_messages_rescued(world: World) -> None:
    """By no more than Redis lost. The total is never less than that of the INCRs which Redis kept."""

    async def live() -> tuple[int, int]:
        """GET + total, and what /v1/views shows."""
        total = int(await world.redis.get(world.prefix + "a") or 0) + (await world.totals())["a"]
        (shown,) = await worker.counters.display.views(["a"])
        return total, shown.views

    worker = world.worker()
    await worker.cycle()
    async with worker.listening():
        await world.view("a", 3)
        await world.announce("a", 3)
        await worker.wait_until(lambda: worker.metric("view_count_updates_total") == 1)
        await world.redis.delete(world.prefix + "a")
        await worker.sweep_and_flush()
        assert await live() == (3, 3)
        await world.view("a", 2)
        assert await live() == (5, 3)
        await worker.sweep_and_flush()
        assert await live() == (3, 3)
        await world.view("a", 10)
        assert await live() == (13, 12)
        await worker.sweep_and_flush()
        assert await live() == (12, 12)
        assert world.truth["a"] == 15


@pytest.fixture
async def copy(valkey: ValkeyServer, world: World) -> AsyncIterator[World]:
    """The world on another Redis, which is empty."""
    async with World(valkey.url, world.database_url, prefix=world.prefix) as made:
        yield made


async def copy_keys(world: World, copy: World, *keys: str | bytes) -> None:
    for key in keys:
        await copy.redis.restore(key, 0, await world.redis.dump(key), replace=True)


@pytest.mark.parametrize("marker_first", [True, False], ids=["marker first", "counter first"])
async def test_flush_during_a_copy_key_by_key(world: World, copy: World, marker_first: bool) -> None:
    counter, worker = world.prefix + "a", world.worker()
    await world.view("a", 5)
    await worker.cycle()
    await world.view("a", 7)
    await copy_keys(world, copy, world.keys.marker if marker_first else counter)
    await worker.cycle()
    await world.view("a", 4)
    await copy_keys(world, copy, counter if marker_first else world.keys.marker)
    await copy.worker().cycle()
    # First: the flush is subtracted from the views that followed. Second: it is counted again, and these are not there.
    assert await copy.totals() == Counter(a=12 if marker_first else 12 + 7)
    assert await copy.pending() == Counter()


async def test_two_redis_with_one_marker_lose_views_to_each_other(world: World, copy: World) -> None:
    here, there = world.worker(), copy.worker()
    await world.view("a", 5)
    await here.cycle()
    await world.view("a", 7)
    await copy_keys(world, copy, world.prefix + "a", world.keys.marker)
    await here.cycle()
    await there.cycle()
    assert await world.totals() == Counter(a=12)  # what was copied counts once
    await world.view("a", 3)
    await copy.view("a", 4)
    for worker in (here, there, here):
        await worker.cycle()
    assert await world.totals() == Counter(a=12 + 3 + 4 - 3)


async def test_counters_imported_without_the_marker_are_counted_as_new(world: World) -> None:
    await world.view("a", 5)
    dump = await world.redis.dump(world.prefix + "a")
    await world.worker().cycle()
    await world.redis.restore(world.prefix + "a", 0, dump)
    await world.worker().cycle()
    assert await world.totals() == Counter(a=10)


async def test_nested_prefixes_count_a_view_under_either_id_or_both(world: World) -> None:
    outer, inner = world.worker(), world.worker(VIEW_KEY_PREFIX=f"{world.prefix}eu:", VIEW_SOURCE_NAME="eu")
    await outer.cycle()
    assert await inner.counters.lease.take()
    await inner.sweep_and_flush()
    for first, id_of_first in ((outer, "eu:a"), (inner, "a")):
        await world.redis.incrby(f"{world.prefix}eu:a", 5)
        await first.sweep_and_flush()
        assert (await world.totals())[id_of_first] == 5
        await asyncio.gather(outer.sweep_and_flush(), inner.sweep_and_flush())
    assert await world.totals() == {"eu:a": 5, "a": 5}
    await world.redis.incrby(f"{world.prefix}eu:a", 5)
    await committed_but_not_settled(world, outer)  # its cycle takes the lease of both
    assert await inner.counters.lease.take()
    await inner.sweep_and_flush()
    await outer.cycle()
    assert await world.totals() == {"eu:a": 10, "a": 10}
    assert await world.pending() == Counter()


@pytest.mark.parametrize("hidden_by", ["AOF switched off", "base without the preamble"])
async def test_copy_that_looks_as_if_it_had_started_empty_is_counted_again(
    servers_folder: Path, database_url: str, hidden_by: str
) -> None:
    """A copy from before the first flush. Redis reports no loaded keys of an AOF, and no base of it."""
    plain = hidden_by == "base without the preamble"
    always = ("--appendfsync", "always")
    folder = servers_folder / f"hidden-{plain}"
    before = ValkeyServer(folder, options=(*always, "--aof-use-rdb-preamble", "no" if plain else "yes"))
    after = ValkeyServer(folder, before.port, always)
    before.start()
    try:
        async with World(before.url, database_url) as world:
            await world.view("a", 5)
            copy = copy_of(before, "before")
            await world.redis.connection_pool.disconnect()
            await world.worker().cycle()
            put_in_place(before, copy)
            await world.restart_redis(after)
            if not plain:
                await world.redis.config_set("appendonly", "no")
            await world.five_minutes_later()
            await world.worker().cycle()
            assert await world.totals() == Counter(a=10)
    finally:
        before.kill()
        after.kill()


@pytest.mark.parametrize("valkey", [("--aof-use-rdb-preamble", "no")], indirect=True)
async def test_redis_without_the_preamble_that_lost_its_data_is_a_hold(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        worker = world.worker()
        await world.view("a", 5)
        await worker.cycle()
        valkey.kill()
        shutil.rmtree(valkey.folder)
        valkey.folder.mkdir()
        await world.restart_redis(valkey)
        await world.view("a", 2)
        assert isinstance(await worker.cycle(), Hold)


@pytest.mark.parametrize("flushed_since", [False, True])
async def test_copy_from_before_a_wipe(valkey: ValkeyServer, database_url: str, flushed_since: bool) -> None:
    async with World(valkey.url, database_url) as world:
        worker = world.worker()
        await world.view("a", 5)
        await worker.cycle()
        await world.view("a", 3)
        copy = copy_of(valkey, "before")
        await world.redis.connection_pool.disconnect()
        await worker.cycle()
        await world.redis.flushall()
        if flushed_since:
            await world.view("a", 2)
            await worker.cycle()
        put_in_place(valkey, copy)
        await world.restart_redis(valkey)
        outcome = await world.worker().cycle()
        assert isinstance(outcome, Hold) is flushed_since
        assert await world.totals() == world.truth


async def test_views_recorded_on_a_writable_replica_are_lost(
    valkey: ValkeyServer, servers_folder: Path, database_url: str
) -> None:
    replica = ValkeyServer(servers_folder / "replica-for-writes", options=("--replica-read-only", "no"))
    replica.start()
    try:
        async with (
            World(valkey.url, database_url) as world,
            World(replica.url, database_url, prefix=world.prefix) as copy,
        ):
            await copy.redis.replicaof("127.0.0.1", str(valkey.port))  # type: ignore[no-untyped-call]
            while (await copy.redis.info("replication")).get("master_link_status") != "up":
                await asyncio.sleep(0.02)
            await world.view("a", 5)
            await copy.redis.incrby(copy.prefix + "a", 3)
            await world.worker().cycle()
            async with asyncio.timeout(10):
                while await copy.pending():
                    await asyncio.sleep(0.02)
            await world.assert_exact()
    finally:
        replica.kill()
