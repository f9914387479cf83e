"""Opens the connections to Redis and Postgres that the settings name."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from worker.db.session import Database
from worker.redis.client import RedisClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from worker.settings.model import Settings


@asynccontextmanager
async def open_database(settings: Settings) -> AsyncIterator[Database]:
    """Connects at the first use; closed at the end."""
    database = Database(
        settings.database,
        pool_size=settings.db_max_idle_conns,
        overflow=settings.db_max_connections - settings.db_max_idle_conns,
        recycle=settings.db_conn_max_lifetime.total_seconds(),
    )
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def open_connections(settings: Settings) -> AsyncIterator[tuple[Database, RedisClient]]:
    """To both servers; as `open_database`."""
    async with open_database(settings) as database:
        redis = RedisClient(settings.redis)
        try:
            yield database, redis
        finally:
            await redis.close()
