"""Measures how fast an application records views, compared with sending the two commands itself. Run by `make bench`.

All contenders send the same to the same embedded Redis, in turn, for several rounds. Compare the ratios within a round:
absolute speeds vary with the load of the machine.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import redis.asyncio as aioredis

from worker import ViewProducer
from worker.dev.servers import ValkeyServer

VIEWS = 2_000
ROUNDS = 7


async def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="viewer-worker-bench-"))
    valkey = ValkeyServer(folder / "redis")
    valkey.start()
    try:
        await compare(valkey.url)
    finally:
        valkey.kill()
        shutil.rmtree(folder, ignore_errors=True)


async def compare(url: str) -> None:
    async with ViewProducer(url, raise_errors=True) as producer, aioredis.from_url(url) as redis:

        async def ours() -> None:
            await producer.record("vod_1")

        async def two_commands() -> None:
            await redis.incr("vod:views:vod_1")
            await redis.publish("view_count_updates", '{"vodId":"vod_1","count":1}')

        async def pipeline() -> None:
            async with redis.pipeline(transaction=True) as both:
                both.incr("vod:views:vod_1")
                both.publish("view_count_updates", '{"vodId":"vod_1","count":1}')
                await both.execute()

        contenders: dict[str, Callable[[], Awaitable[None]]] = {
            "ViewProducer.record": ours,
            "INCR, then PUBLISH": two_commands,
            "redis-py pipeline": pipeline,
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(ROUNDS):
            for name, contender in contenders.items():
                began = time.perf_counter()
                for _ in range(VIEWS):
                    await contender()
                rates[name].append(VIEWS / (time.perf_counter() - began))
    print(f"{VIEWS:,} views one by one, median of {ROUNDS} rounds; ratio: record / contender, per round")
    for name, measured in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["ViewProducer.record"], measured, strict=True))
        print(f"  {name:<28} {statistics.median(measured):>9,.0f} views/s      {ratio:5.2f}")


if __name__ == "__main__":
    asyncio.run(main())
