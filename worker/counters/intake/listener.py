"""Listens to the channel while this worker holds the lease."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Protocol

from worker.errors import RedisUnavailable
from worker.observability.logs import get_logger
from worker.observability.status import MESSAGES
from worker.redis.subscriber import SILENCE_S
from worker.runtime.backoff import Backoff
from worker.runtime.waiting import wait_first

if TYPE_CHECKING:
    from worker.counters.intake.announced import Announced
    from worker.counters.intake.messages import MessageSummer
    from worker.db.lease import Lease
    from worker.observability.metrics import Metrics
    from worker.observability.status import Status
    from worker.redis.client import RedisClient
    from worker.redis.subscriber import Subscription

log = get_logger(__name__)

UNSUBSCRIBE_S = 1.0
# So many ids with unwritten sums do not wait for the interval.
FLUSH_AT_IDS = 50_000
BEAT_S = 4 * SILENCE_S + 60.0


class Flushing(Protocol):
    """The loop that flushes what is heard."""

    def sweep_soon(self) -> None:
        """Messages may have been missed."""

    def flush_soon(self) -> None:
        """There are many sums to write."""


class Listener:
    """Adds what it hears to `announced`.

    It sets `announced.ended` after the stop, when everything that was published before the stop is in the sums.
    """

    def __init__(
        self,
        *,
        redis: RedisClient,
        channel: str,
        lease: Lease[int],
        announced: Announced,
        messages: MessageSummer,
        flushing: Flushing,
        status: Status,
        metrics: Metrics,
    ) -> None:
        self._redis = redis
        self._channel = channel
        self._lease = lease
        self._announced = announced
        self._messages = messages
        self._flushing = flushing
        self._status = status
        self._metrics = metrics
        self._backoff = Backoff(first=0.1, cap=5.0)
        self._heard_before = False

    async def run(self, stop: asyncio.Event) -> None:
        try:
            while await self._lease.wait(stop, MESSAGES, self._standing_by):
                if (epoch := self._lease.token) is None:
                    continue
                try:
                    await self._listen(epoch, stop)
                except RedisUnavailable as error:
                    self._status.failing(MESSAGES, str(error), error.remedy)
                    await wait_first(self._backoff.next(), stop)
        finally:
            self._announced.ended.set()

    def _standing_by(self) -> None:
        self._status.ok(MESSAGES, role="standing by")

    async def _listen(self, epoch: int, stop: asyncio.Event) -> None:
        """Subscribe, and sum what comes, until stopped or until another worker has the lease."""
        self._announced.begin(epoch)
        async with self._redis.subscription(self._channel) as subscription:
            self._subscribed(epoch)
            leave = asyncio.create_task(self._unsubscribe_when_over(epoch, subscription, stop), name="unsubscribe")
            try:
                while not subscription.ended:
                    messages = await subscription.read()
                    self._status.expect_beat(MESSAGES, within=BEAT_S)
                    if messages:
                        self._add(messages)
            except RedisUnavailable:
                # When UNSUBSCRIBE was not answered, `_unsubscribe_when_over` closed the connection.
                if not self._is_over(epoch, stop):
                    raise
            finally:
                leave.cancel()

    def _subscribed(self, epoch: int) -> None:
        # The former holder of the lease heard messages up to some moment; nobody heard those between then and now.
        gap = self._heard_before or epoch > 1
        log.info("listening", channel=self._channel, gap=gap)
        if gap:
            self._metrics.subscription_gaps.inc()
            self._flushing.sweep_soon()
        self._heard_before = True
        self._backoff.reset()
        self._status.ok(MESSAGES, role="listening")

    def _add(self, messages: list[bytes]) -> None:
        before = len(self._announced)
        self._announced.add(self._messages.sum(messages))
        if before < FLUSH_AT_IDS <= len(self._announced):
            self._flushing.flush_soon()

    def _is_over(self, epoch: int, stop: asyncio.Event) -> bool:
        return stop.is_set() or self._lease.token != epoch

    async def _unsubscribe_when_over(self, epoch: int, subscription: Subscription, stop: asyncio.Event) -> None:
        while not self._is_over(epoch, stop):
            await wait_first(3600.0, stop, self._lease.changed)
        with contextlib.suppress(RedisUnavailable):
            await subscription.unsubscribe()
            await asyncio.sleep(UNSUBSCRIBE_S)
        await subscription.close()
