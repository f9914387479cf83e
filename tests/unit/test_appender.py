"""Appending to a stream: what a call is answered, in every case, on a fake connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.exceptions import NoPermissionError, ReadOnlyError, ResponseError

from tests.support.fakes import FakeClock
from worker.errors import AppendUnanswered, NotAppended, RedisUnavailable, StreamFull
from worker.redis import appender
from worker.redis.appender import FRESH_S, MAX_ENTRIES, TIMEOUT_S, StreamAppender, count_uncarried

LIMIT = 5
LOST = RedisUnavailable("the connection was closed")


class FakeConnection:
    """A stream with `added` entries, of which the group has read `read`. `fail` is asked before each round trip."""

    def __init__(self) -> None:
        self.place = "cache:6379"
        self.is_open = False
        self.added, self.read = 0, 0
        self.trips: list[Sequence[Any]] = []
        self.streams: list[str] = []
        self.drops = 0
        self.fail: Callable[[Sequence[Any]], Exception | None] = lambda _: None
        self.refuse: Callable[[bytes], object] = lambda _: None
        self.ready = asyncio.Event()
        self.ready.set()

    async def send(self, commands: Sequence[Any], timeout: float) -> list[Any]:
        self.trips.append(commands)
        self.is_open = True
        await self.ready.wait()
        if (error := self.fail(commands)) is not None:
            self.is_open = False
            raise error
        return [self._reply(command) for command in commands]

    def _reply(self, command: Any) -> Any:
        match command:
            case ("XINFO", "STREAM", _):
                return {b"length": self.added, b"entries-added": self.added}
            case ("XINFO", "GROUPS", _):
                return [{b"name": b"viewer-worker", b"entries-read": self.read}]
        if (refusal := self.refuse(command[4])) is not None:
            return refusal
        if command[2] == "0-0":
            return ResponseError("The ID specified in XADD must be greater than 0-0")
        self.added += 1
        self.streams.append(command[1])
        return b"1-0"

    @property
    def appends(self) -> list[int]:
        """Entries in each round trip."""
        return [len(trip) for trip in self.trips if trip[0][0] == "XADD"]

    async def drop(self) -> None:
        self.drops += 1
        self.is_open = False


class Report:
    def __init__(self) -> None:
        self.states: list[str] = []

    async def works(self) -> None:
        self.states.append("works")

    async def fails(self, error: RedisUnavailable) -> None:
        self.states.append(str(error))


class Appending:
    def __init__(self, streams: tuple[str, ...] = ("metrics",), limit: int = LIMIT) -> None:
        self.connection = FakeConnection()
        self.clock = FakeClock()
        self.report = Report()
        self.appender = StreamAppender(
            self.connection,  # type: ignore[arg-type]
            streams=streams,
            field="data",
            group="viewer-worker",
            limit=limit,
            report=self.report,
            clock=self.clock,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Appending]:
        task = asyncio.create_task(self.appender.run())
        await settle()
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def outcomes(self, count: int) -> list[Any]:
        """Of so many calls together: None or the class of the error."""
        found = await asyncio.gather(*(self.appender.append(b"%d" % n) for n in range(count)), return_exceptions=True)
        return [None if error is None else type(error) for error in found]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_calls_that_come_together_share_a_round_trip() -> None:
    async with Appending(limit=10_000).running() as it:
        assert await it.outcomes(MAX_ENTRIES + 1) == [None] * (MAX_ENTRIES + 1)
        assert it.connection.appends == [MAX_ENTRIES, 1]
        assert it.report.states[0] == "works"


async def test_streams_take_turns() -> None:
    async with Appending(("a", "b")).running() as it:
        for _ in range(3):
            await it.outcomes(1)
        assert it.connection.streams == ["a", "b", "a"]


async def test_calls_beyond_the_limit_are_refused_until_entries_are_carried() -> None:
    async with Appending().running() as it:
        it.connection.added, it.connection.read = 12, 10
        it.clock.advance(2 * FRESH_S)
        assert await it.outcomes(4) == [None, None, None, StreamFull]
        assert await it.outcomes(1) == [StreamFull]  # of those that were appended, none is known to be carried
        it.connection.read = 15
        assert await it.outcomes(1) == [StreamFull]  # what is known is fresh
        it.clock.advance(2 * FRESH_S)
        assert await it.outcomes(1) == [None]


async def test_not_more_calls_wait_than_the_limit() -> None:
    async with Appending().running() as it:
        it.connection.ready.clear()
        calls = [asyncio.create_task(it.appender.append(b"")) for _ in range(2 * LIMIT + 1)]
        await settle()
        refused = [call for call in calls if call.done()]
        assert {type(call.exception()) for call in refused} == {StreamFull}
        assert refused
        it.connection.ready.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert found.count(None) == LIMIT


async def test_a_cancelled_call_is_not_sent() -> None:
    async with Appending().running() as it:
        it.connection.ready.clear()
        it.clock.advance(2 * FRESH_S)
        calls = [asyncio.create_task(it.appender.append(b"%d" % n)) for n in range(2)]
        await settle()
        calls[0].cancel()
        await settle()
        it.connection.ready.set()
        await calls[1]
        assert it.connection.appends == [1]


async def test_a_call_that_is_cancelled_after_it_was_sent_disturbs_no_other() -> None:
    async with Appending().running() as it:
        it.connection.ready.clear()
        calls = [asyncio.create_task(it.appender.append(b"%d" % n)) for n in range(2)]
        await settle()
        assert it.connection.appends == [2]
        calls[0].cancel()
        await settle()
        it.connection.ready.set()
        await calls[1]
        assert await it.outcomes(1) == [None]


async def test_an_answer_that_does_not_come_leaves_only_the_calls_that_were_sent_unknown() -> None:
    async with Appending(limit=10_000).running() as it:
        it.connection.fail = lambda commands: LOST if commands[0][0] == "XADD" else None
        found = await it.outcomes(MAX_ENTRIES + 1)
        assert found == [AppendUnanswered] * MAX_ENTRIES + [NotAppended]
        assert it.report.states[-1] == str(LOST)
        it.connection.fail = lambda _: None
        assert await it.outcomes(1) == [None]
        assert it.report.states[-1] == "works"


async def test_a_redis_that_cannot_be_reached_gets_nothing() -> None:
    async with Appending().running() as it:
        it.connection.fail = lambda _: LOST
        it.clock.advance(2 * FRESH_S)
        assert await it.outcomes(2) == [NotAppended] * 2
        assert it.connection.appends == []


async def test_a_connection_that_was_closed_while_nobody_called_costs_nothing() -> None:
    async with Appending().running() as it:
        errors = iter([LOST])
        it.connection.fail = lambda _: next(errors, None)
        it.clock.advance(2 * FRESH_S)
        assert await it.outcomes(1) == [None]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (NoPermissionError("this user has no permissions to run the 'xadd' command"), NotAppended),
        (ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), NotAppended),
        (ResponseError("MISCONF Redis is configured to save RDB snapshots"), NotAppended),
        # A proxy answers so, also when it had passed the command on.
        (ResponseError("upstream failure"), AppendUnanswered),
        (ResponseError("TIMEOUT of the upstream"), AppendUnanswered),
        (b"OK", AppendUnanswered),
        (0, AppendUnanswered),
    ],
)
async def test_what_redis_refuses_is_not_stored_and_its_neighbour_is(reply: object, expected: type) -> None:
    async with Appending().running() as it:
        it.connection.refuse = lambda document: reply if document == b"1" else None
        assert await it.outcomes(3) == [None, expected, None]
        # It may be a server that became a replica: the next call finds the new master.
        assert it.connection.drops == 1
        it.connection.refuse = lambda _: None
        assert await it.outcomes(1) == [None]


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (NoPermissionError("this user has no permissions to run the 'xinfo|groups' command"), "no permissions"),
        (b"OK", "XINFO"),
        ([b"length", b"?"], "XINFO"),
        (1, "XINFO"),
        (None, "XINFO"),
    ],
)
async def test_a_look_that_fails_is_reported_and_the_next_one_works(reply: object, cause: str) -> None:
    it = Appending()
    it.connection._reply = lambda command: reply  # type: ignore[method-assign]
    async with it.running():
        assert await it.outcomes(1) == [NotAppended]
        assert it.report.states[-1].startswith("cache:6379: ")
        assert cause in it.report.states[-1]
        del it.connection._reply
        assert await it.outcomes(1) == [None]


async def test_a_server_that_can_be_read_but_not_written_is_not_shown_as_working() -> None:
    it = Appending()
    refusal = ReadOnlyError("You can't write against a read only replica.")
    it.connection.refuse = lambda _: refusal
    async with it.running():
        assert await it.outcomes(1) == [NotAppended]
        assert set(it.report.states) == {f"cache:6379: {refusal}"}
        it.connection.refuse = lambda _: None
        assert await it.outcomes(1) == [None]
        assert it.report.states[-1] == "works"
    assert it.connection.added == 1


async def test_a_redis_that_goes_away_while_nobody_calls_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appender, "LOOK_AGAIN_S", 0.001)
    async with Appending().running() as it:
        assert it.report.states[-1] == "works"
        it.connection.fail = lambda _: LOST
        it.clock.advance(2 * FRESH_S)
        async with asyncio.timeout(10):
            while it.report.states[-1] != str(LOST):
                await asyncio.sleep(0.001)


async def test_a_redis_that_hangs_is_waited_for_once() -> None:
    async with Appending().running() as it:

        def hang(_: object) -> Exception:
            it.clock.advance(TIMEOUT_S)
            return LOST

        it.connection.fail = hang
        it.clock.advance(2 * FRESH_S)
        trips = len(it.connection.trips)
        assert await it.outcomes(1) == [NotAppended]
        assert len(it.connection.trips) == trips + 1


GROUP = [b"name", b"viewer-worker", b"entries-read", 3]


@pytest.mark.parametrize(
    ("stream", "groups", "uncarried"),
    [
        (ResponseError("no such key"), ResponseError("no such key"), 0),
        ([b"length", 4, b"entries-added", 10], [GROUP], 7),
        ({b"length": 4, b"entries-added": 10}, [{b"name": b"viewer-worker", b"entries-read": 3}], 7),
        ([b"length", 4, b"entries-added", 10], [[b"name", b"another", b"entries-read", 3]], 4),
        ([b"length", 4, b"entries-added", 10], [[b"name", b"viewer-worker", b"entries-read", None]], 4),
        # After `streams --set`. Calls that are refused would leave it so.
        ([b"length", 4, b"entries-added", 10], [[b"name", b"viewer-worker", b"entries-read", None, b"lag", 0]], 0),
        # The group is ahead: Redis went back to an earlier snapshot.
        ([b"length", 4, b"entries-added", 2], [GROUP], 0),
    ],
)
def test_entries_that_are_not_carried(stream: Any, groups: Any, uncarried: int) -> None:
    assert count_uncarried(stream, groups, "viewer-worker") == uncarried
