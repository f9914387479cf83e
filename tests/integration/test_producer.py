"""The client library on a real Redis, for asyncio and for threads: each outcome is what really happened."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from uuid import uuid4

import pytest
import redis
import redis.asyncio as aioredis

from tests.support.proxy import Mode, Proxy
from worker import Outcome, SyncViewProducer, ViewProducer
from worker.dev.servers import ValkeyServer, free_port
from worker.errors import RedisUnavailable, ViewIndeterminate, ViewNotRecorded
from worker.redis.address import parse_redis_url
from worker.redis.client import RedisClient


class Application:
    """Either producer, called as an application would."""

    def __init__(self, producer: ViewProducer | SyncViewProducer) -> None:
        self._producer = producer

    async def record(self, vod_id: str | int, count: int = 1) -> Outcome:
        if isinstance(self._producer, ViewProducer):
            return await self._producer.record(vod_id, count)
        return await asyncio.to_thread(self._producer.record, vod_id, count)

    async def record_many(self, views: Mapping[str | int, int]) -> Outcome:
        if isinstance(self._producer, ViewProducer):
            return await self._producer.record_many(views)
        return await asyncio.to_thread(self._producer.record_many, views)

    async def close(self) -> None:
        if isinstance(self._producer, ViewProducer):
            await self._producer.aclose()
        else:
            self._producer.close()


Produce = Callable[..., Application]


@pytest.fixture
def prefix() -> str:
    return f"test:{uuid4().hex[:8]}:"


@pytest.fixture(params=[ViewProducer, SyncViewProducer], ids=["asyncio", "threads"])
async def produce(request: pytest.FixtureRequest, prefix: str) -> AsyncIterator[Produce]:
    made: list[Application] = []

    def produce(url: str, **options: object) -> Application:
        producer = request.param(url, **{"prefix": prefix, "channel": prefix, "timeout": 5.0} | options)
        made.append(Application(producer))
        return made[-1]

    yield produce
    for application in made:
        await application.close()


class Observer:
    """Shows the counters in Redis and the messages that a subscriber received."""

    def __init__(self, url: str, prefix: str) -> None:
        self._prefix = prefix
        self.redis = aioredis.from_url(url)
        self._subscription = self.redis.pubsub(ignore_subscribe_messages=True)

    async def count(self, vod_id: str) -> int:
        return int(await self.redis.get(self._prefix + vod_id) or 0)

    async def listen(self) -> None:
        await self._subscription.subscribe(self._prefix)
        await self._subscription.get_message(ignore_subscribe_messages=False, timeout=5)

    async def received(self) -> list[bytes]:
        """Every message published so far."""
        await self.redis.publish(self._prefix, "end")
        messages = []
        async for message in self._subscription.listen():
            if message["data"] == b"end":
                break
            messages.append(message["data"])
        return messages


@pytest.fixture
async def observer(redis_url: str, prefix: str) -> AsyncIterator[Observer]:
    async for one in observe(redis_url, prefix):
        yield one


@pytest.fixture
async def own_observer(valkey: ValkeyServer, prefix: str) -> AsyncIterator[Observer]:
    """An observer of the test's own Redis."""
    async for one in observe(valkey.url, prefix):
        yield one


async def observe(url: str, prefix: str) -> AsyncIterator[Observer]:
    one = Observer(url, prefix)
    await one.listen()
    yield one
    await one.redis.connection_pool.disconnect()  # the test may have restarted the server
    async for key in one.redis.scan_iter(match=f"{prefix}*"):
        await one.redis.delete(key)
    await one._subscription.aclose()
    await one.redis.aclose()


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[Proxy]:
    async with Proxy(redis_url) as between:
        yield between


async def test_view_is_a_counter_and_a_message(produce: Produce, redis_url: str, observer: Observer) -> None:
    application = produce(redis_url)
    assert await application.record("vod_1") is Outcome.RECORDED
    assert await application.record("vod_1", 3) is Outcome.RECORDED
    assert await application.record(7) is Outcome.RECORDED
    assert await application.record('é"\n') is Outcome.RECORDED
    assert [await observer.count(vod_id) for vod_id in ("vod_1", "7", 'é"\n')] == [4, 1, 1]
    assert await observer.received() == [
        b'{"vodId":"vod_1","count":1}',
        b'{"vodId":"vod_1","count":3}',
        b'{"vodId":"7","count":1}',
        '{"vodId":"é\\"\\n","count":1}'.encode(),
    ]


