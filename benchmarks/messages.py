"""Measures how fast messages are summed up, compared with plain redis-py loops. Run by `make bench`.

A separate process publishes the same messages to each contender in turn, for several rounds. Compare the ratios within
a round, of messages per second of *this* process's CPU time: publisher and Redis share the cores, so they would limit
the fastest contender.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import redis.asyncio as aioredis

from worker.counters.intake.messages import MessageSummer
from worker.dev.servers import ValkeyServer
from worker.observability.metrics import Metrics
from worker.redis.address import parse_redis_url
from worker.redis.client import RedisClient
from worker.runtime.clock import SystemClock
from worker.runtime.event_loop import run_async

MESSAGES = 100_000
ROUNDS = 5
CHANNEL = "view_count_updates"
AT_ONCE = 500


def publish(port: int) -> None:
    rng = random.Random(1)
    ids = [f"vod_{number:06}" for number in range(10_000)]
    weights = [1 / rank for rank in range(1, len(ids) + 1)]
    commands = {}
    for vod_id in ids:
        message = json.dumps({"vodId": vod_id, "count": 1})
        parts = ["PUBLISH", CHANNEL, message]
        commands[vod_id] = ("*3\r\n" + "".join(f"${len(part)}\r\n{part}\r\n" for part in parts)).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(MESSAGES // AT_ONCE):
            connection.sendall(b"".join(commands[vod_id] for vod_id in rng.choices(ids, weights, k=AT_ONCE)))
            replies = b""
            while replies.count(b"\r\n") < AT_ONCE:
                replies += connection.recv(65536)


async def worker(url: str) -> dict[str, int]:
    client, updates, sums = RedisClient(parse_redis_url(url)), MessageSummer(Metrics(), SystemClock()), dict[str, int]()
    heard = 0
    async with client.subscription(CHANNEL) as subscription:
        publisher = start_publisher(url)
        while heard < MESSAGES:
            messages = await subscription.read()
            heard += len(messages)
            for vod_id, count in updates.sum(messages).items():
                sums[vod_id] = sums.get(vod_id, 0) + count
    publisher.join()
    await client.close()
    return sums


async def listen(url: str) -> dict[str, int]:
    sums: dict[str, int] = {}
    heard = 0
    async with aioredis.from_url(url) as client, client.pubsub() as channel:
        await channel.subscribe(CHANNEL)
        await channel.get_message(timeout=5)
        publisher = start_publisher(url)
        async for message in channel.listen():
            update = json.loads(message["data"])
            sums[update["vodId"]] = sums.get(update["vodId"], 0) + update["count"]
            heard += 1
            if heard == MESSAGES:
                break
    publisher.join()
    return sums


async def get_message(url: str) -> dict[str, int]:
    sums: dict[str, int] = {}
    heard = 0
    async with aioredis.from_url(url) as client, client.pubsub() as channel:
        await channel.subscribe(CHANNEL)
        await channel.get_message(timeout=5)
        publisher = start_publisher(url)
        while heard < MESSAGES:
            message = await channel.get_message(ignore_subscribe_messages=True, timeout=1.0)
            if message is None:
                continue
            update = json.loads(message["data"])
            sums[update["vodId"]] = sums.get(update["vodId"], 0) + update["count"]
            heard += 1
    publisher.join()
    return sums


def start_publisher(url: str) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(target=publish, args=(int(url.rpartition(":")[2]),))
    process.start()
    return process


CONTENDERS: dict[str, Callable[[str], Awaitable[dict[str, int]]]] = {
    "viewer-worker": worker,
    "pubsub.listen() + json": listen,
    "pubsub.get_message() + json": get_message,
}


async def compare(url: str) -> None:
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    answers = set()
    for _ in range(ROUNDS):
        for name, contender in CONTENDERS.items():
            began = time.process_time()
            sums = await contender(url)
            rates[name].append(MESSAGES / (time.process_time() - began))
            answers.add(frozenset(sums.items()))
    assert len(answers) == 1, "the contenders have different sums"
    print(
        f"{MESSAGES:,} messages, median of {ROUNDS} rounds, per second of the subscriber's CPU; "
        "ratio: viewer-worker / contender, per round"
    )
    for name, measured in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["viewer-worker"], measured, strict=True))
        print(f"  {name:<28} {statistics.median(measured):>9,.0f} messages/s   {ratio:5.2f}")


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="viewer-worker-bench-"))
    valkey = ValkeyServer(folder / "redis")
    valkey.start()
    try:
        run_async(compare(valkey.url))
    finally:
        valkey.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
