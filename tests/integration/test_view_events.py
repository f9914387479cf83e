"""View events from the channel and from a stream, on a real Redis and a real Postgres."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest

from tests.support.http import get
from tests.support.records import InProcessCarrier
from tests.support.world import CliWorker, World
from worker.dev.servers import ValkeyServer
from worker.observability.status import State

CHANNEL = {"PIPELINES": "view_events", "VIEW_EVENTS_FLUSH_INTERVAL": "20ms"}
PIPELINE = {"pipeline": "view_events"}
TEN = "2026-11-27T10:00:00Z"


class Events:
    """Publishes messages, runs workers that store them, and reads the rows."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stream = f"view_events {world.prefix}"
        self.published = 0
        self._workers: list[CliWorker] = []

    def carrier(self, **settings: str) -> InProcessCarrier:
        return InProcessCarrier(self.world.environment | CHANNEL | settings)

    def start(self, **settings: str) -> CliWorker:
        self._workers.append(CliWorker(self.world.environment | CHANNEL | settings, "run"))
        return self._workers[-1]

    async def publish(self, count: int = 1) -> None:
        """Messages about different ids: `v0`, `v1`, …"""
        pipeline = self.world.redis.pipeline(transaction=False)
        for _ in range(count):
            message = json.dumps({"vodId": f"v{self.published}", "count": 1 + self.published % 3})
            pipeline.publish(self.world.environment["VIEW_CHANNEL"], message)
            self.published += 1
        await pipeline.execute()

    async def add(self, **fields: Any) -> str:
        document = json.dumps({"vodId": "a", "count": 1} | fields)
        return str((await self.world.redis.xadd(self.stream, {"data": document})).decode())

    async def rows(self) -> list[Any]:
        return list(await self.world.sql.fetch("SELECT * FROM view_events ORDER BY time, vod_id"))

    async def ids(self) -> Counter[str]:
        return Counter(row["vod_id"] for row in await self.rows())

    async def wait_for_rows(self, count: int) -> list[Any]:
        async with asyncio.timeout(30):
            while len(rows := await self.rows()) < count:
                await asyncio.sleep(0.02)
        return rows

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


@pytest.fixture
async def events(world: World) -> AsyncIterator[Events]:
    made = Events(world)
    yield made
    made.close()
    await world.redis.delete(made.stream)


async def is_listening(carrier: InProcessCarrier) -> None:
    async with asyncio.timeout(20):
        while carrier.status.checks["view_events"].facts.get("role") != "listening":
            await asyncio.sleep(0.01)


async def becomes(carrier: InProcessCarrier, check: str, state: State) -> str:
    """Wait for a state of a check; its remedy."""
    async with asyncio.timeout(30):
        while carrier.status.checks[check].state is not state:
            await asyncio.sleep(0.02)
    return carrier.status.checks[check].remedy


def gaps(carrier: InProcessCarrier) -> float | None:
    return carrier.metrics.registry.get_sample_value("view_event_gaps_total")


# The channel


async def test_each_message_is_a_row_with_its_time_or_that_of_its_receipt(events: Events) -> None:
    world = events.world
    carrier = events.carrier()
    good = {"vodId": "a", "count": 3, "ts": TEN, "event_id": "e", "title": "ignored"}
    async with carrier.running():
        await is_listening(carrier)
        before = datetime.now(UTC)
        for message in (good, good, {"vodId": 42, "count": 10**9}, {"vodId": "b", "count": 1, "ts": 1795773600000}):
            await world.publish(json.dumps(message))
        for bad in (b"junk", b'{"vodId":"a","vodId":"b","count":1}', b'{"vodId":"a","count":0}', b"x" * 70_000):
            await world.publish(bad)
        await world.publish(json.dumps({"vodId": "no time", "count": 1, "event_id": "e"}))
        await world.announce("last")
        rows = await events.wait_for_rows(4)
    found = {row["vod_id"]: (row["count"], row["event_id"]) for row in rows}
    assert found == {"a": (3, "e"), "b": (1, None), "42": (10**9, None), "last": (1, None)}
    times = {row["vod_id"]: row["time"] for row in rows}
    assert times["a"] == times["b"] == datetime(2026, 11, 27, 10, tzinfo=UTC)
    # The time of receipt is known to the millisecond.
    assert int(before.timestamp() * 1000) <= times["last"].timestamp() * 1000 <= datetime.now(UTC).timestamp() * 1000
    read = {
        name: carrier.metric(f"persistence_{name}_total", **PIPELINE)
        for name in ("success", "repeated", "dropped", "dead_letters", "queue_full")
    }
    assert read == {"success": 4, "repeated": 1, "dropped": 5, "dead_letters": 0, "queue_full": 0}
    assert carrier.metric("persistence_queue_depth", **PIPELINE) == 0
    assert gaps(carrier) == 0


