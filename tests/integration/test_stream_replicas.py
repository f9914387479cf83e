"""Several replicas of one source: they share the streams, and each reports only what it knows."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
import redis.asyncio as aioredis

from tests.support.records import CHECK, Records, make_document
from worker.observability.status import State


async def test_two_replicas_that_start_together_share_four_streams(records: Records) -> None:
    streams = [f"{records.world.stream} {number}" for number in range(4)]
    carriers = [records.carrier(CHUNK_REQUESTS_STREAM=",".join(streams)) for _ in range(2)]
    for number, stream in enumerate(streams):
        await records.world.redis.xadd(stream, {"data": make_document(number)})
        records.paths.append(f"/{number}")
    leases = [[stream.lease for stream in carrier.pipelines.streams] for carrier in carriers]

    def held() -> list[int]:
        return [sum(lease.token is not None for lease in of_one) for of_one in leases]

    async def all_are_held() -> bool:
        return sum(held()) == len(streams)

    async with contextlib.AsyncExitStack() as stack:
        for carrier in carriers:
            await stack.enter_async_context(carrier.running())
        await records.wait(all_are_held, timeout=8)
        assert min(held()) >= 1
        await records.carried()
    await records.world.redis.delete(*streams)


async def test_a_single_replica_takes_six_streams_within_six_seconds(records: Records) -> None:
    streams = [f"{records.world.stream} {number}" for number in range(6)]
    carrier = records.carrier(CHUNK_REQUESTS_STREAM=",".join(streams))
    for number, stream in enumerate(streams):
        await records.world.redis.xadd(stream, {"data": make_document(number)})
        records.paths.append(f"/{number}")
    async with carrier.running():
        await records.carried(timeout=6)
    await records.world.redis.delete(*streams)


async def test_a_replica_that_lost_the_lease_reports_no_backlog(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.db.lease.RENEW_S", 0.1)
    await records.add(5)
    carrier, go_on = records.carrier(), asyncio.Event()
    (stream,) = carrier.pipelines.streams
    deliver = stream.pipeline.delivery.deliver

    async def deliver_late(batch: Any) -> Any:
        await go_on.wait()
        return await deliver(batch)

    monkeypatch.setattr(stream.pipeline.delivery, "deliver", deliver_late)

    def reported() -> tuple[float, float]:
        labels = {"stream": records.world.stream}
        oldest = carrier.metric("stream_oldest_unread_seconds", **labels)
        return carrier.metric("stream_backlog_entries", **labels), oldest

    async with carrier.running():
        await records.wait(lambda: _is(reported()[0] == 5 and reported()[1] > 0))
        await records.world.sql.execute("UPDATE stream_positions SET lease_holder = 'another'")
        await records.wait(lambda: _is(reported() == (0, 0)), timeout=5)
        go_on.set()


async def test_a_stream_on_hold_shows_its_backlog_although_nobody_has_the_lease(records: Records) -> None:
    await records.world.sql.execute("ALTER TABLE chunk_requests RENAME TO gone")
    await records.add(5)
    carrier = records.carrier()
    async with carrier.running():
        await carrier.reaches(State.HOLD)
        (stream,) = carrier.pipelines.streams
        await records.wait(lambda: _is(stream.lease.token is None))
        assert carrier.metric("stream_backlog_entries", stream=records.world.stream) == 5


async def test_a_lease_is_not_shown_as_held_while_a_server_cannot_be_used(records: Records) -> None:
    await records.add(1)
    carrier = records.carrier()
    (stream,) = carrier.pipelines.streams

    def shown() -> float | None:
        return carrier.metrics.registry.get_sample_value("viewer_worker_lease_held", {"lease": CHECK})

    async with carrier.running():
        await records.wait(lambda: _is(shown() == 1))
        carrier.status.failing("redis", "gone", "")
        assert shown() == 0
        assert stream.lease.token is not None
        carrier.status.ok("redis")
        assert shown() == 1


async def test_a_hold_is_shown_until_another_replica_keeps_the_lease(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.db.lease.KEPT_S", 1.0)
    # Where one replica looks, the key is not a stream.
    elsewhere = f"{records.world.redis_url}/9"
    wrong, right = records.carrier(REDIS_URL=elsewhere), records.carrier()
    await records.add(3)
    async with aioredis.from_url(elsewhere) as client:
        await client.set(records.world.stream, "text")
        async with wrong.running():
            await wrong.reaches(State.HOLD)
            async with right.running():
                await records.carried()
                await wrong.reaches(State.OK)
                holder = await records.world.sql.fetchval("SELECT lease_holder FROM stream_positions")
                assert wrong.status.checks[CHECK].facts == {"role": "standing by", "holder": holder}
                assert right.status.checks[CHECK].state is State.OK
        await client.delete(records.world.stream)


async def _is(condition: bool) -> bool:
    return condition
