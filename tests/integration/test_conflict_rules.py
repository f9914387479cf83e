"""What becomes of a record whose key the table has already: by the rule of its pipeline."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

import pytest

from tests.support.world import World
from worker.contract.entry_id import EntryId
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.db.tickets import Ticket
from worker.db.upsert import RecordTable
from worker.pipelines.model import Batch, Item, RecordType, Window, Written
from worker.pipelines.records.bars_1m import BARS_1M
from worker.pipelines.records.session_events import SESSION_EVENTS
from worker.pipelines.sink import PostgresSink

NOW_MS = int(time.time() * 1000)
FUTURE_S = 300.0


class Table:
    """Writes documents as batches of one pipeline."""

    def __init__(self, world: World, record: RecordType[Any]) -> None:
        self._record = record
        self._database = Database(parse_database_url(world.database_url))
        self._sink = PostgresSink(self._database, record, RecordTable(record, future=FUTURE_S))

    async def write(self, *documents: tuple[EntryId, dict[str, Any]]) -> Any:
        window = Window(self._record.defaults.accept_past, FUTURE_S)
        items = []
        for arrived, document in documents:
            payload = json.dumps(document).encode()
            items.append(Item(arrived, payload, self._record.parse(payload, arrived, window)))
        return await self._sink.write(Batch(Ticket(uuid4(), self._record.name), "s", items))

    async def close(self) -> None:
        await self._database.close()


def at(number: int) -> EntryId:
    return EntryId(NOW_MS, number)


# Bars: the later entry wins.


@pytest.fixture
async def bars(world: World) -> AsyncIterator[Table]:
    table = Table(world, BARS_1M)
    yield table
    await table.close()


def bar(number: int, symbol: str = "A", **changes: Any) -> tuple[EntryId, dict[str, Any]]:
    """All six values are `number`."""
    prices = dict.fromkeys(("open", "high", "low", "close", "volume", "vwap"), number)
    return at(number), {"symbol": symbol, "timestamp": NOW_MS // 60_000 * 60_000, **prices, **changes}


async def stored_bars(world: World) -> dict[str, tuple[float, ...]]:
    found = await world.sql.fetch("SELECT symbol, open, high, low, close, volume, vwap FROM bars_1m")
    return {row["symbol"]: tuple(row.values())[1:] for row in found}


async def test_a_later_bar_replaces_all_six_values(world: World, bars: Table) -> None:
    assert await bars.write(bar(5), bar(6, "B")) == Written(2)
    assert await bars.write(bar(3)) == Written(1)
    assert await stored_bars(world) == {"A": (3,) * 6, "B": (6,) * 6}


async def test_the_last_of_two_bars_of_a_batch_wins(world: World, bars: Table) -> None:
    assert await bars.write(bar(1), bar(2, "B"), bar(3), bar(2)) == Written(4)
    assert await stored_bars(world) == {"A": (2,) * 6, "B": (2,) * 6}


async def test_a_bar_that_the_table_refuses_leaves_the_one_before_it(world: World, bars: Table) -> None:
    await world.sql.execute("ALTER TABLE bars_1m ADD CHECK (volume <> 3)")
    assert await bars.write(bar(1), bar(2, "B"), bar(3), bar(4, "C")) == Written(rows=3, letters=1)
    assert await stored_bars(world) == {"A": (1,) * 6, "B": (2,) * 6, "C": (4,) * 6}


async def test_bars_are_read_by_their_indexes(world: World) -> None:
    found = await world.sql.fetch("SELECT indexdef FROM pg_indexes WHERE tablename = 'bars_1m'")
    columns = {row["indexdef"].rpartition("(")[2].rstrip(")") for row in found if "brin" not in row["indexdef"]}
    assert columns == {'symbol, "timestamp"', "symbol", '"timestamp"'}


# Session events: the newest by arrival wins.


@pytest.fixture
async def sessions(world: World) -> AsyncIterator[Table]:
    table = Table(world, SESSION_EVENTS)
    yield table
    await table.close()


def event(arrived: EntryId, event_id: str, session_id: str = "s") -> tuple[EntryId, dict[str, Any]]:
    return arrived, {"session_id": session_id, "event_id": event_id, "ts": 0}


async def stored_events(world: World) -> dict[str, str]:
    found = await world.sql.fetch("SELECT session_id, last_event_id FROM session_events")
    return {row["session_id"]: row["last_event_id"] for row in found}


@pytest.mark.parametrize(
    ("batches", "newest"),
    [
        ([[1], [2]], 2),
        ([[2], [1]], 2),
        ([[1, 3, 2]], 3),
        ([[3], [1, 2]], 3),
        ([[1], [1]], 1),
    ],
)
async def test_the_newest_event_by_arrival_stays(
    world: World, sessions: Table, batches: Sequence[Sequence[int]], newest: int
) -> None:
    for batch in batches:
        assert await sessions.write(*(event(at(number), f"e{number}") for number in batch)) == Written(len(batch))
    assert await stored_events(world) == {"s": f"e{newest}"}


async def test_positions_are_compared_as_numbers(world: World, sessions: Table) -> None:
    """As text, 1700-10 is less than 1700-9."""
    await sessions.write(event(EntryId(NOW_MS, 9), "nine"))
    await sessions.write(event(EntryId(NOW_MS, 10), "ten"))
    assert await stored_events(world) == {"s": "ten"}


async def test_a_position_too_far_ahead_is_replaced_by_any_other(world: World, sessions: Table) -> None:
    """A clock that jumped a year ahead for a moment would keep each newer event out, for a year."""
    now = int(time.time() * 1000)
    await sessions.write(event(EntryId(now + 600_000, 0), "jumped"), event(EntryId(now + 60_000, 0), "near", "n"))
    await sessions.write(event(at(1), "new"), event(at(2), "older", "n"))
    assert await stored_events(world) == {"s": "new", "n": "near"}


async def test_an_event_is_recorded_at_its_arrival(world: World, sessions: Table) -> None:
    await sessions.write(event(at(1), "e"))
    recorded = await world.sql.fetchval("SELECT recorded_at FROM session_events")
    assert round(recorded.timestamp() * 1000) == NOW_MS
