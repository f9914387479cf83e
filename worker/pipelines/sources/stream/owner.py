"""Finds the other source of this database that carries a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.pipelines.sources.stream.evidence import Evidence

if TYPE_CHECKING:
    from worker.db.positions import Position, StreamPosition
    from worker.db.session import Database
    from worker.pipelines.sources.stream.look import Seen


async def find_owner(database: Database, position: StreamPosition, row: Position, seen: Seen) -> str | None:
    """Another row with the mark of the stream. Only a mark that is not ours can be another's."""
    first = seen.first
    if not isinstance(first, Evidence) or first.mark is None or first.mark == row.incarnation:
        return None
    async with database.transaction() as tx:
        return await position.owner_of(tx, first.mark)
