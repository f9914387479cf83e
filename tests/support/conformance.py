"""The sources and sinks that tests/integration/test_conformance.py holds against pipelines/model.py."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from tests.support.memory import MemoryClaim, MemorySink, MemorySource
from tests.support.streams import REFUSE, StreamWorker, number_of
from tests.support.streams import SETTINGS as STREAM_SETTINGS
from tests.support.world import World
from worker.contract.entry_id import EntryId
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.db.tickets import Ticket
from worker.db.upsert import RecordTable
from worker.pipelines.batcher import Batcher
from worker.pipelines.buffer import Buffer, ByteBudget
from worker.pipelines.model import Batch, Claim, Idle, Item, Letter, Sink, Source, Window
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS
from worker.pipelines.sink import PostgresSink
from worker.pipelines.sources.buffered import BufferedSource
from worker.runtime.clock import SystemClock

WINDOW = Window(past=86_400, future=300)


def document(number: int, kind: str = "") -> bytes:
    return json.dumps({"time": int(time.time() * 1000), "path": f"/{kind}#{number}"}).encode()


def invalid(number: int) -> bytes:
    return b"!not json #%d" % number


class Store(Protocol):
    """Where the sink writes: the numbers of rows and of letters."""

    async def rows(self) -> list[int]: ...
    async def letters(self) -> list[int]: ...


@dataclass
class MemoryStore:
    sink: MemorySink

    async def rows(self) -> list[int]:
        return [number_of(row) for row in self.sink.rows]

    async def letters(self) -> list[int]:
        return [number_of(letter.payload) for letter in self.sink.letters]


@dataclass
class PostgresStore:
    world: World

    async def rows(self) -> list[int]:
        found = await self.world.sql.fetch("SELECT path FROM chunk_requests")
        return sorted(number_of(row["path"]) for row in found)

    async def letters(self) -> list[int]:
        return [number_of(row["payload"]) for row in await self.world.sql.fetch("SELECT payload FROM dead_letters")]


# Sources


@dataclass
class SourceCase:
    """A source that reads two documents at once, and a sink that its claims fit."""

    source: Source[Any]
    sink: Sink[Any]
    store: Store
    add: Any

    async def carry(self) -> int:
        """Write all that there is. Returns how many batches that took."""
        batches = 0
        while isinstance(batch := await self.source.read(), Batch):
            self.source.done(batch, await self.sink.write(batch))
            batches += 1
        assert isinstance(batch, Idle)
        return batches


@asynccontextmanager
async def memory_source(world: World) -> AsyncIterator[SourceCase]:
    source, sink = MemorySource(), MemorySink()

    async def add(*documents: bytes) -> None:
        source.add(*documents)

    yield SourceCase(source, sink, MemoryStore(sink), add)


@asynccontextmanager
async def stream_source(world: World) -> AsyncIterator[SourceCase]:
    worker = StreamWorker(world.environment | STREAM_SETTINGS)

    async def add(*documents: bytes) -> None:
        for each in documents:
            await world.redis.xadd(world.stream, {"data": each})

    await worker.lease.take()
    yield SourceCase(worker.source, worker.pipeline.delivery._sink, PostgresStore(world), add)
    await worker.close()


@asynccontextmanager
async def buffered_source(world: World) -> AsyncIterator[SourceCase]:
    clock = SystemClock()
    database = Database(parse_database_url(world.database_url))
    buffer = Buffer(
        Batcher(2, 0.0),
        batch_size=2,
        capacity=100,
        budget=ByteBudget(2**20),
        monotonic=clock.monotonic,
        on_due=lambda: source.wake(),
    )
    source = BufferedSource(CHUNK_REQUESTS, WINDOW, buffer, clock)

    async def add(*documents: bytes) -> None:
        for each in documents:
            assert buffer.add(each)

    sink = PostgresSink(database, CHUNK_REQUESTS, RecordTable(CHUNK_REQUESTS))
    yield SourceCase(source, sink, PostgresStore(world), add)
    await database.close()


SOURCES = {"memory": memory_source, "stream": stream_source, "buffered": buffered_source}


# Sinks


@dataclass
class SinkCase:
    sink: Sink[Any]
    store: Store
    new_claim: Any
    break_table: Any
    repair_table: Any

    def batch(self, *documents: bytes, claim: Claim | None = None, letters: tuple[Letter, ...] = ()) -> Batch[Any]:
        arrived = EntryId(int(time.time() * 1000), 0)
        items = [
            Item(number, each, CHUNK_REQUESTS.parse(each, arrived, WINDOW)) for number, each in enumerate(documents)
        ]
        return Batch(claim or self.new_claim(), "o", items, letters)


@asynccontextmanager
async def memory_sink(world: World) -> AsyncIterator[SinkCase]:
    sink = MemorySink()

    async def breaks(broken: bool) -> None:
        sink.refuses_all = broken

    @dataclass
    class Paths(MemoryStore):
        async def rows(self) -> list[int]:
            return [number_of(row.path) for row in self.sink.rows]

    yield SinkCase(sink, Paths(sink), lambda: MemoryClaim(uuid4()), lambda: breaks(True), lambda: breaks(False))


STRANGE = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
        IF new.path LIKE '/strange%' THEN RAISE EXCEPTION 'strange' USING ERRCODE = 'ZZ999'; END IF; RETURN new;
    END$$;
    CREATE TRIGGER strange BEFORE INSERT ON chunk_requests FOR EACH ROW EXECUTE FUNCTION refuse()
"""


@asynccontextmanager
async def postgres_sink(world: World) -> AsyncIterator[SinkCase]:
    database = Database(parse_database_url(world.database_url))
    await world.sql.execute(REFUSE)
    await world.sql.execute(STRANGE)

    async def run(statement: str) -> None:
        await world.sql.execute(statement)

    yield SinkCase(
        PostgresSink(database, CHUNK_REQUESTS, RecordTable(CHUNK_REQUESTS)),
        PostgresStore(world),
        lambda: Ticket(uuid4(), "chunk_requests"),
        lambda: run("ALTER TABLE chunk_requests RENAME TO gone"),
        lambda: run("ALTER TABLE gone RENAME TO chunk_requests"),
    )
    await database.close()


SINKS = {"memory": memory_sink, "postgres": postgres_sink}
