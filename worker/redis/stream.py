"""A connection of one stream's reader: several commands in one round trip, with the replies as Redis sent them."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from worker.redis.pool import is_of_wrong_server

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.redis.pool import Pool

Command = tuple["str | bytes | int", ...]


class StreamConnection:
    """Opened at the first use, and again after `drop`. `opened` counts how often.

    Raises RedisUnavailable from every method when Redis cannot be used; the connection is dropped then.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._connection: Any = None
        self._generation = pool.generation
        self.opened = 0

    @property
    def place(self) -> str:
        """Where it leads to, for messages."""
        return self._pool.place

    @property
    def is_open(self) -> bool:
        """False also when the server has turned out to be the wrong one since."""
        return self._connection is not None and self._generation == self._pool.generation

    async def send(self, commands: Sequence[Command], timeout: float) -> list[Any]:
        """The replies, in order; a command that Redis refuses has its ResponseError as reply. `timeout` is seconds."""
        if not self.is_open:
            await self.drop()
        done = False
        try:
            async with self._pool.errors(), asyncio.timeout(timeout):
                if self._connection is None:
                    self._generation = self._pool.generation
                    self._connection = await self._pool.take()
                    self.opened += 1
                await self._connection.send_packed_command(self._connection.pack_commands(commands), check_health=False)
                replies = [await self._reply() for _ in commands]
            done = True
        finally:
            if not done:
                await self.drop()
        if any(map(is_of_wrong_server, replies)):
            await self._pool.give_up(self._generation)
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
            await self._pool.give_back(connection)
