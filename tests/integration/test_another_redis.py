"""Workers of one source with different Redis URLs: who works, and what becomes of the views in each Redis."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from tests.integration.test_flush import committed_but_not_settled
from tests.support.world import InProcessWorker, World
from worker.counters.flush.agreement import ANOTHER_REDIS
from worker.counters.flush.marker import Marker
from worker.counters.flush.outcome import Flushed
from worker.counters.flush.verdict import Hold
from worker.dev.servers import ValkeyServer
from worker.errors import NothingToAdopt, OnHold, RedisUnavailable
from worker.observability.status import SERVERS, VIEW_COUNTS, State


@pytest.fixture
async def wrong(valkey: ValkeyServer, world: World) -> AsyncIterator[World]:
    """The world with the URL of another Redis, which is empty."""
    async with World(valkey.url, world.database_url, prefix=world.prefix) as made:
        yield made


async def total(world: World) -> int:
    return (await world.totals()).total()


async def test_worker_with_another_redis_does_not_take_over_within_five_minutes(world: World, wrong: World) -> None:
    right = world.worker()
    await world.view("a", 5)
    await right.cycle()
    await wrong.redis.incrby(wrong.prefix + "a", 7)
    stranger = wrong.worker()
    assert await stranger.cycle() == ANOTHER_REDIS
    with pytest.raises(OnHold):
        await stranger.counters.forgetting.forget("a")
    assert (await stranger.counters.adoption.look()).hold == ANOTHER_REDIS
    assert await wrong.marker() is None
    await world.view("a", 1)
    assert await right.cycle() == Flushed(flush_id=2, keys=1, views=1)
    await world.assert_exact()


async def test_agreement_without_views_keeps_another_redis_away(world: World, wrong: World) -> None:
    right = world.worker()
    await world.view("a", 5)
    await right.cycle()
    await world.five_minutes_later()
    await right.cycle()  # nothing is pending
    assert await wrong.worker().cycle() == ANOTHER_REDIS


async def test_hold_for_another_redis_ends_by_itself_and_each_redis_is_counted_once(world: World, wrong: World) -> None:
    await world.view("a", 5)
    right, stranger = world.worker(), wrong.worker()
    await right.cycle()
    await wrong.redis.incrby(wrong.prefix + "a", 7)
    await world.redis.incrby(world.prefix + "a", 1)
    assert await stranger.cycle() == ANOTHER_REDIS
    await world.five_minutes_later()
    assert await stranger.cycle() == Flushed(flush_id=2, keys=1, views=7)
    assert await right.cycle() == ANOTHER_REDIS  # it agreed with a lineage that is over
    await world.five_minutes_later()
    assert await right.cycle() == Flushed(flush_id=3, keys=1, views=1)
    assert await total(world) == 13
    await world.assert_consistent(lineages_may_change=True)


async def test_corrected_url_ends_the_hold_and_is_exact_after_a_crash_between_commit_and_settle(
    world: World, wrong: World
) -> None:
    await world.view("a", 1)
    await world.worker().cycle()
    await world.view("a", 99)
    await committed_but_not_settled(world, world.worker())
    await world.view("a", 6)
    for count in (3, 4):
        await world.five_minutes_later()
        assert isinstance(await wrong.worker().cycle(), Flushed)
        await wrong.redis.incrby(wrong.prefix + "b", count)
    await wrong.worker().cycle()
    right = world.worker()
    assert [number.views for number in await right.counters.display.views(["a"])] == [106]
    assert await right.cycle() == ANOTHER_REDIS
    assert [number.views for number in await right.counters.display.views(["a"])] == [106]
    await world.five_minutes_later()
    assert isinstance(await right.cycle(), Flushed)
    assert await world.totals() == Counter(a=106, b=7)
    assert await world.pending() == Counter()
    await world.view("a", 1)
    assert await world.worker().cycle() == Flushed(flush_id=6, keys=1, views=1)
    await world.assert_consistent(lineages_may_change=True)


async def test_copy_of_a_redis_from_before_it_was_taken_up_again_is_not_counted_twice(
    world: World, wrong: World
) -> None:
    """A replica that lagged is promoted: its marker is of a past lineage. The ledger says what was taken since."""
    await world.view("a", 5)
    await world.worker().cycle()
    await world.view("a", 3)
    lagging = await world.marker()
    await world.five_minutes_later()
    await wrong.worker().cycle()
    await world.five_minutes_later()
    worker = world.worker()
    await worker.cycle()
    assert await world.totals() == Counter(a=8)
    assert lagging is not None
    await world.redis.set(world.keys.marker, lagging.encode())
    await world.redis.set(world.prefix + "a", 3)
    await world.view("a", 2)
    await world.worker().cycle()
    await world.assert_exact(lineages_may_change=True)


async def test_crash_before_the_marker_is_replaced_does_not_matter(
    world: World, wrong: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.view("a", 5)
    await world.worker().cycle()
    await world.five_minutes_later()
    await wrong.worker().cycle()
    await world.five_minutes_later()
    await world.view("a", 2)
    crashing = world.worker()

    async def crash(*_: object, **__: object) -> bool:
        raise RedisUnavailable("gone")

    monkeypatch.setattr(crashing.counters.flusher.settler, "settle", crash)
    with pytest.raises(RedisUnavailable):
        await crashing.cycle()
    await world.worker().cycle()
    await world.assert_exact(lineages_may_change=True)


async def test_no_past_lineage_is_known_after_adopt(world: World, wrong: World) -> None:
    """The adopted views may be those of any Redis that was used before."""
    await world.view("a", 5)
    await world.worker().cycle()
    await world.redis.incrby(world.prefix + "a", 3)
    past = await world.marker()
    assert past is not None
    await world.five_minutes_later()
    await wrong.worker().cycle()
    await world.redis.set(world.keys.marker, Marker(past.nonce, 1, past.nonce).encode())
    adoption = world.worker().counters.adoption
    await adoption.adopt(await adoption.look(), discard=False)
    worker = world.worker()
    await worker.cycle()
    assert await world.totals() == Counter(a=8)
    # A copy from before `adopt` is put in place.
    await world.redis.set(world.keys.marker, past.encode())
    await world.redis.set(world.prefix + "a", 3)
    await world.five_minutes_later()
    assert isinstance(await worker.cycle(), Hold)
    assert await world.totals() == Counter(a=8)


async def test_no_past_lineage_is_known_after_a_marker_was_created_without_evidence(world: World, wrong: World) -> None:
    await world.view("a", 5)
    await world.worker().cycle()
    await world.view("a", 3)
    past = await world.marker()
    assert past is not None
    await world.five_minutes_later()
    await wrong.worker().cycle()
    await world.five_minutes_later()
    await world.redis.delete(world.keys.marker)
    worker = world.worker(VIEW_ON_LOST_MARKER="fresh")
    await worker.cycle()
    assert await world.totals() == world.truth
    await world.redis.set(world.keys.marker, past.encode())
    await world.redis.set(world.prefix + "a", 3)
    assert isinstance(await worker.cycle(), Hold)
    assert await world.totals() == world.truth


async def test_marker_deleted_in_place_makes_its_lineage_unknown(world: World) -> None:
    """The views went on under another lineage: a copy with the marker of the first has some of them, too."""
    worker = world.worker()
    await world.view("a", 5)
    await worker.cycle()
    marker = await world.marker()
    assert marker is not None
    await world.redis.delete(world.keys.marker)
    await world.view("a", 3)
    await worker.cycle()
    await world.redis.set(world.keys.marker, marker.encode())
    await world.redis.set(world.prefix + "a", 3)
    assert isinstance(await worker.cycle(), Hold)
    assert await world.totals() == world.truth


async def test_marker_deleted_in_a_redis_that_was_used_before_is_a_hold(world: World, wrong: World) -> None:
    """It started empty, so its views would seem to be new; but one of its flushes may not be settled."""
    await wrong.worker().cycle()
    await wrong.redis.incrby(wrong.prefix + "a", 5)
    await committed_but_not_settled(wrong, wrong.worker())
    await wrong.five_minutes_later()
    await world.worker().cycle()
    await wrong.redis.delete(wrong.keys.marker)
    await wrong.five_minutes_later()
    assert isinstance(await wrong.worker().cycle(), Hold)
    assert await wrong.totals() == Counter(a=5)


async def test_returned_redis_within_five_minutes_can_be_adopted(world: World, wrong: World) -> None:
    await world.view("a", 5)
    await world.worker().cycle()
    await world.view("a", 2)
    await world.five_minutes_later()
    await wrong.worker().cycle()
    adoption = world.worker().counters.adoption
    await adoption.adopt(await adoption.look(), discard=False)
    await world.worker().cycle()
    await world.assert_exact(lineages_may_change=True)
    with pytest.raises(NothingToAdopt):
        await adoption.adopt(await adoption.look(), discard=False)


@contextlib.asynccontextmanager
async def running(worker: InProcessWorker) -> AsyncIterator[None]:
    for check in SERVERS:
        worker.status.ok(check)
    stop = asyncio.Event()
    loops = [asyncio.create_task(loop.run(stop)) for loop in (worker.counters.lease, worker.counters.loop)]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*loops)


async def test_worker_on_hold_leaves_the_lease_to_another_and_shows_the_hold(
    world: World, wrong: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.db.lease.KEPT_S", 0.0)
    monkeypatch.setattr("worker.counters.loop.STANDBY_LOOK_S", 0.1)
    await world.view("a", 5)
    await world.worker().cycle()
    await world.expire_lease()
    stranger, right = wrong.worker(), world.worker()
    async with running(stranger):
        check = stranger.status.checks[VIEW_COUNTS]
        await stranger.wait_until(lambda: check.state is State.HOLD and stranger.counters.lease.token is None)
        assert (check.cause, check.remedy) == (ANOTHER_REDIS.cause, ANOTHER_REDIS.remedy)
        await world.view("a", 2)
        async with running(right):
            await right.wait_until(lambda: right.status.checks[VIEW_COUNTS].facts.get("role") == "working")
            loop, lease = stranger.counters.loop, stranger.counters.lease
            await stranger.wait_until(lambda: lease.is_kept_elsewhere and loop._seen is not None)
            assert check.state is State.HOLD
            assert stranger.metric("view_count_holds") == 1
    await world.assert_exact()


async def test_worker_that_stands_by_shows_that_another_redis_is_flushed(
    world: World, wrong: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.counters.loop.STANDBY_LOOK_S", 0.1)
    await world.view("a", 5)
    await world.worker().cycle()
    await world.five_minutes_later()
    working = wrong.worker()
    await working.cycle()  # nobody else has flushed: it takes the source over
    right, same = world.worker(), wrong.worker()
    async with running(working), running(right), running(same):
        check = right.status.checks[VIEW_COUNTS]
        await right.wait_until(lambda: check.state is State.HOLD)
        assert check.cause == ANOTHER_REDIS.cause
        await working.wait_until(lambda: working.status.checks[VIEW_COUNTS].facts == {"role": "working"})
        await same.wait_until(lambda: same.status.checks[VIEW_COUNTS].facts.get("role") == "standing by")


async def test_worker_that_fails_persistently_leaves_the_lease_to_another(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.counters.loop.FAILING_LIMIT_S", 0.0)
    await world.view("a", 5)
    failing, right = world.worker(), world.worker()

    async def refuse(*_: object) -> str:
        raise RedisUnavailable("NOPERM")

    monkeypatch.setattr(failing.redis, "read", refuse)
    async with running(failing):
        await failing.wait_until(lambda: failing.status.checks[VIEW_COUNTS].state is State.FAILING)
        assert failing.metric("view_count_pending_keys") == 1
        async with running(right):
            await right.wait_until(lambda: right.status.checks[VIEW_COUNTS].facts.get("role") == "working")
            assert failing.status.checks[VIEW_COUNTS].cause == "NOPERM"
            await failing.wait_until(lambda: failing.metric("view_count_pending_keys") == 0)
    await world.assert_exact()