async def test_many_views_are_one_request(produce: Produce, proxy: Proxy, observer: Observer) -> None:
    application = produce(proxy.url)
    await application.record("first")
    proxy.requests.clear()
    assert await application.record_many({"a": 2, "b": 1, 7: 5}) is Outcome.RECORDED
    (request,) = proxy.requests
    assert request.startswith(b"*1\r\n$5\r\nMULTI\r\n")
    assert request.endswith(b"*1\r\n$4\r\nEXEC\r\n")
    assert [await observer.count(vod_id) for vod_id in ("a", "b", "7")] == [2, 1, 5]
    assert await application.record_many({}) is Outcome.RECORDED


async def test_nothing_is_sent_if_one_view_is_invalid(produce: Produce, redis_url: str, observer: Observer) -> None:
    application = produce(redis_url)
    assert await application.record_many({"good": 1, "": 1}) is Outcome.NOT_RECORDED
    assert await application.record_many({"good": 1, "bad": 0}) is Outcome.NOT_RECORDED
    assert await observer.count("good") == 0
    assert await observer.received() == []


async def test_redis_at_maxmemory_refuses_the_message_too(
    produce: Produce, valkey: ValkeyServer, own_observer: Observer
) -> None:
    await own_observer.redis.config_set("maxmemory", 1)
    application = produce(valkey.url)
    assert await application.record("vod_1") is Outcome.NOT_RECORDED
    await own_observer.redis.config_set("maxmemory", 0)
    assert await own_observer.count("vod_1") == 0
    assert await own_observer.received() == []
    assert await application.record("vod_1") is Outcome.RECORDED


async def test_replica_does_not_record(produce: Produce, valkey: ValkeyServer, own_observer: Observer) -> None:
    await own_observer.redis.replicaof("127.0.0.1", free_port())
    assert await produce(valkey.url).record("vod_1") is Outcome.NOT_RECORDED
    await own_observer.redis.replicaof("NO", "ONE")
    assert await own_observer.count("vod_1") == 0


async def test_counter_of_a_wrong_type_leaves_a_message_behind(
    produce: Produce, redis_url: str, prefix: str, observer: Observer
) -> None:
    await observer.redis.hset(f"{prefix}hash", "field", "value")
    application = produce(redis_url)
    assert await application.record("hash") is Outcome.INDETERMINATE
    assert await application.record_many({"hash": 1, "other": 1}) is Outcome.INDETERMINATE
    assert await observer.count("other") == 1
    assert len(await observer.received()) == 3
    assert await application.record("other") is Outcome.RECORDED


@pytest.mark.parametrize(
    ("denied", "outcome", "counted"),
    [
        ("-publish", Outcome.NOT_RECORDED, 0),
        ("-incrby", Outcome.NOT_RECORDED, 0),
        ("-@all", Outcome.NOT_RECORDED, 0),
        # Without MULTI, each command runs by itself.
        ("-multi", Outcome.RECORDED, 1),
        ("-exec", Outcome.NOT_RECORDED, 0),
    ],
)
async def test_outcome_without_a_right_matches_what_was_counted(
    produce: Produce, valkey: ValkeyServer, own_observer: Observer, denied: str, outcome: Outcome, counted: int
) -> None:
    rules = ("on", ">hunter2", "~*", "&*", "+@all", denied)
    await own_observer.redis.execute_command("ACL", "SETUSER", "viewer", *rules)
    application = produce(valkey.url.replace("redis://", "redis://viewer:hunter2@"))
    assert await application.record("vod_1") is outcome
    assert await own_observer.count("vod_1") == counted


