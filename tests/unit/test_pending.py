"""Pending ids, and the sweep that finds them."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fakeredis import FakeAsyncRedis

from tests.support.fakes import FakeClock
from worker.contract.keys import Keys
from worker.counters.intake.pending import SWEEP_SHARE, Pending, Sweep
from worker.redis.address import RedisAddress
from worker.redis.client import RedisClient

KEYS = Keys(b"vod:views:")


def test_pending_returns_the_oldest_ids_first_and_sorted() -> None:
    clock = FakeClock()
    pending = Pending(clock)
    pending.add(["z", "y"])
    clock.advance(5)
    pending.add(["a", "z"])
    assert pending.oldest(2) == ["y", "z"]
    assert pending.oldest(9) == ["a", "y", "z"]
    assert pending.oldest_seconds() == 5
    pending.remove(["y", "z", "never there"])
    assert pending.oldest_seconds() == 0
    assert len(pending) == 1


class SlowRedis:
    """SCAN over `pages` pages, a second each."""

    def __init__(self, clock: FakeClock, pages: int) -> None:
        self._clock = clock
        self._pages = pages

    async def scan(self, _: bytes) -> AsyncIterator[list[bytes]]:
        for number in range(self._pages):
            self._clock.advance(1)
            yield [b"vod:views:%d" % number]


async def test_sweep_scans_at_most_its_share_of_the_time() -> None:
    clock = FakeClock()
    sweep = Sweep(SlowRedis(clock, pages=3), KEYS, clock)  # type: ignore[arg-type]
    assert sweep.is_due
    began = clock.monotonic()
    async for _ in sweep.pages():
        clock.advance(10)  # time that flushing takes is not time spent scanning
    assert not sweep.is_due
    clock.advance(began + 3 / SWEEP_SHARE - clock.monotonic() - 0.1)
    assert not sweep.is_due
    clock.advance(0.2)
    assert sweep.is_due


async def test_sweep_is_due_after_a_request_and_stays_due_when_it_is_interrupted() -> None:
    clock = FakeClock()
    sweep = Sweep(SlowRedis(clock, pages=3), KEYS, clock)  # type: ignore[arg-type]
    async for _ in sweep.pages():
        break
    assert sweep.is_due
    async for _ in sweep.pages():
        pass
    assert not sweep.is_due
    sweep.request()
    assert sweep.is_due


async def test_sweep_finds_every_counter_and_nothing_else() -> None:
    redis = RedisClient(RedisAddress(hosts=(("unused", 1),)))
    redis._redis = FakeAsyncRedis()
    expected = {b"vod:views:%d" % number for number in range(2500)}
    await redis._redis.mset(dict.fromkeys(expected, 1))
    await redis._redis.set("vod:views", 1)
    await redis._redis.set(KEYS.marker, 1)
    found: set[bytes] = set()
    async for page in Sweep(redis, KEYS, FakeClock()).pages():
        found.update(page)
    assert found == expected
    await redis.close()
