"""Imports the totals that the application's own table already has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.db.counters.source_row import lock_all_sources

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from worker.db.session import Database
    from worker.db.target.table import Page, TargetTable

ROWS_AT_ONCE = 5000


async def import_totals(database: Database, target: TargetTable) -> AsyncIterator[Page]:
    """Import page by page. Safe to interrupt and repeat: each id is imported once.

    Raises Unavailable, TargetUnusable.
    """
    last_key: Any = None
    while True:
        async with database.transaction() as tx:
            # A flush adds to the application's table: none may run between reading that table and writing ours.
            await lock_all_sources(tx)
            page = await target.import_page(tx, last_key, ROWS_AT_ONCE)
        yield page
        if page.rows < ROWS_AT_ONCE:
            return
        last_key = page.last_key
