"""A stream of session events, with the workers that carry it and what must be in the table."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.support.world import CliWorker, World


async def stored_events(sql: Any) -> dict[str, str]:
    """Session → its last event id, as the table has it."""
    rows = await sql.fetch("SELECT session_id, last_event_id FROM session_events")
    return {row["session_id"]: row["last_event_id"] for row in rows}


class SessionStream:
    """`newest`: the last event id that was added of each session. `count` entries were added so far."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.name = f"session_events {world.prefix}"
        self.count = 0
        self.newest: dict[str, str] = {}
        self._workers: list[CliWorker] = []

    async def add(self, session_id: str, event_id: str, entry_id: str = "*", **fields: Any) -> str:
        """Returns the id of the entry."""
        self.newest[session_id] = event_id
        return await self.add_document(
            json.dumps({"session_id": session_id, "event_id": event_id, **fields}).encode(), entry_id
        )

    async def add_document(self, document: bytes, entry_id: str = "*") -> str:
        self.count += 1
        return str((await self.world.redis.xadd(self.name, {"data": document}, id=entry_id)).decode())

    @property
    def environment(self) -> dict[str, str]:
        return self.world.environment | {
            "PIPELINES": "session_events",
            "SESSION_EVENTS_STREAM": self.name,
            "SESSION_FLUSH_INTERVAL": "20ms",
        }

    def start(self, *arguments: str, **settings: str) -> CliWorker:
        self._workers.append(CliWorker(self.environment | settings, *(arguments or ("run",))))
        return self._workers[-1]

    async def carried(self, timeout: float = 60.0) -> None:
        """Wait until every entry is a row, older than one, or a dead letter."""
        read = "SELECT entries_read, lost FROM stream_positions WHERE stream = $1"
        async with asyncio.timeout(timeout):
            while (row := await self.world.sql.fetchrow(read, self.name)) is None or row["entries_read"] != self.count:
                await asyncio.sleep(0.05)
        assert row["lost"] == 0

    async def stored(self) -> dict[str, str]:
        return await stored_events(self.world.sql)

    async def letters(self) -> list[Any]:
        return list(await self.world.sql.fetch("SELECT * FROM dead_letters ORDER BY id"))

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
