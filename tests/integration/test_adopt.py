"""Ending a hold with `adopt`."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.world import World
from worker.counters.flush.marker import Marker
from worker.counters.flush.outcome import Flushed
from worker.counters.flush.verdict import Hold
from worker.errors import NothingToAdopt


@pytest.fixture(params=["ahead", "foreign", "garbage", "another type", "pruned ledger"])
async def on_hold(request: pytest.FixtureRequest, world: World) -> World:
    """Five views in Postgres, four pending, and a marker that does not match."""
    worker = world.worker()
    await worker.cycle()
    first_marker = await world.marker()
    await world.view("a", 5)
    await worker.cycle()
    marker = await world.marker()
    assert marker is not None
    assert first_marker is not None
    match request.param:
        case "ahead":
            await world.redis.set(world.keys.marker, Marker(marker.lineage, 9, marker.nonce).encode())
        case "foreign":
            await world.redis.set(world.keys.marker, Marker(marker.nonce, 1, marker.nonce).encode())
        case "garbage":
            await world.redis.set(world.keys.marker, b"\xff\x00")
        case "another type":
            await world.redis.delete(world.keys.marker)
            await world.redis.rpush(world.keys.marker, "x")
        case "pruned ledger":
            await world.redis.set(world.keys.marker, first_marker.encode())
            await world.sql.execute("DELETE FROM view_count_flushes")
    await world.redis.incrby(world.prefix + "a", 3)
    await world.redis.incrby(world.prefix + "b", 1)
    assert isinstance(await worker.cycle(), Hold)
    return world


async def test_pending_views_can_be_counted(on_hold: World) -> None:
    adoption = on_hold.worker().counters.adoption
    situation = await adoption.look()
    assert situation.hold is not None
    assert situation.pending == situation.largest == {"a": 3, "b": 1}
    assert await adoption.adopt(situation, discard=False) == 0
    assert await on_hold.worker().cycle() == Flushed(flush_id=2, keys=2, views=4)
    assert await on_hold.totals() == Counter(a=8, b=1)
    assert await on_hold.pending() == Counter()


async def test_pending_views_can_be_discarded(on_hold: World) -> None:
    adoption = on_hold.worker().counters.adoption
    assert await adoption.adopt(await adoption.look(), discard=True) == 4
    await on_hold.redis.incrby(on_hold.prefix + "a", 2)
    assert await on_hold.worker().cycle() == Flushed(flush_id=2, keys=1, views=2)
    assert await on_hold.totals() == Counter(a=7)


async def test_only_views_that_were_shown_are_discarded(on_hold: World) -> None:
    adoption = on_hold.worker().counters.adoption
    situation = await adoption.look()
    await on_hold.redis.incrby(on_hold.prefix + "a", 10)
    await on_hold.redis.incrby(on_hold.prefix + "c", 1)
    assert await adoption.adopt(situation, discard=True) == 4
    await on_hold.worker().cycle()
    assert await on_hold.totals() == Counter(a=15, c=1)


async def test_marker_that_changed_since_it_was_shown_is_not_adopted(on_hold: World) -> None:
    adoption = on_hold.worker().counters.adoption
    situation = await adoption.look()
    await on_hold.redis.set(on_hold.keys.marker, "something else")
    with pytest.raises(NothingToAdopt, match="look again"):
        await adoption.adopt(situation, discard=False)


async def test_crash_during_adopt_leaves_the_hold(on_hold: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.db.counters.source_row import SourceRow

    async def crash(*_: object) -> None:
        raise RuntimeError("killed")

    adoption = on_hold.worker().counters.adoption
    situation = await adoption.look()
    with monkeypatch.context() as patch:
        patch.setattr(SourceRow, "start_lineage", crash)
        with pytest.raises(RuntimeError):
            await adoption.adopt(situation, discard=True)
    assert isinstance(await on_hold.worker().cycle(), Hold)
    await adoption.adopt(await adoption.look(), discard=True)
    assert await on_hold.worker().cycle() == Flushed()
    assert await on_hold.totals() == Counter(a=5)


async def test_without_a_hold_there_is_nothing_to_adopt(world: World) -> None:
    await world.view("a")
    await world.worker().cycle()
    adoption = world.worker().counters.adoption
    situation = await adoption.look()
    assert situation.hold is None
    with pytest.raises(NothingToAdopt):
        await adoption.adopt(situation, discard=False)


async def test_recreated_database_is_a_hold_before_its_first_run(world: World) -> None:
    await world.view("a", 5)
    await world.worker().cycle()
    await world.sql.execute("TRUNCATE view_counts, view_counts_hourly, view_count_flushes, view_count_sources")
    await world.view("a", 2)
    adoption = world.worker().counters.adoption
    situation = await adoption.look()
    assert situation.hold is not None
    assert "belongs to another database" in situation.hold.cause
    await adoption.adopt(situation, discard=False)
    await world.worker().cycle()
    assert await world.totals() == Counter(a=2)


async def test_first_run_is_not_a_hold(world: World) -> None:
    await world.view("a", 5)
    situation = await world.worker().counters.adoption.look()
    assert (situation.hold, situation.marker, situation.pending_views) == (None, None, 5)
