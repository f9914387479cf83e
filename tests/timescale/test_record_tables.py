"""The sink with TimescaleDB: claims, conflicts, poison, late rows into compressed chunks, retention."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from tests.support.bars import make_document
from worker.contract.entry_id import BEGINNING, EntryId
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.positions import Move, StreamPosition
from worker.db.record_retention import RecordRetention
from worker.db.session import Database
from worker.db.tickets import Ticket
from worker.db.upsert import RecordTable
from worker.pipelines.model import Batch, Item, NotClaimed, Window, Written
from worker.pipelines.records.bars_1m import BARS_1M
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


async def test_bars_replace_those_of_a_hypertable_also_in_compressed_chunks(timescale_url: str) -> None:
    database = Database(parse_database_url(timescale_url), pool_size=1, overflow=0)
    sink = PostgresSink(database, BARS_1M, RecordTable(BARS_1M))

    async def write(*bars: tuple[str, int, int]) -> None:
        """Symbol, age in days, and the six values of each bar."""
        items = []
        for symbol, days, number in bars:
            time = (NOW - timedelta(days=days)).isoformat()
            document = json.dumps(make_document(symbol, number, timestamp=time)).encode()
            items.append(Item(number, document, BARS_1M.parse(document, EntryId(0, 1), WINDOW)))
        assert await sink.write(Batch(Ticket(uuid4(), "bars_1m"), "s", items)) == Written(len(items))

    async def stored() -> list[tuple[object, ...]]:
        """As `write` takes them; the six values must be equal."""
        async with database.transaction() as tx:
            rows = list(await tx.execute(text("SELECT * FROM bars_1m ORDER BY symbol, timestamp DESC")))
        assert all(len(set(row[2:])) == 1 for row in rows)
        return [(row.symbol, (NOW - row.timestamp).days, row.volume) for row in rows]

    try:
        await schema.upgrade(database)
        hypertable = "SELECT num_dimensions FROM timescaledb_information.hypertables WHERE hypertable_name = 'bars_1m'"
        assert await value(database, hypertable) == 1
        await write(("A", 0, 1), ("A", 30, 2), ("B", 30, 3), ("A", 0, 4))
        assert await stored() == [("A", 0, 4), ("A", 30, 2), ("B", 30, 3)]
        chunks = "SELECT count(*) FROM timescaledb_information.chunks WHERE hypertable_name = 'bars_1m'"
        assert await value(database, chunks) == 2

        async with database.transaction() as tx:
            await tx.execute(text("ALTER TABLE bars_1m SET (timescaledb.compress)"))
            await tx.execute(text("SELECT compress_chunk(c) FROM show_chunks('bars_1m') c"))
        assert await value(database, f"{chunks} AND is_compressed") == 2
        await write(("A", 30, 1), ("C", 30, 5), ("A", 0, 6), ("C", 30, 7))
        assert await stored() == [("A", 0, 6), ("A", 30, 1), ("B", 30, 3), ("C", 30, 7)]
    finally:
        await database.close()
