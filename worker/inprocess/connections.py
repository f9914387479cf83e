"""The connections of a store. A Writer has its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

from worker.db.session import Database
from worker.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from worker.db.session import Transaction
    from worker.inprocess.options import WriterOptions

CONNECTIONS = 2
# What the child of a fork must not close: the sockets are the parent's, too.
_of_parent: list[Database] = []


class Connections:
    """Opens up to `CONNECTIONS` when they are needed; in the child of a fork, others than the parent's."""

    def __init__(self, options: WriterOptions) -> None:
        self._options = options
        self._database = self._connect()
        self._process = os.getpid()
        self.is_closed = False

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """As `Database.transaction`. Raises DatabaseUnavailable when it is closed."""
        if self.is_closed:
            raise_closed()
        return self._own().transaction()

    def cut(self) -> None:
        """Cut the connections in use, and open no more transactions."""
        self.is_closed = True
        self._own().abort()

    async def close(self) -> None:
        self.is_closed = True
        await self._own().close()

    def _own(self) -> Database:
        if self._process != os.getpid():
            _of_parent.append(self._database)
            self._database, self._process = self._connect(), os.getpid()
        return self._database

    def _connect(self) -> Database:
        options = self._options
        return Database(options.database, pool_size=1, overflow=CONNECTIONS - 1, recycle=options.recycle)


def raise_closed() -> NoReturn:
    """Raise what the calls of a closed store raise."""
    raise DatabaseUnavailable("the store is closed", "")
