"""Deletes old tickets: each Writer those of all."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from worker.db.tickets import TICKET_AGE, prune_tickets
from worker.errors import DatabaseRefused, DatabaseUnavailable
from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from worker.db.session import Database

log = get_logger("worker.writer")

PRUNE_PERIOD_S = 3600.0
FIRST_PRUNE_S = 60.0
TICKETS_AT_ONCE = 10_000


async def prune_tickets_hourly(database: Database) -> None:
    """Until it is cancelled. A while after the start, too: not every process lives for an hour."""
    pause = FIRST_PRUNE_S
    while True:
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        pause = PRUNE_PERIOD_S
        try:
            more = True
            while more:
                async with database.transaction() as tx:
                    more = await prune_tickets(tx, TICKET_AGE, TICKETS_AT_ONCE) >= TICKETS_AT_ONCE
        except (DatabaseUnavailable, DatabaseRefused) as error:
            log.warning("tickets not pruned", cause=str(error))
