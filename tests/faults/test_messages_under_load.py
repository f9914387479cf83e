"""Fifty thousand messages a second: while the subscription holds, each is counted, and memory does not grow.

`make faults` publishes for a minute, `make test` for a few seconds; MESSAGE_SECONDS sets the duration.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.support.world import CliWorker, World

SECONDS = int(os.environ.get("MESSAGE_SECONDS", "4"))
RATE = 50_000
IDS = [f"vod_{number}" for number in range(2000)]
BATCHES_A_SECOND = 50
MAX_GROWTH_BYTES = 24 * 2**20


class Publisher:
    """Publishes views of Zipf-distributed ids at RATE if the machine can, and waits for Redis after each batch."""

    def __init__(self, redis_url: str, channel: str, rng: random.Random) -> None:
        address = urlsplit(redis_url)
        self._connection = socket.create_connection((address.hostname, address.port or 6379))
        self._commands = {vod_id: self._command(channel, vod_id) for vod_id in IDS}
        self._weights = [1 / rank for rank in range(1, len(IDS) + 1)]
        self._rng = rng
        self.published: Counter[str] = Counter()

    def _command(self, channel: str, vod_id: str) -> bytes:
        parts = [b"PUBLISH", channel.encode(), json.dumps({"vodId": vod_id, "count": 1}).encode()]
        return b"*3\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)

    def run(self) -> float:
        """Publish for SECONDS. Returns the actual rate in messages per second."""
        began = time.monotonic()
        for number in range(SECONDS * BATCHES_A_SECOND):
            time.sleep(max(0.0, began + number / BATCHES_A_SECOND - time.monotonic()))
            batch = self._rng.choices(IDS, self._weights, k=RATE // BATCHES_A_SECOND)
            self._connection.sendall(b"".join(self._commands[vod_id] for vod_id in batch))
            receivers = self._receivers(len(batch))
            assert receivers == {b":1"}, "there is no subscriber, or more than one"
            self.published.update(batch)
        self._connection.close()
        return self.published.total() / (time.monotonic() - began)

    def _receivers(self, replies: int) -> set[bytes]:
        received = b""
        while received.count(b"\r\n") < replies:
            received += self._connection.recv(65536)
        return set(received.split())


@pytest.fixture
def worker(world: World) -> Iterator[CliWorker]:
    started = CliWorker(world.environment | {"BATCH_INTERVAL_MS": "500"}, "run")
    yield started
    started.close()


async def memory(url: str) -> int:
    async with aiohttp.ClientSession(url) as session, session.get("/metrics") as response:
        found = re.search(r"^process_resident_memory_bytes (\S+)$", await response.text(), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


@pytest.mark.timeout(SECONDS + 120)
async def test_every_message_is_counted_and_memory_is_flat(world: World, worker: CliWorker) -> None:
    await worker.wait_for_log('"listening"')
    url = json.loads(await worker.wait_for_log('"started"'))["url"]
    publisher = Publisher(world.redis_url, world.environment["VIEW_CHANNEL"], random.Random(SECONDS))
    publishing = asyncio.create_task(asyncio.to_thread(publisher.run))
    samples = []
    while not publishing.done():
        samples.append(await memory(url))
        await asyncio.sleep(0.5)
    rate = await publishing
    worker.terminate()
    assert await worker.wait() == 0, worker.log[-2000:]
    stored = {row["vod_id"]: row["announced"] for row in await world.sql.fetch("SELECT * FROM view_counts")}
    assert stored == publisher.published
    assert '"gap": true' not in worker.log
    half = len(samples) // 2
    grown = max(samples[half:]) - max(samples[:half])
    total = publisher.published.total()
    print(f"{total:,} messages, {rate:,.0f}/s; memory {max(samples) / 2**20:.0f} MiB, {grown:+,} bytes")
    assert grown < MAX_GROWTH_BYTES
