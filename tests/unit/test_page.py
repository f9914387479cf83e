"""The page's server side: its files, its events, and what they cost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest

from tests.support.fakes import FakeClock
from worker.db.counters.reads import Top, TopEntry
from worker.errors import DatabaseUnavailable
from worker.observability.metrics import Metrics
from worker.observability.status import SERVERS, Status
from worker.web.health import Health
from worker.web.page import page as page_module
from worker.web.page.files import FILES
from worker.web.page.lookups import Lookups
from worker.web.page.model import PipelineRow
from worker.web.page.page import MAX_WATCHERS, Page
from worker.web.page.samples import KEPT, Samples
from worker.web.page.state import Identity, State
from worker.web.server import WebServer

HOUR = datetime(2026, 11, 28, 10, tzinfo=UTC)


class FakeDatabase:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.failure: Exception | None = None
        self.answers = asyncio.Event()
        self.answers.set()

    async def top(self, window: timedelta, limit: int) -> Top:
        self.asked += 1
        await self.answers.wait()
        if self.failure is not None:
            raise self.failure
        return Top(HOUR, HOUR, [TopEntry("line\u2028break\n\nevent: x", 1, 2)])

    async def count_dead_letters(self) -> dict[str, int]:
        return {"bars_1m": 3}


class Parts:
    """A page with its loops, on a fake clock."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.status = Status(self.clock.monotonic, (*SERVERS, "bars_1m"))
        for server in SERVERS:
            self.status.ok(server)
        self.database = FakeDatabase()
        self.health = Health(self.status, self.clock, "1.2.3", timedelta(seconds=30))
        pipelines = [PipelineRow("bars_1m", "bars_1m", "bars.finalized")]
        self.lookups = Lookups(self.database, self.database, self.status, self.clock)
        self.samples = Samples(self.metrics.registry, pipelines, self.status, self.clock)
        self.state = State(
            identity=Identity("host-1", 42, 30.0, True, {"redis": "redis:6379"}),
            health=self.health,
            status=self.status,
            registry=self.metrics.registry,
            pipelines=pipelines,
            lookups=self.lookups,
            clock=self.clock,
            started=self.clock.monotonic(),
        )
        self.page = Page(self.state, self.samples, self.lookups, self.clock)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """The URL; the loops run."""
        server = WebServer(self.health, self.page.routes(), self.metrics.registry, "127.0.0.1", 0)
        await server.start()
        stop = asyncio.Event()
        loops = [asyncio.create_task(loop.run(stop)) for loop in (self.samples, self.lookups)]
        yield server.url
        stop.set()
        await asyncio.gather(*loops)
        await self.page.close()
        await server.close()


@pytest.fixture
def parts() -> Parts:
    return Parts()


