"""A view can be reported by INCR, by a message, or by both. On a real Redis and a real Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.proxy import Mode, Proxy
from tests.support.tls import Certificates, TlsFront
from tests.support.world import SYNCHRONISE_AT_ONCE, InProcessWorker, World
from worker.counters.flush.outcome import Busy, Flushed
from worker.counters.flush.reading import Reading
from worker.dev.servers import ValkeyServer
from worker.errors import DatabaseUnavailable, NotDrained, RedisUnavailable
from worker.redis.address import parse_redis_url
from worker.redis.client import RedisClient
from worker.redis.errors import NOT_REDIS
from worker.redis.subscriber import Subscription


def sums(worker: InProcessWorker) -> int:
    announced = worker.counters.backlog.announced
    return sum(announced._sums.values())


async def incr_and_publish(world: World, vod_id: str, count: int = 1) -> None:
    """Record a view as producers do."""
    await world.redis.incrby(world.prefix + vod_id, count)
    await world.announce(vod_id, count)


async def rows(world: World) -> dict[str, tuple[int, int, int]]:
    found = await world.sql.fetch("SELECT vod_id, views, counted, announced FROM view_counts")
    return {row["vod_id"]: (row["views"], row["counted"], row["announced"]) for row in found}


async def test_view_counts_once_whether_incremented_published_or_both(world: World) -> None:
    worker = world.worker()
    async with worker.listening():
        for _ in range(3):
            await incr_and_publish(world, "both", 2)
            await world.redis.incr(world.prefix + "incr only")
            await world.announce("publish only", 5)
        await worker.wait_until(lambda: sums(worker) == 21)
        assert worker.metric("view_count_pending_keys") == 2  # a sweep finds the other one
        assert worker.metric("view_count_oldest_pending_seconds") > 0
        assert await worker.sweep_and_flush() == Flushed(flush_id=1, keys=3, views=24)
    assert await rows(world) == {"both": (6, 6, 6), "incr only": (3, 3, 0), "publish only": (15, 0, 15)}
    await world.assert_consistent()
    assert await world.pending() == Counter()
    assert sums(worker) == 0
    assert worker.metric("view_count_pending_keys") == 0


@pytest.mark.parametrize(
    ("count_source", "views"),
    [
        ("both", {"a": 7, "b": 3, "c": 4}),
        ("messages", {"a": 5, "b": 0, "c": 4}),
        ("sum", {"a": 12, "b": 3, "c": 4}),
    ],
)
async def test_count_source_sets_how_counted_and_announced_views_are_combined(
    world: World, count_source: str, views: dict[str, int]
) -> None:
    worker = world.worker(VIEW_COUNT_SOURCE=count_source)
    async with worker.listening():
        for step in (1, 4):
            await incr_and_publish(world, "a", step)
            await world.redis.incrby(world.prefix + "a", 1)
            await world.announce("c", 2)
            await world.redis.incrby(world.prefix + "b", 2 if step == 4 else 1)
            await worker.wait_until(lambda step=step: sums(worker) == step + 2)
            await worker.sweep_and_flush()
    assert {vod_id: row[0] for vod_id, row in (await rows(world)).items()} == views
    await world.assert_consistent()
    assert await world.pending() == Counter()


async def test_id_in_a_message_is_flushed_without_a_sweep(world: World) -> None:
    worker = world.worker()
    async with worker.listening():
        await worker.sweep_and_flush()
        worker.counters.loop._backlog.sweep._not_before = float("inf")
        await incr_and_publish(world, "named", 3)
        await world.redis.incr(world.prefix + "not named")
        await worker.wait_until(lambda: sums(worker) == 3)
        assert await worker.counters.loop.cycle() == Flushed(flush_id=1, keys=1, views=3)


async def commit_without_an_answer(worker: InProcessWorker, *, committed: bool) -> None:
    """The connection breaks at COMMIT: the worker cannot know whether it took place."""
    transaction = worker.database.transaction

    @contextlib.asynccontextmanager
    async def breaking() -> AsyncIterator[Any]:
        async with transaction() as tx:
            yield tx
            at_commit = worker.counters.backlog.announced._sent is not None
            if at_commit and not committed:
                raise DatabaseUnavailable("gone before COMMIT")
        if at_commit:
            raise DatabaseUnavailable("gone after COMMIT")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.database, "transaction", breaking)
        with pytest.raises(DatabaseUnavailable):
            await worker.sweep_and_flush()


@pytest.mark.parametrize("committed", [True, False])
async def test_sums_of_an_ambiguous_commit_are_written_once(world: World, committed: bool) -> None:
    worker = world.worker()
    async with worker.listening():
        await worker.sweep_and_flush()
        await world.announce("a", 5)
        await incr_and_publish(world, "b", 2)
        await worker.wait_until(lambda: sums(worker) == 7)
        await commit_without_an_answer(worker, committed=committed)
        assert await rows(world) == ({"a": (5, 0, 5), "b": (2, 2, 2)} if committed else {})
        await world.announce("a", 1)
        await worker.wait_until(lambda: sums(worker) == 8)
        await worker.counters.loop.cycle()
    assert await rows(world) == {"a": (6, 0, 6), "b": (2, 2, 2)}
    await world.assert_consistent()


async def test_commit_that_lands_late_is_not_written_again(world: World) -> None:
    """The connection is lost while the server still commits: only the row lock shows when the commit has ended."""
    worker = world.worker()
    async with worker.listening():
        await worker.sweep_and_flush()
        await world.announce("a", 5)
        await worker.wait_until(lambda: sums(worker) == 5)
        transaction = worker.database.transaction
        late: list[contextlib.AbstractAsyncContextManager[Any]] = []

        @contextlib.asynccontextmanager
        async def left_open() -> AsyncIterator[Any]:
            server_side = transaction()
            yield await server_side.__aenter__()
            if worker.counters.backlog.announced._sent is not None:
                late.append(server_side)
                raise DatabaseUnavailable("no answer to COMMIT")
            await server_side.__aexit__(None, None, None)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker.database, "transaction", left_open)
            with pytest.raises(DatabaseUnavailable):
                await worker.sweep_and_flush()
        assert await worker.sweep_and_flush() == Busy()
        await late[0].__aexit__(None, None, None)
        await worker.sweep_and_flush()
    assert await rows(world) == {"a": (5, 0, 5)}
    await world.assert_consistent()


async def test_commit_is_recognised_even_after_another_worker_flushed(world: World) -> None:
    worker = world.worker()
    async with worker.listening():
        await worker.sweep_and_flush()
        await world.announce("a", 5)
        await worker.wait_until(lambda: sums(worker) == 5)
        await commit_without_an_answer(worker, committed=True)
        await world.view("other", 3)
        await world.worker().counters.forgetting.forget("other")
        await worker.counters.loop.cycle()
    assert (await rows(world))["a"] == (5, 0, 5)


async def test_new_lease_holder_starts_without_sums_and_the_old_one_writes_none(world: World) -> None:
    first, second = world.worker(), world.worker()
    async with first.listening():
        await first.sweep_and_flush()
        await world.announce("a", 5)
        await first.wait_until(lambda: sums(first) == 5)
        await world.expire_lease()
        async with second.listening():
            assert sums(second) == 0
            await world.announce("a", 2)
            await second.wait_until(lambda: sums(second) == 2)
            await first.wait_until(lambda: sums(first) == 7)
            assert await first.counters.loop.cycle() == Busy()  # it lost the lease, and notices it under the lock
            await second.counters.loop.cycle()
            assert await rows(world) == {"a": (2, 0, 2)}
            # The first worker takes the lease again: the sums of its earlier epoch are dropped.
            await world.expire_lease()
            await first.counters.lease.take()
            await first.counters.loop.cycle()
    assert await rows(world) == {"a": (2, 0, 2)}
    assert first.metric("view_count_announced_dropped_total") == 7


async def test_announced_views_never_exceed_those_that_were_incremented_before(world: World) -> None:
    """A view that arrives between the copy of the sums and the read of Redis is counted now and announced later."""
    worker = world.worker()
    async with worker.listening():
        await worker.sweep_and_flush()
        await incr_and_publish(world, "a", 3)
        await worker.wait_until(lambda: sums(worker) == 3)
        reader = worker.counters.flusher.committer.reader
        read = type(reader).read

        async def add_views_then_read(self: Any, ids: Any) -> Reading:
            if "a" in ids and sums(worker) == 3:
                await incr_and_publish(world, "a", 2)
                await worker.wait_until(lambda: sums(worker) == 5)
            return await read(self, ids)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(reader), "read", add_views_then_read)
            await worker.counters.loop.cycle()
        assert await rows(world) == {"a": (5, 5, 3)}
        (shown,) = await worker.counters.display.views(["a"])
        assert shown.views == 5


async def test_invalid_messages_are_measured_and_valid_ones_count(world: World) -> None:
    worker = world.worker()
    bad = [b"", b"junk", b"\xff\xfe", b"[1]", b"x" * 70_000, b'{"vodId":"a"}', b'{"vodId":"","count":1}', b"[" * 10_000]
    async with worker.listening():
        for message in bad:
            await world.publish(message)
            await world.announce("good")
        await worker.wait_until(lambda: sums(worker) == len(bad))
        await worker.sweep_and_flush()
    assert (await rows(world))["good"] == (len(bad), 0, len(bad))
    kinds = ("not_json", "not_utf8", "not_an_object", "too_long", "count", "vod_id")
    seen = {kind: worker.metric("view_count_updates_invalid_total", reason=kind) for kind in kinds}
    assert seen == {"not_json": 2, "not_utf8": 1, "not_an_object": 2, "too_long": 1, "count": 1, "vod_id": 1}


async def test_lost_subscription_is_a_gap_and_is_followed_by_a_sweep(world: World) -> None:
    worker = world.worker()
    async with worker.listening():
        await worker.sweep_and_flush()
        assert worker.metric("view_count_subscription_gaps_total") == 0
        worker.counters.loop._backlog.sweep._not_before = float("inf")
        await world.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await worker.wait_until(lambda: worker.metric("view_count_subscription_gaps_total") == 1)
        assert worker.counters.loop._backlog.sweep.is_due
        await world.announce("a", 2)
        await worker.wait_until(lambda: sums(worker) == 2)


async def test_silent_connection_is_detected_and_replaced(
    valkey: ValkeyServer, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.redis.subscriber.SILENCE_S", 0.2)
    async with World(valkey.url, database_url) as world:
        worker = world.worker()
        async with worker.listening():
            await asyncio.sleep(0.5)  # silence is not a failure while PING is answered
            assert worker.status.is_ok("messages")
            assert valkey.process is not None
            os.kill(valkey.process.pid, signal.SIGSTOP)
            await worker.wait_until(lambda: not worker.status.is_ok("messages"))
            os.kill(valkey.process.pid, signal.SIGCONT)
            await worker.wait_until(lambda: worker.status.is_ok("messages"))
            await world.announce("a")
            await worker.wait_until(lambda: sums(worker) == 1)
        assert worker.metric("view_count_subscription_gaps_total") == 1


class ScriptedConnection:
    """A connection that returns these chunks, and then the end of the stream."""

    def __init__(self, *chunks: bytes) -> None:
        self._chunks = iter(chunks)
        self._reader = self._writer = self

    async def read(self, _: int) -> bytes:
        return next(self._chunks, b"")

    def pack_command(self, *_: object) -> list[bytes]:
        return []

    def writelines(self, _: list[bytes]) -> None:
        pass

    async def drain(self) -> None:
        pass


async def test_message_that_arrives_with_the_confirmation_is_not_lost() -> None:
    confirmation, message = (
        b"*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n",
        b"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\n%d\r\n",
    )
    connection = ScriptedConnection(confirmation + message % 1 + message % 2, message % 3)
    subscription = Subscription(connection, b"c", "here")  # type: ignore[arg-type]
    await subscription._subscribe()
    assert [*await subscription.read(), *await subscription.read()] == [b"1", b"2", b"3"]


async def test_data_outside_the_redis_protocol_is_a_lost_connection() -> None:
    with pytest.raises(RedisUnavailable, match="protocol") as caught:
        await Subscription(ScriptedConnection(b"HTTP/1.1 400 Bad Request\r\n\r\n"), b"c", "here").read()  # type: ignore[arg-type]
    assert caught.value.remedy == NOT_REDIS


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_closing_a_subscription_on_a_dead_connection_opens_no_new_one(
    redis_url: str, tmp_path: Path, tls: bool
) -> None:
    """Closing also ends a waiting read: a clean TLS close would wait for the other side."""
    with contextlib.ExitStack() as resources:
        url = redis_url
        if tls:
            certificates, authority = Certificates(), tmp_path / "authority.pem"
            certificates.authority.cert_pem.write_to_path(str(authority))
            front = TlsFront(certificates, urlsplit(redis_url).port or 6379)
            resources.callback(front.close)
            url = f"rediss://127.0.0.1:{front.port}?ssl_ca_certs={authority}"
        async with Proxy(url) as proxy:
            client = RedisClient(parse_redis_url(proxy.url))
            async with client.subscription("a channel") as subscription:
                reading = asyncio.create_task(subscription.read())
                await asyncio.sleep(0)
                proxy.mode = Mode.DROP_ALL
                await subscription.close()
                with pytest.raises(RedisUnavailable, match="closed"):
                    await reading
                with pytest.raises(RedisUnavailable, match="closed"):
                    await subscription.unsubscribe()
            assert proxy.connections == 1
            await client.close()


async def test_messages_published_before_a_stop_are_counted(world: World) -> None:
    worker = world.worker()
    async with worker.listening():
        await worker.sweep_and_flush()
        pipeline = world.redis.pipeline(transaction=False)
        for number in range(5000):
            pipeline.publish(world.environment["VIEW_CHANNEL"], json.dumps({"vodId": f"vod_{number % 50}", "count": 1}))
        await pipeline.execute()
    assert sums(worker) == 5000


async def make_backlog(world: World, patch: pytest.MonkeyPatch) -> None:
    """Publish 1500 messages of a kilobyte while the worker does not read. Then each read takes a while."""
    published, read = asyncio.Event(), Subscription.read

    async def read_slowly(self: Subscription) -> list[bytes]:
        await published.wait()
        await asyncio.sleep(0.05)
        return await read(self)

    patch.setattr(Subscription, "read", read_slowly)
    await world.announce("first")  # ends the read that waits already
    pipeline = world.redis.pipeline(transaction=False)
    for number in range(1, 1500):
        message = {"vodId": f"vod_{number % 50}", "count": 1, "note": "x" * 1000}
        pipeline.publish(world.environment["VIEW_CHANNEL"], json.dumps(message))
    await pipeline.execute()
    published.set()


async def test_backlog_at_a_stop_is_read_however_long_it_takes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.redis.listener.UNSUBSCRIBE_S", 0.3)
    worker = world.worker(SHUTDOWN_TIMEOUT="1m")
    async with worker.listening():
        await make_backlog(world, monkeypatch)
    assert sums(worker) == 1500
    assert worker.metric("view_count_subscription_gaps_total") == 0


@pytest.mark.parametrize("fault", ["backlog", "silence"])
async def test_messages_left_at_a_stop_are_a_gap_and_the_stop_is_not_clean(
    world: World, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("worker.redis.listener.UNSUBSCRIBE_S", 0.1)
    async with Proxy(world.redis_url) as proxy:
        worker = world.worker(REDIS_URL=proxy.url, SHUTDOWN_TIMEOUT="200ms" if fault == "backlog" else "1m")

        async def listen_until_the_stop() -> None:
            async with worker.listening():
                if fault == "silence":
                    proxy.mode = Mode.DROP_ANSWERS
                await make_backlog(world, monkeypatch)

        with pytest.raises(NotDrained):
            await listen_until_the_stop()
        assert worker.counters.backlog.announced.ended.is_set()
        assert sums(worker) < 1500
        assert worker.metric("view_count_subscription_gaps_total") == 1


async def test_missing_right_to_subscribe_is_reported_and_counters_are_still_flushed(
    valkey: ValkeyServer, database_url: str
) -> None:
    async with World(valkey.url, database_url) as world:
        await world.redis.acl_setuser(  # type: ignore[no-untyped-call]
            "limited", enabled=True, nopass=True, keys=["*"], channels=["nothing"], commands=["+@all"]
        )
        worker = world.worker(REDIS_URL=valkey.url.replace("redis://", "redis://limited:x@"))
        for check in ("redis", "postgres", "schema"):
            worker.status.ok(check)
        await worker.counters.lease.take()
        stop = asyncio.Event()
        task = asyncio.create_task(worker.counters.listener.run(stop))
        await worker.wait_until(lambda: "users.acl" in worker.status.checks["messages"].remedy)
        await world.view("a", 3)
        await worker.cycle()
        await world.assert_exact()
        stop.set()
        await task


async def test_new_totals_are_published_where_somebody_may_listen(
    valkey: ValkeyServer, servers_folder: Path, database_url: str
) -> None:
    async def count_published() -> int:
        commands = await world.redis.info("commandstats")
        return int(commands.get("cmdstat_publish", {}).get("calls", 0))

    replica = ValkeyServer(servers_folder / "totals-replica", options=SYNCHRONISE_AT_ONCE)
    replica.start()
    async with World(valkey.url, database_url) as world, World(replica.url, database_url) as copy:
        worker = world.worker()
        ids = [f"vod_{number}" for number in range(50)]
        await world.view_many(ids)
        await worker.cycle()
        assert await count_published() == 1
        await copy.redis.replicaof("127.0.0.1", str(valkey.port))  # type: ignore[no-untyped-call]
        while (await world.redis.info("replication"))["connected_slaves"] == 0:
            await asyncio.sleep(0.01)
        await world.view_many(ids)
        await worker.cycle()
        assert await count_published() == 1 + len(ids)
        await copy.redis.replicaof("NO", "ONE")  # type: ignore[no-untyped-call]
    replica.kill()


async def test_new_totals_are_published_after_the_commit(world: World) -> None:
    worker = world.worker()
    await world.view("a", 3)
    await worker.cycle()
    channel = world.redis.pubsub()
    await channel.subscribe(world.environment["VIEW_TOTALS_CHANNEL"])
    await channel.get_message(timeout=5)
    await world.view("a", 2)
    await world.view("ünï", 1)
    await worker.cycle()
    received = [await channel.get_message(ignore_subscribe_messages=True, timeout=5) for _ in range(2)]
    documents = [json.loads(message["data"]) for message in received if message]
    assert sorted(documents, key=lambda document: document["vodId"]) == [
        {"vodId": "a", "viewCount": 5, "delta": 2, "flushId": 2},
        {"vodId": "ünï", "viewCount": 1, "delta": 1, "flushId": 2},
    ]
    await channel.aclose()  # type: ignore[no-untyped-call]


async def test_flush_works_without_the_right_to_publish(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        await world.redis.acl_setuser(  # type: ignore[no-untyped-call]
            "mute", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-publish"]
        )
        await world.view("a", 3)
        worker = world.worker(REDIS_URL=valkey.url.replace("redis://", "redis://mute:x@"))
        assert isinstance(await worker.cycle(), Flushed)
        await world.assert_exact()


async def test_forgotten_id_does_not_come_back_through_earlier_messages(world: World) -> None:
    worker = world.worker()
    async with worker.listening():
        await worker.sweep_and_flush()
        await incr_and_publish(world, "a", 5)
        await worker.wait_until(lambda: sums(worker) == 5)
        await world.worker().counters.forgetting.forget("a")
        assert await worker.sweep_and_flush() == Busy()
        await worker.counters.lease.take()
        await worker.sweep_and_flush()
    assert await rows(world) == {}
    await world.assert_consistent()
