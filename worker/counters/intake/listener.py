"""Listens to the channel while this worker holds the lease."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from worker.db.lease import NEEDS
from worker.errors import RedisUnavailable
from worker.observability.logs import get_logger
from worker.redis.subscriber import SILENCE_S
from worker.runtime.backoff import Backoff
from worker.runtime.waiting import wait_first

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.counters.intake.announced import Announced
    from worker.counters.intake.messages import Updates
    from worker.db.lease import Lease
    from worker.observability.metrics import Metrics
    from worker.observability.status import Status
    from worker.redis.client import RedisClient
    from worker.redis.subscriber import Subscription

log = get_logger(__name__)

CHECK = "messages"
GOODBYE_S = 1.0
# So many ids with unwritten sums do not wait for the interval.
FLUSH_AT_IDS = 50_000
BEAT_S = 4 * SILENCE_S + 60.0


class Listener:
    """`missed` is called when messages may have been missed, `full` when the sums should be flushed soon.

    `ended` is set after the stop, when everything that was published before it is in the sums.
    """

    def __init__(
        self,
        *,
        redis: RedisClient,
        channel: str,
        lease: Lease,
        announced: Announced,
        updates: Updates,
        status: Status,
        metrics: Metrics,
        missed: Callable[[], None],
        full: Callable[[], None],
        ended: asyncio.Event,
    ) -> None:
        self._redis = redis
        self._channel = channel
        self._lease = lease
        self._announced = announced
        self._updates = updates
        self._status = status
        self._metrics = metrics
        self._missed = missed
        self._full = full
        self._ended = ended
        self._backoff = Backoff(first=0.1, cap=5.0)
        self._heard_before = False

    async def run(self, stop: asyncio.Event) -> None:
        try:
            while not stop.is_set():
                await self._wait_for_lease(stop)
                if (epoch := self._lease.epoch) is None or stop.is_set():
                    continue
                try:
                    await self._listen(epoch, stop)
                except RedisUnavailable as error:
                    self._status.failing(CHECK, str(error), error.remedy)
                    await wait_first(self._backoff.next(), stop)
        finally:
            self._ended.set()

    async def _wait_for_lease(self, stop: asyncio.Event) -> None:
        while not stop.is_set() and not (self._lease.epoch is not None and self._status.is_ok(*NEEDS)):
            if self._lease.epoch is None and self._status.is_ok(*NEEDS):
                self._status.ok(CHECK, role="standing by")
            self._status.expect_beat(CHECK, within=BEAT_S)
            await wait_first(5.0, stop, self._status.changed, self._lease.changed)

    async def _listen(self, epoch: int, stop: asyncio.Event) -> None:
        """Subscribe, and sum up what comes, until stopped or until the lease is another's."""
        self._announced.begin(epoch)
        async with self._redis.subscription(self._channel) as subscription:
            self._subscribed(epoch)
            leave = asyncio.create_task(self._leave(epoch, subscription, stop), name="unsubscribe")
            try:
                while not subscription.ended:
                    messages = await subscription.read()
                    self._status.expect_beat(CHECK, within=BEAT_S)
                    if messages:
                        self._take(messages)
            except RedisUnavailable:
                # After a goodbye without an answer the link was closed here.
                if not self._is_over(epoch, stop):
                    raise
            finally:
                leave.cancel()

    def _subscribed(self, epoch: int) -> None:
        # Whoever held the lease before heard messages up to some moment; what came after it, nobody did.
        gap = self._heard_before or epoch > 1
        log.info("listening", channel=self._channel, gap=gap)
        if gap:
            self._metrics.subscription_gaps.inc()
            self._missed()
        self._heard_before = True
        self._backoff.reset()
        self._status.ok(CHECK, role="listening")

    def _take(self, messages: list[bytes]) -> None:
        before = len(self._announced)
        self._announced.add(self._updates.sum(messages))
        if before < FLUSH_AT_IDS <= len(self._announced):
            self._full()

    def _is_over(self, epoch: int, stop: asyncio.Event) -> bool:
        return stop.is_set() or self._lease.epoch != epoch

    async def _leave(self, epoch: int, subscription: Subscription, stop: asyncio.Event) -> None:
        while not self._is_over(epoch, stop):
            await wait_first(3600.0, stop, self._lease.changed)
        with contextlib.suppress(RedisUnavailable):
            await subscription.unsubscribe()
            await asyncio.sleep(GOODBYE_S)
        await subscription.close()
