"""A connection of one stream's reader: several commands in one round trip, with the replies as Redis sent them."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from worker.redis.errors import redis_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio import ConnectionPool

Command = tuple["str | bytes | int", ...]


class StreamConnection:
    """Opened at the first use, and again after `drop`. `opened` counts how often.

    Raises RedisUnavailable from every method when Redis cannot be used; the connection is dropped then.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool: Any = pool
        self._connection: Any = None
        self.opened = 0

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    async def send(self, commands: Sequence[Command], timeout: float) -> list[Any]:
        """The replies, in order; a command that Redis refuses has its ResponseError as reply. `timeout` is seconds."""
        done = False
        try:
            with redis_errors():
                async with asyncio.timeout(timeout):
                    if self._connection is None:
                        self._connection = await self._pool.get_connection()
                        self.opened += 1
                    await self._connection.send_packed_command(
                        self._connection.pack_commands(commands), check_health=False
                    )
                    replies = [await self._reply() for _ in commands]
            done = True
        finally:
            if not done:
                await self.drop()
        return replies

    async def _reply(self) -> Any:
        try:
            return await self._connection.read_response(timeout=math.inf)
        except ResponseError as error:
            return error

    async def drop(self) -> None:
        """Close the connection: replies may be outstanding, or it is to the wrong server."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)
            await self._pool.release(connection)
