"""Gives up the connections to a server that has turned out to be the wrong one.

A name (DNS, a Service, a proxy) that moves to the new master leads new connections there. The open ones stay with the
old master, which answers as a replica for as long as it runs.
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from worker.errors import RedisUnavailable
from worker.redis.errors import redis_errors, text_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from redis.asyncio import ConnectionPool

# Errors after which a new connection may reach a server that accepts the command. READONLY: a replica. UNBLOCKED: it
# became one while a command waited. LOADING: it has just started, perhaps another one took over. MASTERDOWN: a replica
# without its master. NOREPLICAS: perhaps a master that is cut off from the others. Not MISCONF, OOM, BUSY, NOPERM: the
# right server says so, too.
_CODES = "READONLY|UNBLOCKED|LOADING|MASTERDOWN|NOREPLICAS"
# Also as the cause that EXECABORT, or a script on Redis 6, names.
_WRONG_SERVER = re.compile(rf"(?:^|: -?)(?:{_CODES})\b")


class Pool:
    """The connections of one client. A connection belongs to the `generation` in which it was opened.

    `place`: where they lead to, for messages.

    Those of the library's pool are closed when they are idle or returned; every other one asks for the generation, or
    is closed by its function in `on_give_up`.
    """

    def __init__(self, connections: ConnectionPool, place: str) -> None:
        self._connections: Any = connections
        self.place = place
        self.generation = 0
        self.on_give_up: set[Callable[[], Awaitable[None]]] = set()

    async def take(self) -> Any:
        """A connection that is connected. Give it back."""
        return await self._connections.get_connection()

    async def give_back(self, connection: Any) -> None:
        await self._connections.release(connection)

    @asynccontextmanager
    async def errors(self) -> AsyncIterator[None]:
        """As `redis_errors`. After an error of the wrong server, the next command opens a connection."""
        generation = self.generation
        try:
            with redis_errors(self.place):
                yield
        except RedisUnavailable as error:
            if is_of_wrong_server(error):
                await self.give_up(generation)
            raise

    async def give_up(self, generation: int) -> None:
        """Give up the connections of this generation, unless that is done already."""
        if generation != self.generation:
            return
        self.generation += 1
        await renew(self._connections)
        for close in tuple(self.on_give_up):
            await close()


def is_of_wrong_server(reply: object) -> bool:
    """True for an error of Redis, or a reply to EXEC with one, that means: connect again, and resolve the name."""
    if isinstance(reply, list):
        return any(map(is_of_wrong_server, reply))
    error = reply if isinstance(reply, BaseException) else None
    while error is not None:
        if _WRONG_SERVER.search(text_of(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


async def renew(connections: Any) -> None:
    """Close the connections of a pool: idle ones now, those in use when they are returned to it."""
    await connections.update_active_connections_for_reconnect()
    # Not by the pool's `disconnect`: while that waits, another task may take a connection that is being closed.
    for connection in tuple(connections._available_connections):
        await connection.disconnect(nowait=True)


def renew_blocking(connections: Any) -> None:
    """`renew`, but for threads."""
    connections.update_active_connections_for_reconnect()
    connections.disconnect(inuse_connections=False)
