"""The pool of connections to Postgres, and the one way to run a transaction."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias
from uuid import uuid4

from sqlalchemy import URL, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from worker.db.errors import database_errors, sqlstate
from worker.errors import DatabaseUnavailable
from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from worker.db.address import DatabaseAddress

# A connection in the middle of a transaction, as `Database.transaction` hands it out.
Transaction: TypeAlias = AsyncConnection

CONNECT_TIMEOUT_S = 5.0
# Past the server's own statement timeout, so that this one only speaks when the server is out of reach.
COMMAND_TIMEOUT_S = 35.0
GOODBYE_S = 1.0
KEPT_STATEMENTS = 100
NO_SUCH_STATEMENT = "26000"

log = get_logger(__name__)


class Database:
    """Connections to one database.

    `pool_size` are kept, `overflow` more are opened on demand. `recycle` (age at which a connection is replaced) and
    `command_timeout` (of each statement) are seconds.
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
        self.engine: AsyncEngine = create_async_engine(
            URL.create("postgresql+asyncpg", address.user, address.password, address.host, address.port, address.name),
            pool_size=pool_size,
            max_overflow=overflow,
            pool_recycle=int(recycle),
            pool_timeout=CONNECT_TIMEOUT_S,
            hide_parameters=True,
            connect_args={
                # libpq's options (sslmode, sslrootcert, host=/socket, …) are read by the driver from a DSN.
                "dsn": f"postgresql://?{address.options}",
                "timeout": CONNECT_TIMEOUT_S,
                "command_timeout": command_timeout,
                # Behind a transaction pooler, several clients share one server connection: names must not collide.
                # The driver's own cache is for the queries it asks by itself, once a connection, under counted names.
                "statement_cache_size": 0,
                "prepared_statement_name_func": lambda: f"vw_{uuid4().hex}",
                "server_settings": {"application_name": "viewer-worker"},
            },
        )
        event.listen(self.engine.sync_engine, "do_connect", self._before_connect)

    def _before_connect(self, _dialect: object, _record: object, _args: object, options: dict[str, object]) -> None:
        options["prepared_statement_cache_size"] = self._kept_statements

    def without_time_limit(self) -> Database:
        """The same database for commands that may take as long as they need, such as migrations. Close it."""
        return Database(self._address, command_timeout=None)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """One transaction: committed when the block ends, rolled back when it raises.

        Raises DatabaseUnavailable for what heals by waiting, DatabaseRefused for what does not. When the first comes
        out of the commit, nobody knows whether it happened; the caller must find out from the database, not assume.
        """
        with database_errors():
            connection = await self._connection()
            try:
                async with connection.begin():
                    yield connection
            except BaseException as error:
                if sqlstate(error) == NO_SUCH_STATEMENT and self._kept_statements:
                    await self._keep_no_statements()
                if not isinstance(error, Exception) or isinstance(error, TimeoutError):
                    # Cancelled or timed out in mid-command: the protocol on this connection is in an unknown state.
                    await connection.invalidate()
                raise
            finally:
                await connection.close()

    async def _connection(self) -> AsyncConnection:
        try:
            with database_errors():
                return await self.engine.connect()
        except DatabaseUnavailable as error:
            raise DatabaseUnavailable(f"{self._address.place}: {error}", error.remedy) from error

    async def _keep_no_statements(self) -> None:
        """A transaction pooler hands out another server connection each time: what was prepared is not there."""
        log.warning("connection pooler detected: no prepared statements are kept from now on")
        self._kept_statements = 0
        await self.engine.dispose()

    async def close(self) -> None:
        """Say goodbye to the server, but not for long: it may be out of reach."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self.engine.dispose()
