"""The sink with TimescaleDB: claims, conflicts, poison, late rows into compressed chunks, retention."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import text

from worker.contract.entry_id import BEGINNING, EntryId
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.positions import Move, StreamPosition
from worker.db.record_retention import RecordRetention
from worker.db.session import Database
from worker.db.upsert import RecordTable
from worker.pipelines.model import Batch, Item, NotClaimed, Window, Written
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS, ChunkEvent
from worker.pipelines.sink import PostgresSink
from worker.pipelines.sources.stream.source import PositionClaim

NOW = datetime(2026, 11, 27, 10, tzinfo=UTC)
WINDOW = Window(1e12, 1e12)


class Carried:
    """Batches of one stream, one after the other."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.position = StreamPosition("default", "chunk_requests", "chunk_requests")
        self.sink = PostgresSink(database, CHUNK_REQUESTS, RecordTable(CHUNK_REQUESTS))
        self.last = BEGINNING

    async def start(self) -> None:
        async with self.database.transaction() as tx:
            await self.position.ensure(tx)
            state = await self.position.take_lease(tx, "me")
        assert state is not None
        self.token: UUID = state.token

    def batch(self, *documents: dict[str, object]) -> Batch[ChunkEvent]:
        after = EntryId(self.last.ms + len(documents), 0)
        claim = PositionClaim(self.position, Move(self.last, after, after.ms, None, "mark"), self.token)
        items = []
        for number, document in enumerate(documents):
            raw = json.dumps({"time": NOW.isoformat(), "path": "/", **document}).encode()
            items.append(Item(number, raw, CHUNK_REQUESTS.parse(raw, after, WINDOW)))
        return Batch(claim, "s", items)

    async def write(self, *documents: dict[str, object]) -> Written:
        batch = self.batch(*documents)
        outcome = await self.sink.write(batch)
        assert isinstance(outcome, Written)
        assert isinstance(await self.sink.write(batch), NotClaimed)
        self.last = EntryId(self.last.ms + len(documents), 0)
        return outcome


async def value(database: Database, query: str) -> object:
    async with database.transaction() as tx:
        return (await tx.execute(text(query))).scalar()


@pytest.fixture
async def carried(timescale_url: str) -> Carried:
    made = Carried(Database(parse_database_url(timescale_url), pool_size=1, overflow=0))
    await schema.upgrade(made.database)
    await made.start()
    return made


async def test_sink_on_a_hypertable_and_its_compressed_chunks(carried: Carried) -> None:
    database = carried.database
    try:
        late = (NOW - timedelta(days=3)).isoformat()
        assert await carried.write({"path": "/a"}, {"path": "/b", "time": late, "event_id": "e"}) == Written(rows=2)
        # A repeated event is no second row, and its neighbour is one.
        assert await carried.write({"time": late, "event_id": "e"}, {"path": "/c"}) == Written(rows=1, repeated=1)
        assert await value(database, "SELECT count(*) FROM chunk_requests") == 3

        async with database.transaction() as tx:
            await tx.execute(text("ALTER TABLE chunk_requests ADD CHECK (path <> '/bad')"))
        assert await carried.write({"path": "/d"}, {"path": "/bad"}, {"path": "/e"}) == Written(rows=2, letters=1)
        assert await value(database, "SELECT sqlstate FROM dead_letters") == "23514"

        async with database.transaction() as tx:
            await tx.execute(text("ALTER TABLE chunk_requests SET (timescaledb.compress)"))
            await tx.execute(text("SELECT compress_chunk(c) FROM show_chunks('chunk_requests') c"))
        await carried.write({"path": "/late", "time": late}, {"path": "/f"})
        await carried.write({"time": late, "event_id": "e"}, {"path": "/g", "time": late, "event_id": "f"})
        paths = "SELECT string_agg(path, ' ' ORDER BY path) FROM chunk_requests"
        assert await value(database, paths) == "/a /b /c /d /e /f /g /late"

        retention = RecordRetention("chunk_requests", "time", datetime.now(UTC) - NOW + timedelta(days=1, hours=12))
        async with database.transaction() as tx:
            while await retention.prune(tx, 100):
                pass
        assert await value(database, paths) == "/a /c /d /e /f"
    finally:
        await database.close()