class Events:
    """The events of a response, as a browser takes them apart."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def next(self, name: str) -> dict[str, Any]:
        """The document of the next event of this name."""
        async with asyncio.timeout(10):
            found = ""
            while True:
                line = (await self._response.content.readline()).decode().rstrip("\n")
                field, _, value = line.partition(": ")
                if field == "event":
                    found = value
                elif field == "data" and found == name:
                    document: dict[str, Any] = json.loads(value)
                    return document


async def test_page_and_its_files_may_load_nothing_from_elsewhere(parts: Parts) -> None:
    async with parts.serving() as url, aiohttp.ClientSession() as session:
        for path in FILES:
            async with session.get(url + path) as response:
                text = await response.text()
                assert response.status == 200
                policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
                assert policy.pop("default-src") == "'none'"
                assert set(policy.values()) <= {"'self'", "'none'", "'script'"}
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                if response.content_type in ("text/html", "text/css"):
                    assert "//" not in text  # every address is relative
                known = {"If-None-Match": response.headers["ETag"]}
            async with session.get(url + path, headers=known) as response:
                assert (response.status, await response.read()) == (304, b"")


async def test_events_carry_the_state_and_the_samples(parts: Parts) -> None:
    parts.metrics.entries_carried.labels("bars_1m", "bars.finalized").inc(7)
    parts.metrics.flushed_views.inc(5)
    for kind in ("count", "not_json", "vod_id"):
        parts.metrics.invalid_messages.labels(kind).inc()
    async with parts.serving() as url, aiohttp.ClientSession() as session, session.get(f"{url}/events") as response:
        assert response.content_type == "text/event-stream"
        events = Events(response)
        samples = await events.next("samples")
        assert dict(zip(samples["columns"], samples["rows"][0], strict=True)) | {"time": 0} == {
            "time": 0,
            "messages": 0,
            "views": 5,
            "flushes": 0,
            "flushRounds": 0,
            "flushSeconds": 0,
            "pendingIds": 0,
            "oldestPendingSeconds": 0,
            "bars_1m": 7,
        }
        state = await events.next("state")
        assert state["health"]["version"] == "1.2.3"
        assert state["worker"] == {"host": "host-1", "pid": 42, "uptimeSeconds": 0, "redis": "redis:6379"}
        assert state["views"]["flushedViews"] == 5
        assert state["views"]["lastAgreementMs"] is None
        assert state["views"]["invalidMessages"] == 3
        assert state["pipelines"][0]["records"] == 7
        while "top" not in state["lookups"]:
            parts.clock.advance(1)
            state = await events.next("state")
        assert state["lookups"]["top"]["top"][0]["vodId"] == "line\u2028break\n\nevent: x"
        assert state["lookups"]["deadLetters"] == {"bars_1m": 3}


async def test_hundred_open_pages_ask_the_database_no_more_than_one(parts: Parts) -> None:
    async with (
        parts.serving() as url,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        responses = [await session.get(f"{url}/events") for _ in range(100)]
        for response in responses:
            events = Events(response)
            for _ in range(2):
                parts.clock.advance(1)
                await events.next("state")
        assert parts.database.asked == 1
        for response in responses:
            response.close()


async def test_without_a_page_the_database_is_not_asked(parts: Parts) -> None:
    async with parts.serving() as url, aiohttp.ClientSession() as session:
        async with session.get(url) as response:
            assert response.status == 200
        async with session.head(f"{url}/events") as response:
            assert response.status == 405
    assert parts.database.asked == 0


async def test_failed_lookup_is_shown_and_ends_nothing(parts: Parts) -> None:
    for failure in (DatabaseUnavailable("no answer in time"), ValueError("a mistake")):
        parts.database.failure = failure
        await parts.lookups.look()
        assert str(failure) in parts.lookups.found["top"]["error"]
        assert parts.lookups.found["deadLetters"] == {"bars_1m": 3}


async def test_slow_lookup_does_not_delay_the_stop(parts: Parts) -> None:
    parts.database.answers.clear()
    async with asyncio.timeout(5), parts.serving():
        parts.lookups.want()
        while not parts.database.asked:
            await asyncio.sleep(0)


async def test_backlog_is_unknown_unless_the_stream_is_read(parts: Parts) -> None:
    def find_backlog() -> object:
        state: Any = parts.state.document()
        return state["pipelines"][0]["backlog"]

    parts.metrics.backlog.labels("bars_1m", "bars.finalized").set(7)
    assert find_backlog() is None
    parts.metrics.lease_held.labels("bars_1m").set(1)
    assert find_backlog() == 7
    parts.metrics.lease_held.labels("bars_1m").set(0)
    parts.metrics.stream_holds.labels("bars_1m", "bars.finalized").set(1)
    assert find_backlog() == 7


async def test_pages_above_the_limit_are_refused_and_a_closed_one_makes_room(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_WATCHERS >= 100
    monkeypatch.setattr(page_module, "MAX_WATCHERS", 1)
    monkeypatch.setattr(page_module, "PERIOD_S", 0.01)
    async with parts.serving() as url, aiohttp.ClientSession() as session:
        first = await session.get(f"{url}/events")
        async with session.get(f"{url}/events") as second:
            assert second.status == 503
        first.close()
        async with asyncio.timeout(10):
            while True:
                async with session.get(f"{url}/events") as third:
                    if third.status == 200:
                        break


async def test_other_web_sites_may_not_connect(parts: Parts) -> None:
    headers = {"Sec-Fetch-Site": "cross-site"}
    async with (
        parts.serving() as url,
        aiohttp.ClientSession(headers=headers) as session,
        session.get(f"{url}/events") as response,
    ):
        assert response.status == 403


async def test_open_page_does_not_delay_the_stop(parts: Parts) -> None:
    async with aiohttp.ClientSession() as session:
        async with parts.serving() as url:
            response = await session.get(f"{url}/events")
            await Events(response).next("state")
        await response.content.read()  # fails where an answer is cut off
        assert response.content.at_eof()


def test_samples_are_kept_for_an_hour(parts: Parts) -> None:
    for _ in range(KEPT + 10):
        parts.samples.take()
        parts.clock.advance(5)
    document: Any = parts.samples.document()
    times = [row[0] for row in document["rows"]]
    assert len(times) == KEPT
    assert times[-1] - times[0] == (KEPT - 1) * 5000
    newest: Any = parts.samples.document(after=KEPT + 8)
    assert [row[0] for row in newest["rows"]] == times[-2:]
