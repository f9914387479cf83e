"""Metrics over gRPC, from the call to the table."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from tests.support.grpc_calls import MetricCalls, log_metric
from tests.support.records import Records


@pytest.fixture
def calls(records: Records) -> MetricCalls:
    return MetricCalls(records)


async def test_accepted_metrics_become_rows(calls: MetricCalls) -> None:
    before = datetime.now(UTC)
    worker = calls.start()
    now = Timestamp()
    now.GetCurrentTime()
    at = Timestamp(seconds=now.seconds, nanos=123_456_789)
    async with calls.channel() as channel:
        assert (await log_metric(channel, value=7)).success
        await log_metric(channel, double_value=0.25, value=3, timestamp=at)
        for _ in range(2):
            await log_metric(channel, value=-1, timestamp=at, event_id="e")
        rows = await calls.has_rows(3)
    assert [(row["value"], row["event_id"]) for row in rows] == [(-1, "e"), (0.25, None), (7, None)]
    assert rows[1]["time"] == datetime.fromtimestamp(at.seconds, UTC).replace(microsecond=123_456)
    assert before.replace(microsecond=0) <= rows[2]["time"] <= datetime.now(UTC)
    worker.terminate()
    assert await worker.wait() == 0
