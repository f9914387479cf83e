"""The pool of connections to Postgres, and the only way to run a transaction."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import uuid4

from sqlalchemy import Connection, event, func, select
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from worker.db.connecting import connect
from worker.db.encoding import can_encode
from worker.db.errors import READ_ONLY, REMEDIES, database_errors, sqlstate
from worker.errors import DatabaseRefused, DatabaseUnavailable, NotConnected
from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.pool import ConnectionPoolEntry

    from worker.db.address import DatabaseAddress

# A connection inside a transaction, as `Database.transaction` yields it.
Transaction: TypeAlias = AsyncConnection

CONNECT_TIMEOUT_S = 5.0
# Longer than the server's own statement timeout, so that it expires only when the server cannot be reached.
COMMAND_TIMEOUT_S = 35.0
CLOSE_TIMEOUT_S = 1.0
KEPT_STATEMENTS = 100
NO_SUCH_STATEMENT = "26000"
GENERATION = "generation"
# What PgBouncer says of a search path.
UNSUPPORTED_AT_START = "unsupported startup parameter"
POOLER_REMEDY = "DATABASE_URL leads to a pooler: add pgbouncer=true, so that the schema is set in each transaction."

log = get_logger(__name__)


class Database:
    """A pool of connections to one database.

    `pool_size` connections stay open, `overflow` more are opened on demand. `recycle` (age at which a connection is
    replaced) and `command_timeout` (for each statement) are in seconds.
    """

    def __init__(
        self,
        address: DatabaseAddress,
        pool_size: int = 5,
        overflow: int = 20,
        recycle: float = 300.0,
        command_timeout: float | None = COMMAND_TIMEOUT_S,
    ) -> None:
        self._address = address
        self._kept_statements = KEPT_STATEMENTS
        # Of the newest connection, which reports it when it is opened; None: none was opened yet.
        self.encoding: str | None = None
        session = dict(address.session)
        self._search_path = session.pop("search_path", None) if address.pooled else None
        self.engine: AsyncEngine = create_async_engine(
            "postgresql+asyncpg://",
            pool_size=pool_size,
            max_overflow=overflow,
            pool_recycle=int(recycle),
            pool_timeout=CONNECT_TIMEOUT_S,
            hide_parameters=True,
            connect_args={
                "async_creator_fn": partial(connect, address),
                "timeout": CONNECT_TIMEOUT_S,
                "command_timeout": command_timeout,
                # Behind a transaction pooler, clients share a server connection, so statement names must be unique.
                # The driver's own cache is off: it serves only the driver's own queries, which run once for each
                # connection, under numbered names.
                "statement_cache_size": 0,
                "prepared_statement_name_func": lambda: f"vw_{uuid4().hex}",
                "server_settings": {"application_name": "viewer-worker", **session},
            },
        )
        self._in_use: set[Any] = set()
        self._generation = 0
        if self._search_path:
            event.listen(self.engine.sync_engine, "begin", self._set_search_path)
        event.listen(self.engine.sync_engine, "do_connect", self._before_connect)
        event.listen(self.engine.sync_engine, "connect", self._after_connect)
        event.listen(self.engine.sync_engine, "checkout", self._refuse_given_up)
        event.listen(self.engine.sync_engine, "checkout", lambda connection, *_: self._in_use.add(connection))
        event.listen(self.engine.sync_engine, "checkin", lambda connection, *_: self._in_use.discard(connection))
        event.listen(self.engine.sync_engine, "invalidate", lambda connection, *_: self._in_use.discard(connection))

    def _before_connect(self, _dialect: object, _record: object, _args: object, options: dict[str, object]) -> None:
        options["prepared_statement_cache_size"] = self._kept_statements

    def _set_search_path(self, connection: Connection) -> None:
        """A pooler refuses it at the start of a session, and the next transaction may get another session."""
        connection.execute(select(func.set_config("search_path", self._search_path, True)))

    def _after_connect(self, connection: Any, entry: ConnectionPoolEntry) -> None:
        entry.info[GENERATION] = self._generation
        self.encoding = getattr(connection.driver_connection.get_settings(), "server_encoding", None)

    def _refuse_given_up(self, _connection: object, entry: ConnectionPoolEntry, _: object) -> None:
        """Make the pool connect again."""
        if entry.info[GENERATION] != self._generation:
            raise DisconnectionError

    def can_store(self, text: str) -> bool:
        """False when the database's encoding certainly lacks a character of the text."""
        return can_encode(text, self.encoding)

    def without_time_limit(self) -> Database:
        """A pool for the same database without a time limit for statements, for migrations. Close it after use."""
        return Database(self._address, command_timeout=None)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """One transaction: committed when the block ends, rolled back when it raises.

        Raises DatabaseUnavailable where a retry may succeed, DatabaseRefused where it would not. If the commit raises
        DatabaseUnavailable, it may or may not have happened; the caller has to ask the database.

        After an error that means a read-only session, no open connection is used again: the name may lead to another
        server by now, or the database accept writes in a new session.
        """
        with database_errors():
            connection = await self._connection()
            generation = self._generation
            try:
                async with connection.begin():
                    yield connection
            except BaseException as error:
                if sqlstate(error) == NO_SUCH_STATEMENT and self._kept_statements:
                    await connection.invalidate()  # the pool that is disposed of would leave it open
                    await self._stop_keeping_statements()
                if sqlstate(error) == READ_ONLY:
                    # A standby; or the database was read-only when the connection was opened, and that stays so for it.
                    self._generation = max(self._generation, generation + 1)
                if not isinstance(error, Exception) or isinstance(error, TimeoutError):
                    # Cancelled or timed out during a command: the protocol on this connection is in an unknown state.
                    await connection.invalidate()
                raise
            finally:
                await connection.close()

    async def _connection(self) -> AsyncConnection:
        try:
            with database_errors():
                return await self.engine.connect()
        except (DatabaseUnavailable, DatabaseRefused) as error:
            remedy = error.remedy if isinstance(error, DatabaseUnavailable) else REMEDIES[""]
            if UNSUPPORTED_AT_START in str(error):
                remedy = POOLER_REMEDY
            raise NotConnected(f"{self._address.place}: {error}", remedy) from error

    async def _stop_keeping_statements(self) -> None:
        """Stop keeping prepared statements: behind a transaction pooler, the next server connection lacks them."""
        log.warning("connection pooler detected, prepared statements are not kept from now on")
        self._kept_statements = 0
        await self.engine.dispose()

    def abort(self) -> None:
        """Cut the connections in use. To close them properly, the driver waits two seconds for the server."""
        for connection in self._in_use:
            connection.driver_connection.terminate()

    async def close(self) -> None:
        """Close all connections. Limited in time, because the server may be unreachable."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.engine.dispose()
