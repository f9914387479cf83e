"""The parts of workers that carry a stream, driven step by step, and the documents of its entries."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from tests.support.records import InProcessCarrier
from worker.contract.entry_id import EntryId
from worker.observability.status import SERVERS
from worker.pipelines.model import Batch, ReadOutcome, WriteOutcome, Written

# When the tests' entries are added, in milliseconds. It lies in the past, so KEEP never protects an entry.
BEGAN_MS = 1_700_000_000_000
GROUP = "viewer-worker"
SETTINGS = {"PIPELINES": "chunk_requests", "CHUNKLOG_BATCH_SIZE": "2", "CHUNKLOG_BATCH_TIMEOUT": "1ms"}
# The table refuses such a path where `REFUSE` is in force.
REFUSE = "ALTER TABLE chunk_requests ADD CHECK (path NOT LIKE '/refused%')"
_NUMBER = re.compile(rb"#(\d+)")


def good(number: int) -> bytes:
    return json.dumps({"time": BEGAN_MS, "path": f"/#{number}"}).encode()


def poison(number: int) -> bytes:
    """No record: it becomes a dead letter."""
    return b"poison #%d" % number


def refused(number: int) -> bytes:
    """A record that the table refuses: it becomes a dead letter."""
    return json.dumps({"time": BEGAN_MS, "path": f"/refused#{number}"}).encode()


def number_of(text: bytes | str) -> int:
    """The number of the entry that a document, or a path, is of."""
    found = _NUMBER.search(text if isinstance(text, bytes) else text.encode())
    assert found is not None
    return int(found[1])


class StreamWorker:
    """The real parts of one worker with one stream."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._carrier = InProcessCarrier(environment)
        for check in SERVERS:
            self._carrier.status.ok(check)
        (stream,) = self._carrier.pipelines.streams
        self.database = self._carrier.database
        self.pipeline: Any = stream.pipeline
        self.lease: Any = stream.lease
        self.source: Any = self.pipeline.source
        self.connection: Any = self.source._looker.connection

    async def read(self) -> ReadOutcome[Any]:
        """Take the lease if it is free, and read what follows the committed position."""
        await self.lease.take()
        self.source.reset()
        return await self.source.read()

    async def write(self, batch: Any) -> WriteOutcome:
        outcome = await self.pipeline.delivery.deliver(batch)
        self.source.done(batch, outcome)
        return outcome

    async def carry(self) -> ReadOutcome[Any]:
        """Read and write until there is no batch; return what was read instead."""
        read = await self.read()
        while isinstance(read, Batch):
            assert isinstance(await self.write(read), Written)
            read = await self.source.read()
        return read

    def in_the_next_look(self, step: int, action: Callable[[], Awaitable[Any]], times: int = 1) -> None:
        """Run `action` before this command of the next look: 1 is XRANGE, 2 the second run of the script."""
        send = self.connection.send
        left = times

        async def split(commands: Sequence[Any], timeout: float) -> list[Any]:
            nonlocal left
            if len(commands) != 3 or not left:
                return await send(commands, timeout)
            left -= 1
            replies = []
            for number, command in enumerate(commands):
                if number == step:
                    await action()
                replies += await send([command], timeout)
            return replies

        self.connection.send = split

    async def close(self) -> None:
        await self.source.close()
        await self.database.close()
        await self._carrier.redis.close()


class Row(NamedTuple):
    """The row of `stream_positions`."""

    last: EntryId
    entries_read: int | None
    high: EntryId | None
    incarnation: str | None
    lost: int
    gaps: int


class Stored(NamedTuple):
    """What is in Postgres at one instant: numbers of rows and of dead letters, and the row of the stream."""

    rows: list[int]
    letters: list[int]
    row: Row
    candidate: str | None

    @property
    def carried(self) -> list[int]:
        return sorted(self.rows + self.letters)


_STORED = """
    SELECT (SELECT coalesce(array_agg(path), '{}') FROM chunk_requests) AS paths,
           (SELECT coalesce(array_agg(payload), '{}') FROM dead_letters) AS payloads,
           p.* FROM stream_positions p WHERE stream = $1 AND source = $2
"""


async def read_stored(sql: Any, stream: str, source: str = "default") -> Stored:
    found = await sql.fetchrow(_STORED, stream, source)
    assert found is not None
    high = None if found["high_ms"] is None else EntryId(found["high_ms"], found["high_seq"])
    row = Row(
        EntryId(found["last_ms"], found["last_seq"]),
        found["entries_read"],
        high,
        found["incarnation"],
        found["lost"],
        found["gaps"],
    )
    return Stored(
        [number_of(path) for path in found["paths"]],
        [number_of(text) for text in found["payloads"]],
        row,
        found["candidate"],
    )
