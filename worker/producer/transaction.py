"""Sends MULTI … EXEC once, as one write on one connection, and works out what the replies prove.

The library's own pipeline raises the same errors before the first byte is sent as after the last. Whether a view was
recorded depends on that, so this module first takes a connection and then writes to it. For the same reason, no setting
of the client can make it repeat the commands.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Any, cast

import redis
import redis.asyncio as aioredis
from redis.exceptions import ExecAbortError, ReadOnlyError, RedisError, ResponseError

from worker.errors import ViewerWorkerError, ViewIndeterminate, ViewNotRecorded
from worker.redis.errors import describe, redact, remedy_for
from worker.redis.pool import is_of_wrong_server, renew, renew_blocking

Command = tuple[str | bytes | int, ...]

# Errors of the library and the system. Any other error is the application's own, such as a task's time limit, which a
# signal handler may raise anywhere.
ERRORS = (RedisError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


class Transactions:
    """Runs at most `max_connections` transactions at a time. `timeout` (seconds) limits each as a whole."""

    def __init__(self, client: aioredis.Redis, timeout: float, max_connections: int) -> None:
        self._pool: Any = client.connection_pool
        self._timeout = timeout
        self._free = asyncio.Semaphore(max_connections)

    async def execute(self, commands: Sequence[Command]) -> None:
        """Returns when every command was applied.

        Raises ViewNotRecorded when certainly none was, ViewIndeterminate when that is not known.
        """
        sent = answered = False
        try:
            async with asyncio.timeout(self._timeout), self._free:
                connection = await self._pool.get_connection()
                try:
                    # A pool with maintenance notifications hands out connections with unread data or already closed.
                    if await connection.can_read():
                        await connection.disconnect()
                        await connection.connect()
                    packed = connection.pack_commands([("MULTI",), *commands, ("EXEC",)])
                    sent = True
                    await connection.send_packed_command(packed, check_health=False)
                    replies = await _replies(connection, len(commands) + 2)
                    answered = True
                finally:
                    if sent and not answered:  # the next user of the connection would read these replies
                        await connection.disconnect(nowait=True)
                    await self._pool.release(connection)
        except ERRORS as error:
            raise _failure(error, sent) from error
        if any(map(is_of_wrong_server, replies)):
            await renew(self._pool)
        raise_unless_applied(replies, len(commands))


async def _replies(connection: Any, expected: int) -> list[object]:
    replies: list[object] = []
    while len(replies) < expected and not _is_last(replies):
        try:
            replies.append(await connection.read_response())
        except RedisError as error:
            replies.append(error)
    return replies


class BlockingTransactions:
    """`Transactions` for threads. `timeout` limits the wait for a free connection; `client` limits those for Redis."""

    def __init__(self, client: redis.Redis, timeout: float, max_connections: int) -> None:
        self._pool: Any = client.connection_pool
        self._timeout = timeout
        self._permits = Permits(max_connections)

    def execute(self, commands: Sequence[Command]) -> None:
        """As `Transactions.execute`."""
        permit = self._permits.take(self._timeout)
        if permit is None:
            raise ViewNotRecorded("no connection became free in time")
        sent = answered = False
        try:
            connection = self._pool.get_connection()
            try:
                if connection.can_read():
                    connection.disconnect()
                    connection.connect()
                packed = connection.pack_commands([("MULTI",), *commands, ("EXEC",)])
                sent = True
                connection.send_packed_command(packed, check_health=False)
                replies = _blocking_replies(connection, len(commands) + 2)
                answered = True
            finally:
                if sent and not answered:
                    connection.disconnect()
                self._pool.release(connection)
        except ERRORS as error:
            raise _failure(error, sent) from error
        finally:
            permit.give_back()
        if any(map(is_of_wrong_server, replies)):
            renew_blocking(self._pool)
        raise_unless_applied(replies, len(commands))


class Permits:
    """Limits the number of concurrent calls. A forked child starts with all permits.

    A call that is interrupted at any point gives its permit back. A semaphore of `threading` is written in Python: an
    exception from a signal handler can leave its lock taken for ever. This queue is written in C, and is safe to use in
    a destructor.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._refill()

    def _refill(self) -> None:
        self._process = os.getpid()
        self._free: SimpleQueue[_Permit] = SimpleQueue()
        for _ in range(self._number):
            self._free.put(_Permit(self._free))

    def take(self, timeout: float) -> _Permit | None:
        """A permit, or None when none became free within `timeout` seconds."""
        if self._process != os.getpid():
            self._refill()
        try:
            return self._free.get(timeout=timeout)
        except Empty:
            return None


