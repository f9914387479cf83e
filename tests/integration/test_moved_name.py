"""A name moves to the new master, while open connections stay with the old one, which is a replica from then on."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import redis
import redis.asyncio as aioredis
from redis.exceptions import ReadOnlyError

from tests.support.proxy import Proxy
from tests.support.world import World
from worker import Outcome, SyncViewProducer, ViewProducer
from worker.dev.servers import ValkeyServer
from worker.errors import RedisUnavailable
from worker.redis.address import parse_redis_url
from worker.redis.client import RedisClient

# A replica is synchronized at once.
pytestmark = pytest.mark.parametrize("valkey", [("--repl-diskless-sync-delay", "0")], indirect=True)


class Name:
    """Leads to `old`; after `fail_over`, new connections lead to `new`, which has all that `old` had."""

    def __init__(self, proxy: Proxy, old: ValkeyServer, new: ValkeyServer) -> None:
        self.url = proxy.url
        self._proxy = proxy
        self._new_url = new.url
        self.old, self.new = aioredis.from_url(old.url), aioredis.from_url(new.url)
        self._place_of_new = urlsplit(new.url)

    async def fail_over(self) -> None:
        await self.demote()
        self.move()

    async def demote(self) -> None:
        await self.new.replicaof("NO", "ONE")
        await self.old.replicaof(str(self._place_of_new.hostname), str(self._place_of_new.port))

    def move(self) -> None:
        self._proxy.move_to(self._new_url)


@pytest.fixture
def other_valkey(servers_folder: Path, valkey: ValkeyServer) -> Iterator[ValkeyServer]:
    """A replica of `valkey`."""
    master = f"127.0.0.1 {valkey.port}"
    server = ValkeyServer(servers_folder / f"redis-{uuid4().hex[:8]}", options=("--replicaof", master))
    server.start()
    yield server
    server.kill()
    shutil.rmtree(server.folder, ignore_errors=True)


@pytest.fixture
async def name(valkey: ValkeyServer, other_valkey: ValkeyServer) -> AsyncIterator[Name]:
    async with Proxy(valkey.url) as proxy:
        made = Name(proxy, valkey, other_valkey)
        async with asyncio.timeout(20):
            while (await made.new.info("replication"))["master_link_status"] != "up":
                await asyncio.sleep(0.02)
        yield made
        await made.old.aclose()
        await made.new.aclose()


@pytest.fixture
async def client(name: Name) -> AsyncIterator[RedisClient]:
    made = RedisClient(parse_redis_url(name.url))
    yield made
    await made.close()


async def test_flush_fails_at_most_once_after_the_name_has_moved(
    name: Name, valkey: ValkeyServer, database_url: str
) -> None:
    async with World(valkey.url, database_url, REDIS_URL=name.url) as world:
        worker = world.worker()
        await world.view("a", 2)
        await worker.cycle()
        await world.view("a", 3)
        await name.old.wait(1, 5000)
        await name.fail_over()
        with pytest.raises(RedisUnavailable, match="read only replica"):
            await worker.cycle()
        await worker.cycle()
        assert await world.totals() == {"a": 5}
        assert int(await name.new.get(f"{world.prefix}a") or 0) == 0
        await world.assert_consistent()
        await name.old.replicaof("NO", "ONE")  # the test's keys are deleted there


async def test_every_kind_of_connection_leads_to_the_new_master_after_one_refusal(
    name: Name, client: RedisClient
) -> None:
    stream, other = client.stream_connection(), client.stream_connection()
    for connection in (stream, other):
        await connection.send([("PING",)], 5.0)
    async with client.subscription("a channel") as subscription:
        await name.fail_over()
        (refused,) = await stream.send([("XADD", "a stream", "*", "field", "value")], 5.0)
        assert isinstance(refused, ReadOnlyError)
        with pytest.raises(RedisUnavailable, match="closed"):
            await subscription.read()
    for connection in (stream, other):
        (entry,) = await connection.send([("XADD", "a stream", "*", "field", "value")], 5.0)
        assert isinstance(entry, bytes)
    await client.overwrite(b"key", b"value")
    async with client.subscription("a channel"):
        assert await name.new.pubsub_numsub("a channel") == [(b"a channel", 1)]
        # A connection that is refused late is not of this generation: the subscription stays.
        await client._pool.give_up(0)
        assert await name.new.pubsub_numsub("a channel") == [(b"a channel", 1)]
    for connection in (stream, other):
        await connection.drop()


async def test_replica_is_a_failing_check_and_the_listener_moves_with_the_name(
    name: Name, valkey: ValkeyServer, database_url: str
) -> None:
    async with World(valkey.url, database_url, REDIS_URL=name.url) as world:
        worker = world.worker()
        channel = world.environment["VIEW_CHANNEL"]
        async with worker.listening():
            await worker.redis.check(5)
            await name.demote()
            with pytest.raises(RedisUnavailable, match="its role is slave") as caught:
                await worker.redis.check(5)
            worker.status.failing("redis", str(caught.value), caught.value.remedy)
            name.move()
            await worker.redis.check(5)
            worker.status.ok("redis")
            async with asyncio.timeout(10):
                while await name.new.pubsub_numsub(channel) != [(channel.encode(), 1)]:
                    await asyncio.sleep(0.02)
        await name.old.replicaof("NO", "ONE")


async def test_subscription_moves_with_the_name_although_no_command_is_refused(name: Name, client: RedisClient) -> None:
    """Commands that use other connections work again by themselves; a replica lets one subscribe."""
    await client.check(5)
    async with client.subscription("a channel") as subscription:
        name.move()
        await name.old.client_kill_filter(_type="normal", skipme=True)
        await name.demote()
        await client.check(5)
        with pytest.raises(RedisUnavailable, match="closed"):
            await subscription.read()


async def test_subscription_that_is_given_up_while_it_starts_is_lost(client: RedisClient) -> None:
    async def subscribe() -> None:
        async with client.subscription("a channel"):
            pass

    starting = asyncio.create_task(subscribe())
    while not client._pool.on_give_up:
        await asyncio.sleep(0)
    await client._pool.give_up(client._pool.generation)
    with pytest.raises(RedisUnavailable):
        await starting


def own_client(url: str) -> aioredis.Redis:
    return aioredis.Redis(connection_pool=aioredis.BlockingConnectionPool.from_url(url, max_connections=8))


def own_blocking_client(url: str) -> redis.Redis:
    return redis.Redis(connection_pool=redis.BlockingConnectionPool.from_url(url, max_connections=8))


@pytest.mark.parametrize("connect", [str, aioredis.from_url, own_client])
async def test_producer_fails_at_most_once_after_the_name_has_moved(name: Name, connect: Callable[[str], Any]) -> None:
    given = connect(name.url)
    async with ViewProducer(given, timeout=5.0) as producer:
        await assert_fails_once(name, lambda: producer.record("a"))
    if not isinstance(given, str):
        assert await given.ping()  # it stays open: it is the application's
        await given.connection_pool.disconnect()


@pytest.mark.parametrize("connect", [str, redis.from_url, own_blocking_client])
async def test_producer_for_threads_fails_at_most_once_after_the_name_has_moved(
    name: Name, connect: Callable[[str], Any]
) -> None:
    given = connect(name.url)
    with SyncViewProducer(given, timeout=5.0) as producer:
        await assert_fails_once(name, lambda: asyncio.to_thread(producer.record, "a"))
    if not isinstance(given, str):
        assert await asyncio.to_thread(given.ping)
        given.connection_pool.disconnect()


async def assert_fails_once(name: Name, record: Callable[[], Awaitable[Outcome]]) -> None:
    async def at_once() -> list[Outcome]:
        return await asyncio.gather(*[record() for _ in range(4)])

    assert await at_once() == [Outcome.RECORDED] * 4
    await name.old.wait(1, 5000)
    await name.fail_over()
    assert await record() is Outcome.NOT_RECORDED
    assert await at_once() == [Outcome.RECORDED] * 4
    assert await name.new.get("vod:views:a") == b"8"
