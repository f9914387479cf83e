"""Tickets: the claims of batches that come from a process's memory. A batch is written once for each id."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import Interval, bindparam, delete, func, select
from sqlalchemy.dialects.postgresql import insert as upsert

from worker.db.tables import ingest_batches
from worker.db.transaction_settings import APPLY_SETTINGS

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

TICKET_AGE = timedelta(days=1)

_ticket = ingest_batches.c
_TAKE = upsert(ingest_batches).values(id=bindparam("ticket"), pipeline=bindparam("of_pipeline"))
_TAKE = _TAKE.on_conflict_do_nothing()


@dataclass(frozen=True, slots=True)
class Ticket:
    """Implements Claim."""

    id: UUID
    pipeline: str

    async def take(self, tx: AsyncConnection) -> bool:
        """Another attempt that is not finished yet is waited for."""
        await tx.execute(APPLY_SETTINGS)
        return (await tx.execute(_TAKE, {"ticket": self.id, "of_pipeline": self.pipeline})).rowcount == 1


class TicketRetention:
    """Tickets are kept for a day."""

    async def prune(self, tx: AsyncConnection, at_most: int) -> bool:
        """Delete at most so many old ones. True when there may be more."""
        return await prune_tickets(tx, TICKET_AGE, at_most) >= at_most


async def prune_tickets(tx: AsyncConnection, age: timedelta, at_most: int) -> int:
    """Delete tickets that are older. Returns how many went."""
    old = _ticket.at < func.now() - bindparam("age", age, Interval)
    some = select(_ticket.id).where(old).order_by(_ticket.at, _ticket.id).limit(at_most)
    return (await tx.execute(delete(ingest_batches).where(_ticket.id.in_(some)))).rowcount
