"""Appends entries to streams. Calls that come together share a round trip."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from redis.exceptions import ResponseError

from worker.errors import AppendUnanswered, NotAppended, RedisUnavailable, StreamFull
from worker.redis.errors import NOT_REDIS, describe, remedy_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.redis.stream import Command, StreamConnection
    from worker.runtime.clock import Clock

# Entries of one round trip: their replies come within milliseconds.
MAX_ENTRIES = 1000
TIMEOUT_S = 4.0
# How old the number of waiting entries may be.
FRESH_S = 0.1
# How often to look while nobody calls.
LOOK_AGAIN_S = 5.0
_NO_KEY = "no such key"
# Redis refuses this id after all else that it checks (rights, memory, its role), so nothing is appended.
_NO_ID = "0-0"
_WRONG_ID = "The ID specified in XADD"
# Errors of Redis that have no class of their own. A proxy may send others after Redis has appended the entry.
_REFUSALS = ("WRONGTYPE ", "MISCONF ", "NOREPLICAS ", "BUSY ")
_ID = re.compile(rb"\d+-\d+")


class AppendReport(Protocol):
    """Where the state of an appender is shown."""

    async def works(self) -> None:
        """Entries can be appended."""

    async def fails(self, error: RedisUnavailable) -> None:
        """Redis cannot be reached, or refuses."""


class _Waiting(NamedTuple):
    document: bytes
    appended: asyncio.Future[None]


class StreamAppender:
    """Appends each document to one of `streams`, in turn, as the value of `field`.

    `limit`: how many entries of these streams may wait to be carried by `group`. `append` works while `run` does.
    """

    def __init__(
        self,
        connection: StreamConnection,
        *,
        streams: Sequence[str],
        field: str,
        group: str,
        limit: int,
        report: AppendReport,
        clock: Clock,
    ) -> None:
        self._connection = connection
        self._streams = streams
        self._turn = cycle(streams)
        self._field = field
        self._group = group
        self._limit = limit
        self._report = report
        self._clock = clock
        self._waiting: deque[_Waiting] = deque()
        self._called = asyncio.Event()
        self._uncarried = 0
        self._looked_at = float("-inf")
        self._works = False

    async def append(self, document: bytes) -> None:
        """Returns when Redis has stored the entry.

        Raises StreamFull and NotAppended where certainly nothing is stored, and AppendUnanswered where that is not
        known; so it is, too, when the call is cancelled.
        """
        if len(self._waiting) >= self._limit:
            raise StreamFull(self._limit)
        appended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(document, appended))
        self._called.set()
        await appended

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                try:
                    await self._append_some()
                except RedisUnavailable as error:
                    await self._failed(error)
                else:
                    self._works = True
                    await self._report.works()
                await self._wait_for_calls()
        finally:
            await self._connection.drop()

    async def _wait_for_calls(self) -> None:
        if self._waiting:
            return
        self._called.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_AGAIN_S):
                await self._called.wait()

    async def _append_some(self) -> None:
        """Raises RedisUnavailable when calls are left without an answer: none of them was sent."""
        # First, so that what is sent goes over a connection that works.
        if not self._connection.is_open or self._clock.monotonic() - self._looked_at > FRESH_S:
            await self._look()
        batch = self._take()
        if not batch:
            return
        stream = next(self._turn)
        commands = [("XADD", stream, "*", self._field, waiting.document) for waiting in batch]
        try:
            replies = await self._connection.send(commands, TIMEOUT_S)
        except RedisUnavailable as error:
            for waiting in batch:
                _refuse(waiting, AppendUnanswered(str(error), error.remedy))
            raise
        judged = [_judge(reply) for reply in replies]
        self._uncarried += judged.count(None)
        for waiting, failure in zip(batch, judged, strict=True):
            if failure is not None:
                _refuse(waiting, failure)
            elif not waiting.appended.done():
                waiting.appended.set_result(None)
        if failures := [failure for failure in judged if failure is not None]:
            # A server that became a replica keeps its connections. A new one may reach the new master.
            await self._connection.drop()
            raise failures[0]

    def _take(self) -> list[_Waiting]:
        """The next calls, as many as there is room for. Those for which there is none are refused."""
        room = self._limit - self._uncarried
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < MAX_ENTRIES:
            waiting = self._waiting.popleft()
            if waiting.appended.done():
                continue  # cancelled before it was sent
            if len(batch) < room:
                batch.append(waiting)
            else:
                _refuse(waiting, StreamFull(self._limit))
        return batch

    async def _look(self) -> None:
        """Count the entries that are not carried. It also shows that the connection works.

        After a failure it also shows that entries can be appended: a replica, or a server without memory, can be read.
        Raises RedisUnavailable.
        """
        commands: list[Command] = [("XINFO", what, stream) for stream in self._streams for what in ("STREAM", "GROUPS")]
        if not self._works:
            commands += [("XADD", stream, _NO_ID, self._field, b"") for stream in self._streams]
        at = self._clock.monotonic()
        was_open = self._connection.is_open
        try:
            replies = await self._connection.send(commands, TIMEOUT_S)
        except RedisUnavailable:
            # Redis, or something in between, closes connections on which nothing is sent for a while.
            left = TIMEOUT_S - (self._clock.monotonic() - at)
            if not was_open or left <= 0:
                raise
            replies = await self._connection.send(commands, left)
        for reply in replies:
            if isinstance(reply, ResponseError) and not str(reply).startswith((_NO_KEY, _WRONG_ID)):
                await self._connection.drop()
                raise NotAppended(f"{self._connection.place}: {describe(reply)}", remedy_for(reply))
        found = replies[: 2 * len(self._streams)]
        pairs = zip(found[::2], found[1::2], strict=True)
        try:
            self._uncarried = sum(count_uncarried(stream, groups, self._group) for stream, groups in pairs)
        except (TypeError, ValueError, LookupError) as error:
            await self._connection.drop()
            raise NotAppended(f"{self._connection.place}: the reply to XINFO is not one of Redis", NOT_REDIS) from error
        self._looked_at = at

    async def _failed(self, error: RedisUnavailable) -> None:
        """Refuse the calls that wait: they were not sent."""
        self._works = False
        await self._report.fails(error)
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            _refuse(call, NotAppended(str(error), error.remedy))


def count_uncarried(stream: Any, groups: Any, group: str) -> int:
    """From the replies to XINFO STREAM and XINFO GROUPS: entries added minus those that the group has read.

    Where it is not known how many it has read (after `streams --set`): its lag, or else all that are present. 0 where
    there is no stream.
    """
    if isinstance(stream, ResponseError) or isinstance(groups, ResponseError):
        return 0
    found = _by_name(stream)
    length, added = int(found[b"length"]), found.get(b"entries-added")
    for described in map(_by_name, groups):
        if described[b"name"] == group.encode():
            read, lag = described.get(b"entries-read"), described.get(b"lag")
            if read is not None and added is not None:
                return max(0, int(added) - int(read))
            return length if lag is None else int(lag)
    return length


def _by_name(reply: Any) -> dict[bytes, Any]:
    """A map is a list of names and values in turn in older versions of the protocol."""
    return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))


def _judge(reply: object) -> RedisUnavailable | None:
    """What a reply to XADD means; None: the entry is appended."""
    if isinstance(reply, ResponseError):
        refuses = type(reply) is not ResponseError or str(reply).startswith(_REFUSALS)
        return (NotAppended if refuses else AppendUnanswered)(describe(reply), remedy_for(reply))
    if isinstance(reply, bytes) and _ID.fullmatch(reply):
        return None
    return AppendUnanswered("the reply to XADD is not an id", NOT_REDIS)


def _refuse(waiting: _Waiting, error: Exception) -> None:
    if not waiting.appended.done():
        waiting.appended.set_exception(error)
