"""Metrics in many chunks: a batch is one transaction, and buckets are those of a plain table."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from worker import Metric, MetricStore
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.read_limit import ReadLimit
from worker.db.record_reads import RecordReader
from worker.db.session import Database
from worker.errors import DatabaseRefused

FIRST = datetime(2026, 11, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


def metric(hour: int, value: float) -> Metric:
    return Metric(time=FIRST + hour * HOUR, service_name="s", metric_name="m", value=value, event_id=f"{hour}")


async def test_batches_are_written_whole_and_read_in_buckets_across_chunks(timescale_url: str) -> None:
    # The server has one connection.
    database = Database(parse_database_url(timescale_url), pool_size=1, overflow=0)
    await schema.upgrade(database)
    async with database.transaction() as tx:
        await tx.execute(text("ALTER TABLE metrics ADD CHECK (value < 1000)"))
        index = await tx.execute(text("SELECT indexdef FROM pg_indexes WHERE indexname = 'metrics_time_idx'"))
        assert '("time" DESC)' in index.scalar_one()
        chunked = "SELECT count(*) FROM timescaledb_information.hypertables WHERE hypertable_name = 'metrics'"
        assert (await tx.execute(text(chunked))).scalar_one() == 1
    await database.close()
    batch = [metric(hour, hour) for hour in range(24 * 10)]
    async with MetricStore(timescale_url) as store:
        with pytest.raises(DatabaseRefused):
            await store.bulk_insert_metrics([*batch, metric(500, 1000)])
        assert await store.bulk_insert_metrics(batch[24:]) == 24 * 9
        assert await store.bulk_insert_metrics(batch) == 24
    reader = RecordReader(database, ReadLimit())
    assert len(await reader.metric_values("s", "m", FIRST, FIRST + 100 * DAY, 1501)) == 24 * 10
    found = await reader.metric_buckets("s", "m", FIRST, FIRST + 2 * DAY - HOUR, DAY, 1e290)
    assert [tuple(row.values()) for row in found] == [(FIRST, 24, 0, 23, 276), (FIRST + DAY, 24, 24, 47, 852)]
    await database.close()
