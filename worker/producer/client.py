"""The client library: records views without harm to the application when Redis is slow or out of reach."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from enum import Enum
from types import TracebackType
from typing import Self

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from worker.contract.ids import InvalidId, check_id
from worker.contract.keys import DEFAULT_PREFIX, Keys
from worker.contract.message import DEFAULT_CHANNEL, MAX_COUNT, encode_message
from worker.errors import InvalidView, ViewerWorkerError, ViewIndeterminate, ViewNotRecorded
from worker.observability.throttle import Throttle
from worker.producer.transaction import BlockingTransactions, Command, Transactions
from worker.redis.address import parse_redis_url
from worker.redis.connection import connect, connect_blocking
from worker.runtime.clock import Clock, SystemClock

TIMEOUT_S = 0.5
MAX_CONNECTIONS = 16
LOG_PERIOD_S = 60.0
CLOSED = "the producer is closed"

Views = Mapping[str, int] | Mapping[int, int] | Mapping[str | int, int]

log = logging.getLogger("worker.producer")


class Outcome(Enum):
    """The result of a call, for all of its views."""

    RECORDED = "recorded"
    """Redis confirmed all of it."""
    NOT_RECORDED = "not recorded"
    """Nothing was applied. It may be sent again."""
    INDETERMINATE = "indeterminate"
    """It was sent and not confirmed: it may have counted or not. Sending it again may count it twice."""


class ViewProducer:
    """Records views from asyncio code, on one event loop.

    `redis` is a URL (`redis://`, `rediss://`, `unix://`, `redis+sentinel://`), or a `redis.asyncio.Redis` of the
    application, which stays open; commands are never repeated, whatever its retry setting. `timeout` (seconds) is for
    each call as a whole. With `raise_errors` a call raises ViewNotRecorded or ViewIndeterminate instead of returning
    the outcome.

    Raises ValueError for an invalid URL, without quoting it, and TypeError for any other client.
    """

    def __init__(
        self,
        redis: str | AsyncRedis,
        *,
        prefix: str = DEFAULT_PREFIX,
        channel: str = DEFAULT_CHANNEL,
        timeout: float = TIMEOUT_S,
        max_connections: int = MAX_CONNECTIONS,
        raise_errors: bool = False,
    ) -> None:
        self._opened: list[AsyncRedis] = []
        if isinstance(redis, str):
            redis, sentinels = connect(parse_redis_url(redis), None, timeout)
            self._opened = [redis, *sentinels]
        elif not isinstance(redis, AsyncRedis):
            raise TypeError(f"expected a URL or a redis.asyncio.Redis, not a {type(redis).__name__}")
        self._transactions = Transactions(redis, timeout, max_connections)
        self._views = _ViewCommands(prefix, channel)
        self._failures = Failures(raise_errors, SystemClock())
        self._closed = False

    async def record(self, vod_id: str | int, count: int = 1) -> Outcome:
        """Record `count` views (1 … 10^9) of an id: 1 to 256 bytes of UTF-8 without NUL, or an int for its decimals."""
        return await self._send(lambda: self._views.of_one(vod_id, count))

    async def record_many(self, views: Views) -> Outcome:
        """Record views of many ids, some thousands at most, in one transaction; if one is invalid, nothing is sent."""
        return await self._send(lambda: self._views.of_many(views))

    async def _send(self, make: Callable[[], list[Command]]) -> Outcome:
        try:
            if commands := make():
                if self._closed:
                    raise ViewNotRecorded(CLOSED)
                await self._transactions.execute(commands)
        except (ViewNotRecorded, ViewIndeterminate) as error:
            return self._failures.outcome(error)
        return Outcome.RECORDED

    async def aclose(self) -> None:
        self._closed = True
        for client in self._opened:
            await client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class SyncViewProducer:
    """`ViewProducer` for threads. `redis` may be a `redis.Redis`, whose own timeouts then apply.

    `timeout` (seconds) is for each wait: for a free connection, for connecting, for an answer.
    """

    def __init__(
        self,
        redis: str | Redis,
        *,
        prefix: str = DEFAULT_PREFIX,
        channel: str = DEFAULT_CHANNEL,
        timeout: float = TIMEOUT_S,
        max_connections: int = MAX_CONNECTIONS,
        raise_errors: bool = False,
    ) -> None:
        self._opened: list[Redis] = []
        if isinstance(redis, str):
            redis, sentinels = connect_blocking(parse_redis_url(redis), timeout, timeout)
            self._opened = [redis, *sentinels]
        elif not isinstance(redis, Redis):
            raise TypeError(f"expected a URL or a redis.Redis, not a {type(redis).__name__}")
        self._transactions = BlockingTransactions(redis, timeout, max_connections)
        self._views = _ViewCommands(prefix, channel)
        self._failures = Failures(raise_errors, SystemClock())
        self._closed = False

    def record(self, vod_id: str | int, count: int = 1) -> Outcome:
        """As in `ViewProducer`."""
        return self._send(lambda: self._views.of_one(vod_id, count))

    def record_many(self, views: Views) -> Outcome:
        """As in `ViewProducer`."""
        return self._send(lambda: self._views.of_many(views))

    def _send(self, make: Callable[[], list[Command]]) -> Outcome:
        try:
            if commands := make():
                if self._closed:
                    raise ViewNotRecorded(CLOSED)
                self._transactions.execute(commands)
        except (ViewNotRecorded, ViewIndeterminate) as error:
            return self._failures.outcome(error)
        return Outcome.RECORDED

    def close(self) -> None:
        self._closed = True
        for client in self._opened:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _ViewCommands:
    """A view is INCRBY of its counter, then a message on the channel."""

    def __init__(self, prefix: str, channel: str) -> None:
        self._keys = Keys(prefix.encode())
        self._channel = channel

    def of_many(self, views: object) -> list[Command]:
        """Raises InvalidView for the first invalid view."""
        if not isinstance(views, Mapping):
            raise InvalidView(f"views are a mapping of ids to counts, not a {type(views).__name__}")
        return [command for vod_id, count in views.items() for command in self.of_one(vod_id, count)]

    def of_one(self, vod_id: object, count: object) -> list[Command]:
        """Raises InvalidView."""
        try:
            text = check_id(vod_id)
        except InvalidId as error:
            raise InvalidView(str(error)) from error
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_COUNT:
            raise InvalidView(f"a count is an int from 1 to {MAX_COUNT:,}")
        message = encode_message(text, count)
        return [("INCRBY", self._keys.counter(text), count), ("PUBLISH", self._channel, message)]


class Failures:
    """Raises the errors of calls, or logs each kind once a minute."""

    def __init__(self, raise_errors: bool, clock: Clock) -> None:
        self._raise_errors = raise_errors
        self._throttle = Throttle(LOG_PERIOD_S, clock.monotonic)

    def outcome(self, error: ViewerWorkerError) -> Outcome:
        if self._raise_errors:
            raise error
        outcome = Outcome.INDETERMINATE if isinstance(error, ViewIndeterminate) else Outcome.NOT_RECORDED
        if self._throttle.allows((type(error), type(error.__cause__))):
            log.warning("a view is %s: %s (similar failures are not logged for a minute)", outcome.value, error)
        return outcome
