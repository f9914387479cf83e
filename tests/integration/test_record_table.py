"""Rows come back from the table as they were inserted."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.support.world import World
from worker.db.address import parse_database_url
from worker.db.packed_text import NULL, SEPARATOR
from worker.db.session import Database
from worker.db.upsert import RecordTable
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
TEXTS = (None, "", "a", "NULL", "{}", '"', "\\", ",", SEPARATOR, NULL, f"x{SEPARATOR}{NULL}", "ß😀", "\n", "x" * 5000)


async def test_texts_of_every_kind_are_stored_as_they_are(world: World) -> None:
    rng = random.Random(7)
    table = RecordTable(CHUNK_REQUESTS)
    database = Database(parse_database_url(world.database_url))
    number, expected = 0, []
    for size in [1] * 40 + [2, 3, 5, 50] * 10:
        rows: list[tuple[Any, ...]] = []
        for _ in range(size):
            number += 1
            texts = [rng.choice(TEXTS) for _ in range(4)]
            address, event_id = rng.choice((None, "203.0.113.7")), rng.choice((None, f"e{number}"))
            path = rng.choice(TEXTS[1:])
            rows.append((BEGAN + timedelta(seconds=number), path, address, *texts, event_id))
        async with database.transaction() as tx:
            assert await table.insert(tx, rows) == size
        expected += rows
    await database.close()
    names = ", ".join(column.name for column in CHUNK_REQUESTS.columns).replace("ip", "host(ip)")
    found = await world.sql.fetch(f"SELECT {names} FROM chunk_requests ORDER BY time")
    assert [tuple(row.values()) for row in found] == expected
