"""The pool of connections to Postgres, and the one way to run a transaction."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from worker.db.errors import database_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from worker.db.address import DatabaseAddress

CONNECT_TIMEOUT_S = 5.0
# Past the server's own statement timeout, so that this one only speaks when the server is out of reach.
COMMAND_TIMEOUT_S = 35.0


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
        self.engine: AsyncEngine = create_async_engine(
            address.url,
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
                # Behind a transaction pooler, two clients share one server connection: names must not collide, and a
                # statement that was prepared on one server connection does not exist on the next.
                "prepared_statement_name_func": lambda: f"vw_{uuid4().hex}",
                "server_settings": {"application_name": "viewer-worker"},
            },
        )

    def patient(self) -> Database:
        """The same database for commands that may take as long as they need, such as migrations. Close it."""
        return Database(self._address, command_timeout=None)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """One transaction: committed when the block ends, rolled back when it raises.

        Raises DatabaseUnavailable for what heals by waiting. When that comes out of the commit, nobody knows whether
        it happened; the caller must find out from the database, not assume.
        """
        with database_errors():
            connection = await self.engine.connect()
            try:
                async with connection.begin():
                    yield connection
            except BaseException as error:
                if not isinstance(error, Exception) or isinstance(error, TimeoutError):
                    # Cancelled or timed out in mid-command: the protocol on this connection is in an unknown state.
                    await connection.invalidate()
                raise
            finally:
                await connection.close()

    async def close(self) -> None:
        await self.engine.dispose()