class _Permit:
    """Give it back once. If the call is interrupted before that, the destructor does it."""

    def __init__(self, free: SimpleQueue[_Permit]) -> None:
        self._free = weakref.ref(free)
        self._given_back = False

    def give_back(self) -> None:
        free = self._free()
        if free is not None and not self._given_back:
            self._given_back = True
            free.put(_Permit(free))

    __del__ = give_back


def _blocking_replies(connection: Any, expected: int) -> list[object]:
    replies: list[object] = []
    while len(replies) < expected and not _is_last(replies):
        try:
            replies.append(connection.read_response())
        except RedisError as error:
            replies.append(error)
    return replies


def _is_last(replies: Sequence[object]) -> bool:
    """True after any error other than a refusal by Redis: the connection is closed then."""
    return bool(replies) and isinstance(replies[-1], Exception) and not isinstance(replies[-1], ResponseError)


def _failure(error: Exception, sent: bool) -> ViewerWorkerError:
    redact(error)
    return (ViewIndeterminate if sent else ViewNotRecorded)(describe(error), remedy_for(error))


def raise_unless_applied(replies: Sequence[object], commands: int) -> None:
    """Raise unless the replies to MULTI, `commands` and EXEC prove that every command was applied.

    If an exception ended the replies early, it is the last of them. Raises as `Transactions.execute`.
    """
    if _each_ran_by_itself(replies, commands):
        return
    results = replies[-1] if len(replies) == commands + 2 else None
    applied = cast("Sequence[object]", results) if isinstance(results, list) else ()
    errors = [reply for reply in (*replies, *applied) if isinstance(reply, Exception)]
    if not errors and len(applied) == commands:
        return
    cause = errors[0] if errors else None
    failure = ViewNotRecorded if _nothing_was_applied(replies, commands) else ViewIndeterminate
    if cause is None:
        raise failure("no answer to EXEC")
    raise failure(describe(cause), remedy_for(cause)) from cause


def _each_ran_by_itself(replies: Sequence[object], commands: int) -> bool:
    """True if the user lacks the right to MULTI and EXEC: both are refused, and the commands are applied one by one."""
    if len(replies) != commands + 2:
        return False
    multi, *results, exec_ = replies
    return _is_refusal(multi) and _is_refusal(exec_) and not any(isinstance(result, Exception) for result in results)


def _nothing_was_applied(replies: Sequence[object], commands: int) -> bool:
    """True if nothing ran. A command that is refused while queued aborts all; without MULTI, each runs by itself."""
    multi, *queued = replies[: commands + 1]
    if isinstance(multi, Exception):
        return all(map(_is_refusal, replies))
    return isinstance(replies[-1], ExecAbortError) or any(map(_is_refusal, queued))


def _is_refusal(reply: object) -> bool:
    """True if the server sent this error. The library makes some of them (LOADING, NOAUTH) connection errors."""
    if not isinstance(reply, RedisError):
        return False
    from_server = isinstance(reply, ResponseError) or getattr(reply, "status_code", None) is not None
    # Behind Sentinel, the library turns READONLY into a lost connection.
    return from_server or isinstance(reply.__context__, ReadOnlyError)