@pytest.mark.parametrize("mode", [Mode.DROP_ANSWERS, Mode.RESET])
async def test_lost_reply_is_indeterminate_and_applied_once(
    produce: Produce, proxy: Proxy, observer: Observer, mode: Mode
) -> None:
    application = produce(proxy.url, timeout=0.5)
    assert await application.record("vod_1") is Outcome.RECORDED
    proxy.mode = mode
    assert await application.record("vod_1", 10) is Outcome.INDETERMINATE
    assert await observer.count("vod_1") == 11
    proxy.mode = Mode.FORWARD
    assert await application.record("vod_1", 100) is Outcome.RECORDED
    assert await observer.count("vod_1") == 111


async def test_server_that_accepts_and_never_answers_does_not_record(produce: Produce) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        application = produce(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)
        assert await application.record("vod_1") is Outcome.NOT_RECORDED


@pytest.mark.parametrize("where", ["nothing-listens", "wrong-password", "no-such-socket", "no-such-database"])
async def test_unreachable_redis_does_not_record_and_no_secret_is_shown(
    produce: Produce, redis_url: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = {
        "nothing-listens": f"redis://:hunter2@127.0.0.1:{free_port()}",
        "wrong-password": redis_url.replace("redis://", "redis://nobody_here:hunter2@"),
        "no-such-socket": "unix://user:hunter2@/nowhere/redis.sock",
        "no-such-database": redis_url.split("/0")[0] + "/99999",
    }[where]
    assert await produce(url).record("vod_1") is Outcome.NOT_RECORDED
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("worker.producer", "WARNING")
    assert "a view is not recorded: " in record.getMessage()
    with pytest.raises(ViewNotRecorded) as caught:
        await produce(url, raise_errors=True).record("vod_1")
    assert isinstance(caught.value.__cause__, redis.RedisError | OSError)
    assert "hunter2" not in caplog.text + "".join(traceback.format_exception(caught.value))


@pytest.fixture
async def quoting_server() -> AsyncIterator[str]:
    """The URL, with a password, of a server that refuses and quotes every command, like one where AUTH was renamed."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while received := await reader.read(1000):
            command, *words = received.decode().split("\r\n")[2::2]
            writer.write(f"-ERR unknown command `{command}`, with args beginning with: {words}\r\n".encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"redis://:hunter2@127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_password_that_a_server_quotes_is_not_shown(produce: Produce, quoting_server: str) -> None:
    application = produce(quoting_server, raise_errors=True)
    with pytest.raises(ViewNotRecorded, match="unknown command") as caught:
        await application.record("vod_1")
    await application.close()
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


async def test_password_that_a_server_quotes_is_not_shown_by_the_worker_either(quoting_server: str) -> None:
    client = RedisClient(parse_redis_url(quoting_server))
    with pytest.raises(RedisUnavailable, match="unknown command") as caught:
        await client.probe()
    await client.close()
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


async def test_raise_errors_raises_an_error_with_its_cause(produce: Produce, proxy: Proxy) -> None:
    application = produce(proxy.url, timeout=0.5, raise_errors=True)
    assert await application.record("vod_1") is Outcome.RECORDED
    proxy.mode = Mode.DROP_ANSWERS
    with pytest.raises(ViewIndeterminate) as caught:
        await application.record("vod_1")
    assert caught.value.__cause__ is not None


async def test_restart_of_the_server_is_detected_before_sending(
    produce: Produce, valkey: ValkeyServer, own_observer: Observer
) -> None:
    application = produce(valkey.url)
    assert await application.record("vod_1") is Outcome.RECORDED
    await asyncio.to_thread(valkey.kill)
    await asyncio.to_thread(valkey.start)
    await own_observer.redis.connection_pool.disconnect()
    assert await application.record("vod_1") is Outcome.RECORDED
    assert await own_observer.count("vod_1") == 2


async def test_burst_shares_its_connections(redis_url: str, proxy: Proxy, prefix: str, observer: Observer) -> None:
    async with ViewProducer(proxy.url, prefix=prefix, channel=prefix, timeout=5, max_connections=2) as producer:
        outcomes = await asyncio.gather(*(producer.record("vod_1") for _ in range(50)))
    assert set(outcomes) == {Outcome.RECORDED}
    assert await observer.count("vod_1") == 50
    assert sum(b"HELLO" in request for request in proxy.requests) <= 2


async def test_burst_of_threads_shares_its_connections(proxy: Proxy, prefix: str, observer: Observer) -> None:
    with SyncViewProducer(proxy.url, prefix=prefix, channel=prefix, timeout=5, max_connections=2) as producer:
        outcomes = await asyncio.gather(*(asyncio.to_thread(producer.record, "vod_1") for _ in range(50)))
    assert set(outcomes) == {Outcome.RECORDED}
    assert await observer.count("vod_1") == 50
    assert sum(b"HELLO" in request for request in proxy.requests) <= 2


async def test_cancelled_call_raises_and_its_connection_is_not_used_again(
    proxy: Proxy, prefix: str, observer: Observer
) -> None:
    async with ViewProducer(proxy.url, prefix=prefix, channel=prefix, timeout=5) as producer:
        assert await producer.record("vod_1") is Outcome.RECORDED
        proxy.mode = Mode.DROP_ANSWERS
        call = asyncio.create_task(producer.record("vod_1"))
        while await observer.count("vod_1") < 2:
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        proxy.mode = Mode.FORWARD
        assert await producer.record_many({"vod_1": 1, "vod_2": 1}) is Outcome.RECORDED


async def test_asyncio_client_of_the_application_retries_nothing_and_stays_open(
    proxy: Proxy, prefix: str, observer: Observer
) -> None:
    async with aioredis.from_url(proxy.url, socket_timeout=0.5) as client:  # with the retries it has by default
        async with ViewProducer(client, prefix=prefix, channel=prefix) as producer:
            await assert_retries_nothing(Application(producer), proxy, observer)
        assert await client.ping()


async def test_client_of_the_application_retries_nothing_and_stays_open(
    proxy: Proxy, prefix: str, observer: Observer
) -> None:
    with redis.from_url(proxy.url, socket_timeout=0.5, decode_responses=True) as client:
        with SyncViewProducer(client, prefix=prefix, channel=prefix) as producer:
            await assert_retries_nothing(Application(producer), proxy, observer)
        assert await asyncio.to_thread(client.ping)


async def test_restart_is_detected_with_a_client_of_the_application_too(valkey: ValkeyServer, prefix: str) -> None:
    async with aioredis.from_url(valkey.url) as client, ViewProducer(client, prefix=prefix, timeout=5) as producer:
        assert await producer.record("vod_1") is Outcome.RECORDED
        await asyncio.to_thread(valkey.kill)
        await asyncio.to_thread(valkey.start)
        assert await producer.record("vod_1") is Outcome.RECORDED
    with redis.from_url(valkey.url) as client, SyncViewProducer(client, prefix=prefix) as producer:
        assert producer.record("vod_1") is Outcome.RECORDED
        valkey.kill()
        valkey.start()
        assert producer.record("vod_1") is Outcome.RECORDED


async def assert_retries_nothing(application: Application, proxy: Proxy, observer: Observer) -> None:
    assert await application.record("vod_1") is Outcome.RECORDED
    proxy.mode = Mode.DROP_ANSWERS
    assert await application.record("vod_1") is Outcome.INDETERMINATE
    proxy.mode = Mode.FORWARD
    assert await observer.count("vod_1") == 2


async def test_example_of_the_reference_runs(valkey: ValkeyServer) -> None:
    reference = Path(__file__).parents[2] / "docs" / "reference" / "producer.md"
    (example,) = re.findall(r"```python\n(.*?)```", reference.read_text(), re.DOTALL)
    program = example.replace("redis://localhost:6379", valkey.url)
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b""
    async with aioredis.from_url(valkey.url) as client:
        assert await client.mget("vod:views:vod_123", "vod:views:vod_7") == [b"3", b"1"]


def test_forked_process_records_on_its_own_connections(redis_url: str, prefix: str) -> None:
    with SyncViewProducer(redis_url, prefix=prefix, timeout=5) as producer, redis.Redis.from_url(redis_url) as seen:
        assert producer.record("vod_1") is Outcome.RECORDED
        child = os.fork()
        if child == 0:
            os._exit(0 if producer.record("vod_1") is Outcome.RECORDED else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert producer.record("vod_1") is Outcome.RECORDED
        assert seen.getdel(f"{prefix}vod_1") == b"3"
