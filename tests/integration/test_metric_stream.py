"""Metrics of services, from the stream to the table."""

from __future__ import annotations

import json
from typing import Any

from tests.support.records import Records

TIME = "2026-11-27T10:00:00.123456789Z"


async def test_metrics_become_rows_with_their_time_or_that_of_their_arrival(records: Records) -> None:
    world = records.world
    stream = f"{world.stream}:metrics"
    settings = {"PIPELINES": "metrics", "METRICS_STREAM": stream, "METRICS_FLUSH_INTERVAL": "50ms"}

    async def add(**fields: Any) -> str:
        document = {"service_name": "checkout", "metric_name": "cpu_usage", "value": 1} | fields
        return str(await world.redis.xadd(stream, {"data": json.dumps(document)}))

    async def are_carried() -> bool:
        rows, letters = await world.sql.fetchrow(
            "SELECT (SELECT count(*) FROM metrics), (SELECT count(*) FROM dead_letters)"
        )
        return (rows, letters) == (3, 1)

    await add(time=TIME, value=0.5, event_id="e")
    await add(time=TIME, value=0.5, event_id="e")
    await add(time=TIME, value=2)
    await add(value="much")
    arrived = await add(value=3)
    worker = records.start(**settings)
    await records.wait(are_carried)
    found = await world.sql.fetch("SELECT * FROM metrics ORDER BY value")
    assert [row["value"] for row in found] == [0.5, 2, 3]
    assert [row["time"].microsecond for row in found[:2]] == [123_456] * 2
    assert round(found[2]["time"].timestamp() * 1000) == int(arrived.strip("b'").partition("-")[0])
    worker.terminate()
    assert await worker.wait() == 0
