"""Bars in many chunks: the same answers as from a plain table, and chunks outside of the range are not read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import text

from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.read_limit import ReadLimit
from worker.db.record_reads import BAR_SETTINGS, RecordReader
from worker.db.session import Database

FIRST = datetime(2025, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
HOURS = 24 * 7 * 20
INSERT = text(
    """
    INSERT INTO bars_1m
    SELECT 'S' || s, timestamptz '2025-01-01Z' + h * interval '1 hour', h, h, h, h, h, h
    FROM generate_series(0, :hours - 1) h, generate_series(1, 3) s
    """
)
# Each partition that the plan reads is a line of its own.
EXPLAIN = text(
    """
    EXPLAIN SELECT * FROM bars_1m
    WHERE (symbol, timestamp) >= ('S2', timestamptz '2025-02-01Z')
        AND (symbol, timestamp) <= ('S2', timestamptz '2025-02-02Z')
        AND timestamp BETWEEN timestamptz '2025-02-01Z' AND timestamptz '2025-02-02Z'
    ORDER BY symbol, timestamp LIMIT 1501
    """
)


async def test_bars_are_read_across_chunks(timescale_url: str) -> None:
    database = Database(parse_database_url(timescale_url), pool_size=1, overflow=0)
    await schema.upgrade(database)
    async with database.transaction() as tx:
        await tx.execute(INSERT, {"hours": HOURS})
        chunks = (await tx.execute(text("SELECT count(*) FROM show_chunks('bars_1m')"))).scalar_one()
        assert chunks >= 20
    reader = RecordReader(database, ReadLimit())
    assert hours_of(await reader.bars("S2", FIRST + 160 * HOUR, FIRST + 180 * HOUR, 1501)) == [*range(160, 181)]
    assert hours_of(await reader.bars("S2", FIRST, FIRST + HOURS * HOUR, 1501)) == [*range(1501)]
    assert hours_of(await reader.latest_bars("S2", 1000)) == [*range(HOURS - 1000, HOURS)]
    assert hours_of(await reader.latest_bars("unknown", 1000)) == []
    async with database.transaction() as tx:
        await tx.execute(BAR_SETTINGS)
        plan = "\n".join((await tx.execute(EXPLAIN)).scalars())
    assert "Sort" not in plan.replace("Sort Key", "")
    assert 1 <= plan.count("Index Scan") <= 2, plan
    await database.close()


def hours_of(rows: Any) -> list[int]:
    assert {row["symbol"] for row in rows} <= {"S2"}
    return [(row["timestamp"] - FIRST) // HOUR for row in rows]
