"""Eight clients log metrics over gRPC while the worker and Redis are killed: every OK is one row.

`make faults` does it for a minute (FAULT_SECONDS); CI and `make test` for a few seconds.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import defaultdict
from itertools import count, cycle

import grpc
import pytest
import redis.asyncio as aioredis
from grpc import StatusCode
from grpc_status import rpc_status

from tests.support.grpc_calls import MetricCalls, connect, log_metric
from tests.support.records import Records
from worker.dev.servers import ValkeyServer

SECONDS = min(60.0, float(os.environ.get("FAULT_SECONDS", "8")))
CLIENTS = 8
# The client's own, when its connection is lost or its deadline passes; the worker's is UNKNOWN.
MAY_BE_STORED = "may be stored"
NOT_STORED = "not stored"


class Flood:
    """Values that were sent, by what became of the call."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._values = count()
        self.sent: dict[str, list[int]] = defaultdict(list)
        self.codes: set[StatusCode] = set()

    async def client(self, stop: asyncio.Event) -> None:
        async with connect(self._port) as channel:
            while not stop.is_set():
                value = next(self._values)
                self.sent[await self._call(channel, value)].append(value)

    async def _call(self, channel: grpc.aio.Channel, value: int) -> str:
        try:
            await log_metric(channel, timeout=1, value=value)
        except grpc.aio.AioRpcError as error:
            self.codes.add(error.code())
            if error.code() in (StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED):
                await asyncio.sleep(0.01)
                return NOT_STORED if rpc_status.from_call(error) is not None else MAY_BE_STORED  # type: ignore[arg-type]
            assert error.code() in (StatusCode.UNKNOWN, StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED), error
            return MAY_BE_STORED
        return "OK"


@pytest.mark.timeout(SECONDS + 120)
async def test_worker_and_redis_are_killed_while_metrics_come(records: Records, valkey: ValkeyServer) -> None:
    records.world.environment["REDIS_URL"] = valkey.url
    calls = MetricCalls(records)
    worker = calls.start()
    flood, stop = Flood(calls.port), asyncio.Event()
    clients = [asyncio.create_task(flood.client(stop)) for _ in range(CLIENTS)]
    ends = asyncio.get_running_loop().time() + SECONDS
    kills = 0
    for victim in cycle(("worker", "redis")):
        await until_more(flood, 200)
        if kills >= 2 and asyncio.get_running_loop().time() > ends:
            break
        kills += 1
        (worker if victim == "worker" else valkey).kill()
        await asyncio.sleep(random.uniform(0, 0.3))
        if victim == "worker":
            worker = calls.start()
        else:
            await asyncio.to_thread(valkey.start)
    stop.set()
    await asyncio.gather(*clients)

    async def is_settled() -> bool:
        rows = await records.world.sql.fetchval("SELECT count(*) FROM metrics")
        return int(rows) >= len(flood.sent["OK"]) and await backlog(records, valkey) == 0

    await records.wait(is_settled)
    rows = [int(row["value"]) for row in await calls.rows()]
    assert len(set(rows)) == len(rows)
    assert set(flood.sent["OK"]) <= set(rows) <= set(flood.sent["OK"]) | set(flood.sent[MAY_BE_STORED])
    assert StatusCode.UNAVAILABLE in flood.codes
    assert await records.letters() == []
    stored = len(rows) - len(flood.sent["OK"])
    print(
        f"\n{kills} kills: {len(flood.sent['OK'])} OK, {len(rows)} rows; of {len(flood.sent[MAY_BE_STORED])} without"
        f" a clear answer {stored} are stored; {len(flood.sent[NOT_STORED])} certainly not"
    )


async def until_more(flood: Flood, calls: int, timeout: float = 30.0) -> None:
    before = len(flood.sent["OK"])
    async with asyncio.timeout(timeout):
        while len(flood.sent["OK"]) < before + calls:
            await asyncio.sleep(0.02)


async def backlog(records: Records, valkey: ValkeyServer) -> int:
    """Entries of the stream that are not carried."""
    async with aioredis.from_url(valkey.url) as redis:
        (stream,) = [key async for key in redis.scan_iter(match="metrics *")]
        added = (await redis.xinfo_stream(stream))["entries-added"]
    return int(added) - int(await records.world.sql.fetchval("SELECT entries_read FROM stream_positions") or 0)
