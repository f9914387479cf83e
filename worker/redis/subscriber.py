"""A subscription to one channel, read in batches."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import hiredis

from worker.errors import RedisUnavailable
from worker.redis.errors import NOT_REDIS, redis_errors, remedy_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio.connection import AbstractConnection

    from worker.redis.pool import Pool

READ_BYTES = 64 * 1024
# After this long without data, PING is sent. After as long again without an answer, the connection counts as lost.
SILENCE_S = 5.0
CONFIRM_S = 4.0


REFUSED = (
    "Give the user of REDIS_URL the right to subscribe to VIEW_CHANNEL; deploy/redis/users.acl has all that the worker "
    "needs. Counters are swept meanwhile; what is only published is lost."
)


class Subscription:
    """Every method raises RedisUnavailable when the connection is lost. Messages published after that are lost too.

    The library opens the connection (TLS, log-in, Sentinel). Reading through the library, message by message, is
    several times slower than reading all data that has arrived at once. Sending through it would reconnect a closed
    connection, without a subscription, and fails with AttributeError if another task closes it meanwhile.
    """

    def __init__(self, connection: AbstractConnection, channel: bytes, place: str) -> None:
        self._connection = connection
        self._place = place
        self._channel = channel
        # The pool hands out connections that are connected.
        assert connection._reader is not None  # noqa: S101
        assert connection._writer is not None  # noqa: S101
        self._stream, self._writer = connection._reader, connection._writer
        self._replies = hiredis.Reader(notEnoughData=_NOTHING)
        self._confirmed = False
        self._early: list[bytes] = []
        self._pinged = False
        self._closed = False
        self.ended = False

    async def read(self) -> list[bytes]:
        """The messages that have arrived, in order. Waits for some, but at most `SILENCE_S`, and then returns none.

        Sets `ended` when Redis has confirmed `unsubscribe`: no more messages follow.
        """
        if self._early:
            early, self._early = self._early, []
            return early
        data = await self._receive()
        if data is None:
            return []
        self._replies.feed(data)
        messages: list[bytes] = []
        gets, append = self._replies.gets, messages.append
        try:
            while (reply := gets()) is not _NOTHING:
                if isinstance(reply, list) and reply[0] == b"message":
                    append(reply[2])
                else:
                    self._note(reply)
        except hiredis.ProtocolError as error:
            cause = f"{self._place}: the reply is not valid in Redis's protocol: {error}"
            raise RedisUnavailable(cause, NOT_REDIS) from error
        return messages

    async def unsubscribe(self) -> None:
        """Ask Redis to end the subscription. Messages that were published before are still read."""
        await self._send("UNSUBSCRIBE", self._channel)

    async def close(self) -> None:
        """Abort the connection. A clean TLS close would wait for the other side, and `read` with it."""
        self._closed = True
        self._writer.transport.abort()
        await self._connection.disconnect(nowait=True)

    async def _subscribe(self) -> None:
        """Subscribe. Returns when Redis has confirmed it."""
        await self._send("SUBSCRIBE", self._channel)
        with redis_errors(self._place):
            async with asyncio.timeout(CONFIRM_S):
                while not self._confirmed:
                    self._early = await self.read()

    async def _receive(self) -> bytes | None:
        with redis_errors(self._place):
            try:
                async with asyncio.timeout(SILENCE_S):
                    data = await self._stream.read(READ_BYTES)
            except TimeoutError:
                if self._pinged:
                    raise
                self._pinged = True
                await self._send("PING")
                return None
        if not data:
            raise RedisUnavailable(f"{self._place}: the connection was closed")
        self._pinged = False
        return data

    def _note(self, reply: Any) -> None:
        """Handle a reply that is not a message: a confirmation, an answer to PING, a refusal."""
        if isinstance(reply, hiredis.ReplyError):
            remedy = REFUSED if str(reply).startswith("NOPERM") else remedy_for(reply)
            raise RedisUnavailable(f"{self._place}: {reply}", remedy)
        if isinstance(reply, list) and reply[0] == b"subscribe":
            self._confirmed = True
        elif isinstance(reply, list) and reply[0] == b"unsubscribe":
            self.ended = True

    async def _send(self, *command: str | bytes) -> None:
        if self._closed:
            raise RedisUnavailable(f"{self._place}: the connection was closed")
        with redis_errors(self._place):
            async with asyncio.timeout(CONFIRM_S):
                self._writer.writelines(self._connection.pack_command(*command))
                await self._writer.drain()


_NOTHING = object()


@asynccontextmanager
async def subscription(pool: Pool, channel: str) -> AsyncIterator[Subscription]:
    """Subscribe on a separate connection, and close it when the block ends. Raises RedisUnavailable.

    It is lost, too, when another command finds out that this is the wrong server: a replica also lets one subscribe.
    """
    generation = pool.generation
    async with pool.errors():
        connection = await pool.take()
    subscribed = Subscription(connection, channel.encode(), pool.place)
    pool.on_give_up.add(subscribed.close)
    try:
        if generation != pool.generation:
            await subscribed.close()
        await subscribed._subscribe()
        yield subscribed
    finally:
        pool.on_give_up.discard(subscribed.close)
        await subscribed.close()
        await pool.give_back(connection)
