"""Limits the reads that answer requests, in number and in time, so that the worker keeps its connections."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from sqlalchemy import func, select

from worker.errors import DatabaseUnavailable, TooManyReaders

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import Select

READERS_AT_ONCE = 2
WAITING_READERS = 50
TURN_LIMIT_S = 2.0
# Longer than the statement timeout below: for a Postgres that is out of reach.
ANSWER_S = 4.0
# Postgres cancels slower reads before they slow down the database.
_TIMEOUTS = {"statement_timeout": "2s", "lock_timeout": "1s"}


def read_settings(**more: str) -> Select[tuple[str, ...]]:
    """Sets the time limits of a read, and `more` settings, until the end of the transaction."""
    return select(*(func.set_config(name, value, True) for name, value in (_TIMEOUTS | more).items()))


class ReadLimit:
    """One for each pool of connections: all reads that answer requests share it."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(READERS_AT_ONCE)
        self._present = 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, then run the block. Raises TooManyReaders, and DatabaseUnavailable if the block is slow."""
        if self._present >= WAITING_READERS:
            raise TooManyReaders
        self._present += 1
        try:
            await self._wait_for_turn()
            try:
                async with asyncio.timeout(ANSWER_S):
                    yield
            except TimeoutError:
                raise DatabaseUnavailable("no answer in time") from None
            finally:
                self._turn.release()
        finally:
            self._present -= 1

    async def _wait_for_turn(self) -> None:
        try:
            async with asyncio.timeout(TURN_LIMIT_S):
                await self._turn.acquire()
        except TimeoutError:
            raise TooManyReaders from None
