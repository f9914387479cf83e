"""Generates views for the demo, and keeps count of them by id."""

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


class Reported(Enum):
    """How the views of an id are reported. Each view counts once; with PUBLISH only, at most once."""

    BOTH = "INCR and PUBLISH"
    INCR = "INCR only"
    PUBLISH = "PUBLISH only"


# How ten ids in a row are reported: six, three and one of them.
SHARES = (Reported.BOTH,) * 6 + (Reported.INCR,) * 3 + (Reported.PUBLISH,)


class Audience(Protocol):
    """Chooses the ids that are viewed. `ids` are all that it may choose."""

    @property
    def ids(self) -> Sequence[str]: ...

    def next(self, views: int) -> list[str]:
        """Return the ids of the next views, one id for each of `views`."""


class Popular:
    """A thousand ids. A few popular ones get most of the views (Zipf distribution)."""

    def __init__(self, rng: random.Random) -> None:
        self.ids = [f"demo_{number:04}" for number in range(1, 1001)]
        self._rng = rng
        self._weights = list(itertools.accumulate(1 / rank**ZIPF_EXPONENT for rank in range(1, len(self.ids) + 1)))

    def next(self, views: int) -> list[str]:
        return self._rng.choices(self.ids, cum_weights=self._weights, k=views)


class Recorded:
    """The paths of an access log, in the order of the log, repeated without end."""

    def __init__(self, log: Path) -> None:
        """Raises ViewerWorkerError when the file cannot be read or has no request."""
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
    """Sends `rate` views per second.

    Views by id: `sent`, `acknowledged` (Redis confirmed them) and `indeterminate` (not confirmed: they may be counted
    or not).
    """

    def __init__(self, redis: Redis, prefix: str, channel: str, audience: Audience, rate: int) -> None:
        self._redis = redis
        self._prefix = prefix
        self._channel = channel
        self._audience = audience
        self._rate = rate
        self.reported_by = dict(zip(audience.ids, itertools.cycle(SHARES), strict=False))
        self.sent: Counter[str] = Counter()
        self.acknowledged: Counter[str] = Counter()
        self.indeterminate: Counter[str] = Counter()

    def ids(self, *reported: Reported) -> list[str]:
        """Return the ids whose views are reported in one of these ways."""
        return [vod_id for vod_id, how in self.reported_by.items() if how in reported]

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
            reported = self.reported_by[vod_id]
            if reported is not Reported.PUBLISH:
                pipeline.incr(self._prefix + vod_id)
            if reported is not Reported.INCR:
                pipeline.publish(self._channel, json.dumps({"vodId": vod_id, "count": 1}))
        try:
            await pipeline.execute()
        except (RedisError, OSError):
            self.indeterminate.update(views)
        else:
            self.acknowledged.update(views)
