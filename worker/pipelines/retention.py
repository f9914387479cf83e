"""Deletes old rows and old dead letters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from worker.db.dead_letters import LetterFilter, purge_letters
from worker.db.record_retention import try_lock_retention
from worker.errors import DatabaseRefused, Unavailable
from worker.observability.logs import get_logger
from worker.observability.status import SERVERS
from worker.runtime.waiting import wait_first

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import timedelta

    from worker.db.session import Database, Transaction
    from worker.observability.status import Status

log = get_logger(__name__)

LOOP = "record retention"
PERIOD_S = 600.0
START_S = 10.0
ROWS_AT_ONCE = 10_000
LETTERS_AT_ONCE = 1000
BEAT_S = 120.0


class Retention(Protocol):
    """What is old in one table."""

    async def prune(self, tx: Transaction, at_most: int) -> bool:
        """Delete about so many rows. True when there may be more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRetention:
    """Every ten minutes, in one replica at a time.

    `tables`: those that do not keep their rows for ever. `letters`: age of dead letters.
    """

    database: Database
    status: Status
    tables: Sequence[Retention]
    letters: timedelta

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                if self.status.is_ok(*SERVERS):
                    for table in self.tables:
                        await self._repeat(stop, partial(table.prune, at_most=ROWS_AT_ONCE))
                    await self._repeat(stop, self._purge_letters)
            except Unavailable as error:
                log.warning("retention postponed", cause=str(error))
            except DatabaseRefused as error:
                # Carrying does not need retention, and a restart would not help.
                log.error("retention refused", cause=str(error))
            # Soon after the start, and when the servers are back.
            period = PERIOD_S if self.status.is_ok(*SERVERS) else START_S
            self.status.expect_beat(LOOP, within=period + BEAT_S)
            await wait_first(period, stop)

    async def _repeat(self, stop: asyncio.Event, prune: Callable[[Transaction], Awaitable[bool]]) -> None:
        """In small transactions, until nothing is left to delete."""
        more = True
        while more and not stop.is_set():
            self.status.expect_beat(LOOP, within=BEAT_S)
            async with self.database.transaction() as tx:
                more = await try_lock_retention(tx) and await prune(tx)

    async def _purge_letters(self, tx: Transaction) -> bool:
        return await purge_letters(tx, LetterFilter(older_than=self.letters), LETTERS_AT_ONCE) >= LETTERS_AT_ONCE
