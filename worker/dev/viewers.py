"""Demo viewers: traffic with a known truth."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from redis.exceptions import RedisError

from worker.contract.ids import fitting_id
from worker.errors import ViewerWorkerError
from worker.producer.access_log import MalformedLine, read_access_log

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from redis.asyncio import Redis

TICK_S = 0.02
ZIPF_EXPONENT = 1.1


class Told(Enum):
    """How the views of an id are told. Each way counts each view once; by message alone it is at most once."""

    BOTH = "INCR and PUBLISH"
    INCR = "INCR only"
    PUBLISH = "PUBLISH only"


# Of ten ids, six, three and one.
SHARES = (Told.BOTH,) * 6 + (Told.INCR,) * 3 + (Told.PUBLISH,)


class Audience(Protocol):
    """What is watched. `ids` are all that may be."""

    @property
    def ids(self) -> Sequence[str]: ...

    def next(self, views: int) -> list[str]:
        """The ids of the next so many views."""


class Popular:
    """A thousand ids, the popular ones watched far more often than the rest (Zipf)."""

    def __init__(self, rng: random.Random) -> None:
        self.ids = [f"demo_{number:04}" for number in range(1, 1001)]
        self._rng = rng
        self._weights = list(itertools.accumulate(1 / rank**ZIPF_EXPONENT for rank in range(1, len(self.ids) + 1)))

    def next(self, views: int) -> list[str]:
        return self._rng.choices(self.ids, cum_weights=self._weights, k=views)


class Recorded:
    """The paths of an access log, in its order, over and over again."""

    def __init__(self, log: Path) -> None:
        """Raises ViewerWorkerError when there is no request in the file, or no file."""
        try:
            with log.open("rb") as stream:
                lines = [line for line in read_access_log(stream) if not isinstance(line, MalformedLine)]
        except OSError as error:
            raise ViewerWorkerError(f"{log} cannot be read: {error.strerror}") from None
        if not lines:
            raise ViewerWorkerError(f"{log} has no line in the combined log format")
        paths = [fitting_id(line.path) for line in lines]
        self.ids = list(dict.fromkeys(paths))
        self._paths = itertools.cycle(paths)

    def next(self, views: int) -> list[str]:
        return list(itertools.islice(self._paths, views))


class Viewers:
    """Sends `rate` views a second.

    `acknowledged` is what Redis confirmed, by id; `indeterminate` what was sent and not confirmed: it may have counted.
    """

    def __init__(self, redis: Redis, prefix: str, channel: str, audience: Audience, rate: int) -> None:
        self._redis = redis
        self._prefix = prefix
        self._channel = channel
        self._audience = audience
        self._rate = rate
        self.told = dict(zip(audience.ids, itertools.cycle(SHARES), strict=False))
        self.sent: Counter[str] = Counter()
        self.acknowledged: Counter[str] = Counter()
        self.indeterminate: Counter[str] = Counter()

    def ids(self, *told: Told) -> list[str]:
        """The ids whose views are told in one of these ways."""
        return [vod_id for vod_id, how in self.told.items() if how in told]

    async def run(self, stop: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        started, sent = loop.time(), 0
        while not stop.is_set():
            due = int((loop.time() - started) * self._rate) - sent
            if due > 0:
                await self._send(self._audience.next(due))
                sent += due
            await asyncio.sleep(TICK_S)

    async def _send(self, views: list[str]) -> None:
        self.sent.update(views)
        pipeline = self._redis.pipeline(transaction=False)
        for vod_id in views:
            told = self.told[vod_id]
            if told is not Told.PUBLISH:
                pipeline.incr(self._prefix + vod_id)
            if told is not Told.INCR:
                pipeline.publish(self._channel, json.dumps({"vodId": vod_id, "count": 1}))
        try:
            await pipeline.execute()
        except (RedisError, OSError):
            self.indeterminate.update(views)
        else:
            self.acknowledged.update(views)
