"""The counters that have views to flush, and the sweep that finds them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from worker.contract.keys import Keys
    from worker.redis.client import RedisClient
    from worker.runtime.clock import Clock

SWEEP_SHARE = 0.05


class Pending:
    """Ids to flush, with the time at which each was found, in that order."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._found: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._found)

    def add(self, ids: Iterable[str]) -> None:
        now = self._clock.monotonic()
        for vod_id in ids:
            self._found.setdefault(vod_id, now)

    def oldest(self, count: int) -> list[str]:
        """The `count` longest waiting ids, sorted: every writer locks rows in the same order."""
        return sorted(itertools.islice(self._found, count))

    def remove(self, ids: Iterable[str]) -> None:
        for vod_id in ids:
            self._found.pop(vod_id, None)

    def clear(self) -> None:
        self._found.clear()

    def oldest_seconds(self) -> float:
        """Age of the oldest id; 0 when there is none."""
        first = next(iter(self._found.values()), None)
        return 0.0 if first is None else self._clock.monotonic() - first


class Sweep:
    """Finds the counters by SCAN. Its pauses grow with its duration, so that it scans at most 5 % of the time."""

    def __init__(self, redis: RedisClient, keys: Keys, clock: Clock) -> None:
        self._redis = redis
        self._keys = keys
        self._clock = clock
        self._not_before = clock.monotonic()

    def request(self) -> None:
        """Make the next sweep due now."""
        self._not_before = self._clock.monotonic()

    @property
    def is_due(self) -> bool:
        return self._clock.monotonic() >= self._not_before

    async def pages(self) -> AsyncIterator[list[bytes]]:
        """Counter keys, page by page; a page may be empty, a key may come twice. Only time in Redis counts as scanning.

        Raises RedisUnavailable; the sweep then stays due.
        """
        started = asked = self._clock.monotonic()
        spent = 0.0
        async for page in self._redis.scan(self._keys.pattern):
            spent += self._clock.monotonic() - asked
            yield page
            asked = self._clock.monotonic()
        self._not_before = started + spent / SWEEP_SHARE
