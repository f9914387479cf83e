"""Demo requests: entries of the stream `chunk_requests`, each of which must become one row."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import uuid4

from redis.exceptions import RedisError
from sqlalchemy import column, func, select, table

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from worker.db.session import Database

STREAM = "chunk_requests"
TICK_S = 0.05
_rows = table(STREAM, column("sid"), column("uid"))


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one run: how many there are, and how many different requests they are."""

    stored: int
    different: int


class Requests:
    """Sends `rate` requests per second. `acknowledged` were confirmed by Redis; `indeterminate` may be there or not."""

    def __init__(self, redis: Redis, rate: float) -> None:
        self._redis = redis
        self._rate = rate
        # The rows of earlier runs stay in the table.
        self._run = uuid4().hex
        self._number = 0
        self.acknowledged = 0
        self.indeterminate = 0

    async def run(self, stop: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        while not stop.is_set():
            due = int((loop.time() - started) * self._rate) - self._number
            if due > 0:
                await self._send(due)
            await asyncio.sleep(TICK_S)

    async def _send(self, count: int) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for _ in range(count):
            pipeline.xadd(STREAM, {"data": self._make_document()})
        try:
            await pipeline.execute()
        except (RedisError, OSError):
            self.indeterminate += count
        else:
            self.acknowledged += count

    def _make_document(self) -> str:
        self._number += 1
        chunk = self._number % 500
        return json.dumps(
            {
                "time": datetime.now(UTC).isoformat(),
                "path": f"/vod/demo_{self._number % 100:04}/{chunk:05}.m4s",
                "ip": f"192.0.2.{self._number % 254 + 1}",
                "user_agent": "demo",
                "sid": self._run,
                "uid": str(self._number),
            }
        )

    async def read_rows(self, database: Database) -> Rows:
        """Raises Unavailable."""
        mine = select(func.count(), func.count(_rows.c.uid.distinct())).where(_rows.c.sid == self._run)
        async with database.transaction() as tx:
            return Rows(*(await tx.execute(mine)).one())

    def is_exact(self, rows: Rows) -> bool:
        """Each confirmed request is one row, and no request is two."""
        return rows.stored == rows.different and 0 <= rows.stored - self.acknowledged <= self.indeterminate