async def test_only_the_holder_of_the_lease_stores_and_a_takeover_is_a_gap(events: Events) -> None:
    first, second = events.carrier(), events.carrier()
    async with second.running():
        async with first.running():
            async with asyncio.timeout(20):
                while {each.status.checks["view_events"].facts.get("role") for each in (first, second)} != {
                    "listening",
                    "standing by",
                }:
                    await asyncio.sleep(0.01)
            await events.publish(50)
            await events.wait_for_rows(50)
            assert not gaps(first)
            assert not gaps(second)
        # The first has stopped; if it was the one that listened, the second takes over.
        await is_listening(second)
        await events.publish(10)
        await events.wait_for_rows(60)
    third = events.carrier()
    async with third.running():
        await is_listening(third)
        assert gaps(third) == 1
        await third.redis._redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        async with asyncio.timeout(20):
            while gaps(third) != 2:
                await asyncio.sleep(0.01)
        await events.publish(10)
        await events.wait_for_rows(70)
    assert await events.ids() == Counter({f"v{number}": 1 for number in range(70)})
    assert third.metrics.registry.get_sample_value("view_count_subscription_gaps_total") == 0


async def renew_no_more(lease: Any) -> None:
    """Until `_look` is deleted from `lease`."""
    looked = asyncio.Event()

    async def look_away() -> None:
        lease._sure_until = float("-inf")
        looked.set()

    lease._look = look_away
    await looked.wait()  # a renewal that was under way has ended


async def test_a_worker_that_lost_the_lease_unawares_stores_nothing_that_its_successor_stores(events: Events) -> None:
    """As one that was frozen, or cut off from Postgres, and reads what came meanwhile from its connection."""
    world = events.world
    frozen, other = events.carrier(), events.carrier()
    async with frozen.running():
        await is_listening(frozen)
        lease = frozen.pipelines.channel.lease  # type: ignore[union-attr]
        await renew_no_more(lease)
        await events.publish(20)
        await asyncio.sleep(0.1)
        assert await events.rows() == []
        await world.sql.execute("UPDATE stream_positions SET lease_until = now() - interval '1 second'")
        async with other.running():
            await is_listening(other)
            await events.publish(30)
            await events.wait_for_rows(30)
            del lease._look
            async with asyncio.timeout(20):
                while frozen.status.checks["view_events"].facts.get("role") != "standing by":
                    await asyncio.sleep(0.01)
    assert await events.ids() == Counter({f"v{number}": 1 for number in range(20, 50)})
    assert gaps(other) == 1


