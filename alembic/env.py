"""Runs the migrations on the caller's connection, or on one made from the worker's settings."""

from __future__ import annotations

import asyncio

from sqlalchemy import Connection

from alembic import context
from worker.db.schema import VERSION_TABLE, lock_migrations
from worker.db.session import Database
from worker.db.tables import metadata
from worker.settings.environment import load_settings


def migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, version_table=VERSION_TABLE)
    with context.begin_transaction():
        lock_migrations(connection)
        context.run_migrations()


async def connect_and_migrate() -> None:
    database = Database(load_settings().database).without_time_limit()
    try:
        async with database.engine.connect() as connection:
            await connection.run_sync(migrate)
            await connection.commit()
    finally:
        await database.close()


def print_sql() -> None:
    context.configure(
        dialect_name="postgresql", literal_binds=True, target_metadata=metadata, version_table=VERSION_TABLE
    )
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    print_sql()
elif (handed := context.config.attributes.get("connection")) is not None:
    migrate(handed)
else:
    asyncio.run(connect_and_migrate())
