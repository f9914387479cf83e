"""Listens to a channel while this worker holds a lease."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from worker.errors import NotDrained, RedisUnavailable
from worker.observability.logs import get_logger
from worker.redis.subscriber import SILENCE_S
from worker.runtime.backoff import Backoff
from worker.runtime.waiting import wait_first

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.observability.status import Status
    from worker.redis.client import RedisClient
    from worker.redis.subscriber import Subscription

log = get_logger(__name__)

# A Redis that sends nothing for so long, and has not confirmed UNSUBSCRIBE either, does not answer.
UNSUBSCRIBE_S = 1.0
# Within the lease, which is not renewed after the stop.
MAX_DRAIN_S = 4.0
BEAT_S = 4 * SILENCE_S + 60.0

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


def listen_timeout(shutdown_timeout: float) -> float:
    """Seconds for which a listener reads after the stop: half of the time, since what it reads must be written, too."""
    return min(shutdown_timeout / 2, MAX_DRAIN_S)


class HeldLease(Protocol[T]):
    """Held while `token` is not None; each takeover has its own. `changed` is set when the token changes."""

    token: T | None
    changed: asyncio.Event

    async def wait(self, stop: asyncio.Event, loop: str, standing_by: Callable[[str], None]) -> bool:
        """Wait until it is held and can be used; False when stopped before that.

        `standing_by` is called with the holder.
        """


class Receiver(Protocol[T_contra]):
    """Takes what is heard. No method waits."""

    def begin(self, token: T_contra) -> bool:
        """This worker subscribes, by the lease with this token. True: another holder has listened before."""

    def missed(self) -> None:
        """This worker listens again, or as the next one: nobody heard what was published meanwhile."""

    def receive(self, messages: list[bytes]) -> None:
        """In their order. From time to time there are none."""

    def end(self) -> None:
        """After the stop: everything that was published before it was received."""


class Listener(Generic[T]):
    """`name` is that of its loop and of its check.

    After the stop it reads what was published before, for up to `drain_timeout` seconds.
    """

    def __init__(
        self,
        *,
        name: str,
        redis: RedisClient,
        channel: str,
        lease: HeldLease[T],
        receiver: Receiver[T],
        status: Status,
        drain_timeout: float,
    ) -> None:
        self._name = name
        self._redis = redis
        self._channel = channel
        self._lease = lease
        self._receiver = receiver
        self._status = status
        self._drain_timeout = drain_timeout
        self._reads = 0
        self._backoff = Backoff(first=0.1, cap=5.0)
        self._heard_before = False

    async def run(self, stop: asyncio.Event) -> None:
        """Listen until `stop`. Raises NotDrained if messages that were published before it may be left."""
        try:
            while await self._lease.wait(stop, self._name, self._standing_by):
                if (token := self._lease.token) is None:
                    continue
                try:
                    await self._listen(token, stop)
                except RedisUnavailable as error:
                    self._status.failing(self._name, str(error), error.remedy)
                    await wait_first(self._backoff.next(), stop)
        finally:
            self._receiver.end()

    def _standing_by(self, holder: str) -> None:
        self._status.ok(self._name, role="standing by", holder=holder)

    async def _listen(self, token: T, stop: asyncio.Event) -> None:
        """Subscribe, and pass on what comes, until stopped or until another worker has the lease."""
        # The former holder of the lease heard messages up to some moment; nobody heard those between then and now.
        gap = self._receiver.begin(token) or self._heard_before
        async with self._redis.subscription(self._channel) as subscription:
            self._subscribed(gap)
            leave = asyncio.create_task(self._unsubscribe_when_over(token, subscription, stop), name="unsubscribe")
            try:
                while not subscription.ended:
                    messages = await subscription.read()
                    self._reads += 1
                    self._status.expect_beat(self._name, within=BEAT_S)
                    self._receiver.receive(messages)
            except RedisUnavailable as error:
                if stop.is_set():
                    self._receiver.missed()
                    raise NotDrained("messages that were published before the stop may be lost") from error
                # When another worker has the lease, `_unsubscribe_when_over` closed the connection.
                if self._lease.token == token:
                    raise
            finally:
                leave.cancel()

    def _subscribed(self, gap: bool) -> None:
        log.info("listening", loop=self._name, channel=self._channel, gap=gap)
        if gap:
            self._receiver.missed()
        self._heard_before = True
        self._backoff.reset()
        self._status.ok(self._name, role="listening")

    async def _unsubscribe_when_over(self, token: T, subscription: Subscription, stop: asyncio.Event) -> None:
        while not stop.is_set() and self._lease.token == token:
            await wait_first(3600.0, stop, self._lease.changed)
        if stop.is_set():
            with contextlib.suppress(RedisUnavailable, TimeoutError):
                async with asyncio.timeout(self._drain_timeout):
                    await subscription.unsubscribe()
                    await self._silence()
        await subscription.close()

    async def _silence(self) -> None:
        """Wait until nothing was read for a while."""
        reads = -1
        while reads != self._reads:
            reads = self._reads
            await asyncio.sleep(UNSUBSCRIBE_S)
