"""Real bars, and a stream of bars with the workers that carry it."""

from __future__ import annotations

import asyncio
import csv
import importlib.metadata
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from tests.support.tools import missing
from tests.support.world import CliWorker, World
from worker import Bar

# The package `backtesting` has them: prices of days, of hours and of months. Only BTCUSD has volumes with fractions.
GOOG, EURUSD, BTCUSD = "GOOG", "EURUSD", "BTCUSD"
MINUTE = datetime(2026, 11, 27, 10, tzinfo=UTC)


def read_csv(symbol: str) -> list[dict[str, Any]]:
    """The bars of a file as documents, the oldest first. A volume with a fraction stays as it is."""
    try:
        files = importlib.metadata.files("backtesting") or []
    except importlib.metadata.PackageNotFoundError:
        missing("no package backtesting: pip install --no-deps -r requirements-data.lock")
    (path,) = [file for file in files if file.name == f"{symbol}.csv"]
    documents = []
    for row in csv.DictReader(path.read_text().splitlines()):
        open_, high, low, close, volume = (float(row[name]) for name in ("Open", "High", "Low", "Close", "Volume"))
        documents.append(
            {
                "symbol": symbol,
                "timestamp": datetime.fromisoformat(row[""]).replace(tzinfo=UTC).isoformat(),
                "open": open_,
                "high": high,
                "low": low,
                "close": close,
                "volume": int(volume) if volume.is_integer() else volume,
                "vwap": (high + low + close) / 3,
            }
        )
    return documents


def as_bar(document: dict[str, Any]) -> Bar:
    return Bar(**document | {"timestamp": datetime.fromisoformat(document["timestamp"])})


def make_document(symbol: str, number: int = 1, **fields: Any) -> dict[str, Any]:
    """A bar of one minute. All six values are `number`."""
    values = dict.fromkeys(("open", "high", "low", "close", "volume", "vwap"), number)
    return {"symbol": symbol, "timestamp": MINUTE.isoformat(), **values, **fields}


def make_bar(symbol: str, number: int = 1, **fields: Any) -> Bar:
    values = dict.fromkeys(("open", "high", "low", "close", "volume", "vwap"), number)
    return Bar(**{"symbol": symbol, "timestamp": MINUTE, **values, **fields})


async def stored_bars(sql: Any) -> list[Bar]:
    """The rows of the table, by symbol and time."""
    return [Bar(**row) for row in await sql.fetch("SELECT * FROM bars_1m ORDER BY symbol, timestamp")]


class BarStream:
    """A stream of bars in a world. `count` entries were added so far."""

    def __init__(self, world: World, name: str = "bars_1m", field: str = "data") -> None:
        self.world = world
        self.name = f"{name} {world.prefix}"
        self.field = field
        self.count = 0
        self._workers: list[CliWorker] = []

    async def add(self, documents: Iterable[dict[str, Any] | bytes]) -> None:
        pipeline = self.world.redis.pipeline(transaction=False)
        for document in documents:
            payload = document if isinstance(document, bytes) else json.dumps(document)
            pipeline.xadd(self.name, {self.field: payload})
            self.count += 1
        await pipeline.execute()

    @property
    def environment(self) -> dict[str, str]:
        return self.world.environment | {
            "PIPELINES": "bars_1m",
            "BARS_1M_STREAM": self.name,
            "BARS_1M_STREAM_FIELD": self.field,
            "BARS_DB_WRITE_INTERVAL": "50ms",
        }

    def start(self, *arguments: str, **settings: str) -> CliWorker:
        self._workers.append(CliWorker(self.environment | settings, *(arguments or ("run",))))
        return self._workers[-1]

    async def carried(self, timeout: float = 60.0) -> None:
        """Wait until every entry is carried: a row, a part of a row, or a dead letter."""
        read = "SELECT entries_read, lost FROM stream_positions WHERE stream = $1"
        async with asyncio.timeout(timeout):
            while (row := await self.world.sql.fetchrow(read, self.name)) is None or row["entries_read"] != self.count:
                await asyncio.sleep(0.05)
        assert row["lost"] == 0

    async def rows(self) -> list[Bar]:
        return await stored_bars(self.world.sql)

    async def letters(self) -> list[Any]:
        return list(await self.world.sql.fetch("SELECT * FROM dead_letters ORDER BY id"))

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