async def test_what_is_heard_while_the_lease_cannot_be_renewed_is_stored_when_it_was(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.redis.subscriber.SILENCE_S", 0.2)
    carrier = events.carrier()
    async with carrier.running():
        await is_listening(carrier)
        lease = carrier.pipelines.channel.lease  # type: ignore[union-attr]
        await renew_no_more(lease)
        await events.publish(20)
        async with asyncio.timeout(20):
            while carrier.metric("persistence_queue_depth", **PIPELINE) != 20:
                await asyncio.sleep(0.01)
        heard = datetime.now(UTC)
        del lease._look
        rows = await events.wait_for_rows(20)
    assert all(row["time"] <= heard for row in rows)
    assert await events.ids() == Counter({f"v{number}": 1 for number in range(20)})
    assert gaps(carrier) == 0


async def test_a_lease_is_sure_only_by_a_renewal(events: Events) -> None:
    """A renewal skips a row that is locked: perhaps by a worker that takes the lease."""
    world = events.world
    carrier = events.carrier()
    lease = carrier.pipelines.channel.lease  # type: ignore[union-attr]
    assert await lease.take()
    assert lease.is_sure
    lease._sure_until = float("-inf")
    async with world.sql.transaction():
        await world.sql.execute("SELECT FROM stream_positions FOR UPDATE")
        assert await lease.take()
        assert not lease.is_sure
    assert await lease.take()
    assert lease.is_sure
    await lease.release()
    assert not lease.is_sure
    await carrier.database.close()
    await carrier.redis.close()


async def test_a_full_buffer_drops_and_counts_while_views_are_counted_exactly(events: Events) -> None:
    world = events.world
    await world.sql.execute("ALTER TABLE view_events RENAME TO gone")
    worker = events.start(PIPELINES="view_counts,view_events", VIEW_EVENTS_CHANNEL_BUFFER="50")
    await worker.wait_for_log('"loop": "view_events"')
    await worker.wait_for_log('"loop": "messages"')
    url = json.loads(await worker.wait_for_log('"started"'))["url"]
    for number in range(200):
        await world.view(f"v{number}", 1 + number % 3)
    await events.publish(200)
    async with asyncio.timeout(30):
        while await world.pending() or await world.totals() != world.truth:
            await asyncio.sleep(0.05)
        while (checks := (await get(f"{url}/health"))[1]["checks"])["view_events writer"]["status"] != "failing":
            await asyncio.sleep(0.05)
    assert "view_events" in checks["view_events writer"]["cause"]
    assert "viewer-worker check" in checks["view_events writer"]["remedy"]
    assert {checks[name]["status"] for name in ("view_counts", "messages", "view_events", "postgres")} == {"ok"}
    metrics = await read_metrics(url)
    for name in (
        'persistence_dropped_total{pipeline="view_events"}',
        'persistence_queue_full_total{pipeline="view_events"}',
        'timescale_write_errors_total{error_type="queue_full",pipeline="view_events"}',
    ):
        assert metrics[name] == 150, name
    assert metrics['persistence_queue_depth{pipeline="view_events"}'] == 50
    assert worker.log.count("messages dropped") == 1
    await world.sql.execute("ALTER TABLE gone RENAME TO view_events")
    await events.wait_for_rows(50)
    async with asyncio.timeout(30):
        while (await get(f"{url}/health"))[1]["status"] != "healthy":
            await asyncio.sleep(0.05)
    worker.terminate()
    assert await worker.wait() == 0
    assert await events.ids() == Counter({f"v{number}": 1 for number in range(50)})
    await world.assert_consistent()


async def read_metrics(url: str) -> dict[str, float]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


async def test_what_was_published_before_a_stop_is_stored(events: Events) -> None:
    worker = events.start(VIEW_EVENTS_FLUSH_INTERVAL="1h")
    await worker.wait_for_log('"loop": "view_events"')
    await events.publish(2500)
    worker.terminate()
    assert await worker.wait() == 0, worker.log
    assert await events.ids() == Counter({f"v{number}": 1 for number in range(2500)})
    # What cannot be written within the deadline is counted.
    await events.world.sql.execute("ALTER TABLE view_events RENAME TO gone")
    worker = events.start(SHUTDOWN_TIMEOUT="500ms")
    assert json.loads(await worker.wait_for_log('"loop": "view_events", "channel"'))["gap"] is True
    await events.publish(70)
    await worker.wait_for_log('"view_events writer failing"')
    worker.terminate()
    assert await worker.wait() == 1
    left = json.loads(await worker.wait_for_log("records left at shutdown"))
    assert (left["unwritten"], left["unknown"]) == (70, 0)


async def test_no_message_is_stored_twice_when_the_worker_is_killed(events: Events) -> None:
    for _ in range(3):
        worker = events.start(VIEW_EVENTS_BATCH_SIZE="7", VIEW_EVENTS_FLUSH_INTERVAL="1ms")
        await worker.wait_for_log('"loop": "view_events", "channel"')
        had = sum((await events.ids()).values())
        await events.publish(500)
        await events.wait_for_rows(had + 100)
        worker.kill()
    assert set((await events.ids()).values()) == {1}
    assert len(await events.rows()) <= events.published


async def test_missing_right_to_subscribe_is_reported_and_views_are_counted(
    valkey: ValkeyServer, database_url: str
) -> None:
    async with World(valkey.url, database_url) as world:
        url = valkey.url.replace("redis://", "redis://limited:x@")
        user: dict[str, Any] = {"enabled": True, "nopass": True, "keys": ["*"], "commands": ["+@all"]}
        await world.redis.acl_setuser("limited", **user, channels=["nothing"])  # type: ignore[no-untyped-call]
        carrier = Events(world).carrier(REDIS_URL=url)
        async with carrier.running():
            assert "users.acl" in await becomes(carrier, "view_events", State.FAILING)
            await world.view("a", 3)
            await world.worker(REDIS_URL=url, VIEW_COUNT_SOURCE="counters").cycle()
            await world.assert_exact()
            await world.redis.acl_setuser("limited", **user, channels=["*"])  # type: ignore[no-untyped-call]
            await becomes(carrier, "view_events", State.OK)
            await world.announce("a")
            await Events(world).wait_for_rows(1)


async def test_old_tickets_are_deleted_by_the_worker(events: Events) -> None:
    world = events.world
    old = "INSERT INTO ingest_batches SELECT gen_random_uuid(), 'view_events', now() - $1::interval"
    for age in ("25 hours", "23 hours"):
        await world.sql.execute(old.replace("$1", f"'{age}'"))
    async with events.carrier().running(), asyncio.timeout(20):
        while await world.sql.fetchval("SELECT count(*) FROM ingest_batches") != 1:
            await asyncio.sleep(0.02)


# The stream


async def test_each_entry_of_the_stream_is_a_row_once_through_a_kill(events: Events) -> None:
    world = events.world
    settings = {
        "VIEW_EVENTS_SOURCE": "stream",
        "VIEW_EVENTS_STREAM": events.stream,
        "VIEW_EVENTS_BATCH_SIZE": "7",
        "VIEW_EVENTS_FLUSH_INTERVAL": "1ms",
    }
    arrived = await events.add(vodId="arrived", count=2)
    for _ in range(3):
        await events.add(vodId="repeated", ts=TEN, event_id="e")
    await events.add(vodId="bad", count=0)
    for number in range(400):
        await events.add(vodId=f"v{number}")
    worker = events.start(**settings)
    await events.wait_for_rows(50)
    worker.kill()
    # Messages are not stored.
    await events.publish(10)
    worker = events.start(**settings)
    rows = {row["vod_id"]: row for row in await events.wait_for_rows(402)}
    worker.terminate()
    assert await worker.wait() == 0
    assert await events.ids() == Counter(["arrived", "repeated", *(f"v{number}" for number in range(400))])
    assert round(rows["arrived"]["time"].timestamp() * 1000) == int(arrived.partition("-")[0])
    assert rows["repeated"]["time"] == datetime(2026, 11, 27, 10, tzinfo=UTC)
    letters = await world.sql.fetch("SELECT error_class, payload FROM dead_letters")
    assert [(row["error_class"], json.loads(row["payload"])["vodId"]) for row in letters] == [("count", "bad")]
