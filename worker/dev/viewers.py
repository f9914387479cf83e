"""Demo viewers: traffic with a known truth."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

if TYPE_CHECKING:
    from redis.asyncio import Redis

TICK_S = 0.02
ZIPF_EXPONENT = 1.1


class Viewers:
    """Sends `rate` INCRs a second to `ids`, the popular ones far more often than the rest (Zipf).

    `acknowledged` is what Redis confirmed, by id; `indeterminate` what was sent and not confirmed: it may have counted.
    """

    def __init__(self, redis: Redis, prefix: str, ids: list[str], rate: int, rng: random.Random) -> None:
        self._redis = redis
        self._prefix = prefix
        self._ids = ids
        self._rate = rate
        self._rng = rng
        self._weights = list(itertools.accumulate(1 / rank**ZIPF_EXPONENT for rank in range(1, len(ids) + 1)))
        self.sent = 0
        self.acknowledged: Counter[str] = Counter()
        self.indeterminate: Counter[str] = Counter()

    async def run(self, stop: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        while not stop.is_set():
            due = int((loop.time() - started) * self._rate) - self.sent
            if due > 0:
                await self._send(self._rng.choices(self._ids, cum_weights=self._weights, k=due))
            await asyncio.sleep(TICK_S)

    async def _send(self, views: list[str]) -> None:
        self.sent += len(views)
        pipeline = self._redis.pipeline(transaction=False)
        for vod_id in views:
            pipeline.incr(self._prefix + vod_id)
        try:
            await pipeline.execute()
        except (RedisError, OSError):
            self.indeterminate.update(views)
        else:
            self.acknowledged.update(views)
