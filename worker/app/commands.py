"""What is done once and then ends: run --once, migrate, import, check, and what other commands ask the counters."""

from __future__ import annotations

import asyncio
import contextlib
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from worker.app.checkup import Finding, Level, check_agreement, check_postgres, check_redis, shared_channel
from worker.app.wiring import connections, database_of, keys_of, target_table, view_counters
from worker.counters.flush.flusher import Busy
from worker.counters.loop import CHECK
from worker.db.schema import read_schema, upgrade
from worker.db.target.total_import import import_totals as import_pages
from worker.errors import Unavailable
from worker.observability.metrics import Metrics
from worker.observability.status import Status
from worker.runtime.clock import SystemClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from worker.app.wiring import ViewCounters
    from worker.counters.flush.flusher import Flushed
    from worker.counters.flush.recovery import Hold
    from worker.db.schema import SchemaState
    from worker.db.target.table import Page
    from worker.settings.model import Settings

AGREEMENT_NEEDS = ("postgres", "redis", "schema")
# Longer than the lease of a worker that crashed.
ONCE_TRIES = 20


@asynccontextmanager
async def counters_for_a_command(settings: Settings, *, migrate: bool = False) -> AsyncIterator[ViewCounters]:
    """The view counters, connected, on tables of this version.

    Raises Unavailable when a server cannot be used, SchemaNotCurrent when the tables are not those of this version.
    """
    async with connections(settings) as (database, redis):
        if migrate:
            await upgrade(database)
        async with database.transaction() as tx:
            (await read_schema(tx)).require_current()
        yield view_counters(settings, database, redis, Status(SystemClock(), (CHECK,)), Metrics())


async def run_once(settings: Settings) -> Flushed | Busy | Hold:
    """One full flush of everything that is pending now.

    Raises Unavailable when a server cannot be used, SchemaNotCurrent when the tables are not those of this version.
    """
    async with counters_for_a_command(settings, migrate=settings.migrate_on_start) as counters:
        outcome: Flushed | Busy | Hold = Busy()
        try:
            for _ in range(ONCE_TRIES):
                if await counters.lease.take():
                    outcome = await counters.loop.cycle()
                if not isinstance(outcome, Busy):
                    break
                await asyncio.sleep(random.uniform(0.5, 1.0))
        finally:
            with contextlib.suppress(Unavailable):  # it expires, too
                await counters.lease.release()
    return outcome


async def migrate(settings: Settings, *, only_status: bool) -> tuple[SchemaState, SchemaState]:
    """Bring the schema up to date unless `only_status`. Returns its state before and after. Raises Unavailable."""
    async with database_of(settings) as database:
        async with database.transaction() as tx:
            before = await read_schema(tx)
        if only_status:
            return before, before
        if not before.is_behind:
            before.require_current()
        await upgrade(database)
        async with database.transaction() as tx:
            return before, await read_schema(tx)


async def import_totals(settings: Settings) -> AsyncIterator[Page]:
    """The totals of the application's own table, page by page. Raises Unavailable, SchemaNotCurrent, TargetUnusable."""
    target = target_table(settings)
    if target is None:
        return
    async with database_of(settings) as database:
        async with database.transaction() as tx:
            (await read_schema(tx)).require_current()
        async for page in import_pages(database, target):
            yield page


async def check(settings: Settings) -> list[Finding]:
    """Everything the worker relies on. A server that cannot be used is a finding too, and the rest goes on."""
    async with connections(settings) as (database, redis):
        findings = await _look("postgres", check_postgres(database, target_table(settings)))
        findings += await _look("redis", check_redis(redis, keys_of(settings), settings.channels))
        if settings.may_hear_of_other_keys:
            findings.append(shared_channel(settings.view_channel))
        if not any(finding.level is Level.FAILURE and finding.name in AGREEMENT_NEEDS for finding in findings):
            counters = view_counters(settings, database, redis, Status(SystemClock(), (CHECK,)), Metrics())
            findings += await _look("marker", check_agreement(counters.adoption))
    return findings


async def _look(name: str, at: Awaitable[list[Finding]]) -> list[Finding]:
    try:
        return await at
    except Unavailable as error:
        return [Finding(name, Level.FAILURE, str(error), error.remedy)]
