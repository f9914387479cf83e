"""The work behind the CLI commands."""

from __future__ import annotations

import asyncio
import contextlib
import random
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from worker.app.checkup import (
    WRITING,
    Finding,
    Level,
    RedisNames,
    check_agreement,
    check_counters,
    check_history,
    check_postgres,
    check_record_tables,
    check_redis,
    check_streams,
    check_worker,
    failure,
    shared_channel,
)
from worker.app.connections import open_connections, open_database
from worker.app.counters import build_counters, make_keys, make_target_table
from worker.app.pipelines import make_adjustments, make_sink
from worker.app.probes import PROBE_TIMEOUT_S
from worker.counters.flush.outcome import Busy
from worker.counters.intake.quarantine import Quarantine
from worker.db import dead_letters
from worker.db.dead_letters import read_letters
from worker.db.schema import read_schema, upgrade
from worker.db.target.total_import import import_totals as import_pages
from worker.errors import DatabaseRefused, Unavailable
from worker.observability.metrics import Metrics
from worker.observability.status import POSTGRES, REDIS, SCHEMA, VIEW_COUNTS, Status
from worker.pipelines.records import RECORD_TYPES
from worker.pipelines.records.metrics import METRICS
from worker.pipelines.replay import replay
from worker.pipelines.retention import LETTERS_AT_ONCE
from worker.runtime.clock import SystemClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from worker.app.counters import ViewCounters
    from worker.counters.flush.outcome import FlushOutcome
    from worker.db.dead_letters import LetterFilter, StoredLetter
    from worker.db.schema import SchemaState
    from worker.db.session import Database
    from worker.db.target.table import Page
    from worker.pipelines.replay import Replayed
    from worker.pipelines.sources.stream.adjust import Adjustment
    from worker.redis.client import RedisClient
    from worker.settings.model import Settings

# The check that fails where a table is not as this version created it.
TABLES = "tables"
AGREEMENT_NEEDS = {POSTGRES, REDIS, SCHEMA, WRITING, TABLES}
# Longer than the lease of a worker that crashed.
ONCE_TRIES = 20


@asynccontextmanager
async def open_counters(
    settings: Settings, *, changes: bool = False, migrate: bool = False
) -> AsyncIterator[ViewCounters]:
    """The view counters, connected, on tables of this version. With `changes` Redis must be a master, as for `run`.

    Raises Unavailable when a server cannot be used, SchemaNotCurrent when the tables are of another version.
    """
    async with open_connections(settings) as (database, redis):
        if migrate:
            await upgrade(database)
        async with database.transaction() as tx:
            (await read_schema(tx)).require_current()
        if changes:
            await redis.check(PROBE_TIMEOUT_S)  # a replica may accept writes, and loses them
        yield _build(settings, database, redis)


def _build(
    settings: Settings, database: Database, redis: RedisClient, quarantine: Quarantine | None = None
) -> ViewCounters:
    status = Status(SystemClock().monotonic, (VIEW_COUNTS,))
    return build_counters(settings, database, redis, status, Metrics(), quarantine=quarantine)


async def run_once(settings: Settings) -> FlushOutcome:
    """Flush everything that is pending now. Raises as `open_counters`."""
    async with open_counters(settings, changes=True, migrate=settings.migrate_on_start) as counters:
        outcome: FlushOutcome = Busy()
        try:
            for _ in range(ONCE_TRIES):
                if await counters.lease.take():
                    outcome = await counters.loop.cycle()
                if not isinstance(outcome, Busy):
                    break
                await asyncio.sleep(random.uniform(0.5, 1.0))
        finally:
            with contextlib.suppress(Unavailable):  # it also expires
                await counters.lease.release()
    return outcome


async def migrate(settings: Settings, *, only_status: bool) -> tuple[SchemaState, SchemaState]:
    """Bring the schema up to date unless `only_status`. Returns its state before and after. Raises Unavailable."""
    async with open_database(settings) as database:
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
    target = make_target_table(settings)
    if target is None:
        return
    async with _open_tables(settings) as database:
        async for page in import_pages(database, target):
            yield page


@asynccontextmanager
async def open_adjustments(settings: Settings) -> AsyncIterator[dict[str, Adjustment]]:
    """Stream → its Adjustment. Raises as `open_counters`."""
    async with open_connections(settings) as (database, redis):
        async with database.transaction() as tx:
            (await read_schema(tx)).require_current()
        yield make_adjustments(settings, database, redis)


async def list_letters(
    settings: Settings, wanted: LetterFilter, at_most: int
) -> tuple[list[StoredLetter], dict[tuple[str, str], int]]:
    """The oldest letters, and how many there are by pipeline and error class. Raises Unavailable, SchemaNotCurrent."""
    async with _open_tables(settings) as database, database.transaction() as tx:
        return await read_letters(tx, wanted, 0, at_most), await dead_letters.count_letters(tx, wanted)


async def count_letters(settings: Settings, wanted: LetterFilter) -> int:
    """Raises as `list_letters`."""
    async with _open_tables(settings) as database, database.transaction() as tx:
        return sum((await dead_letters.count_letters(tx, wanted)).values())


async def replay_letters(settings: Settings, wanted: LetterFilter, *, overwrite: bool) -> AsyncIterator[Replayed]:
    """Replay letters, step by step. Without `overwrite`, rows that are there stay, and so do the letters.

    Raises as `list_letters`, and TableRefused.
    """
    async with _open_tables(settings) as database:
        for record in RECORD_TYPES.values():
            if wanted.pipeline in (None, record.name):
                chosen = replace(wanted, pipeline=record.name)
                window = settings.pipeline(record).window
                sink = make_sink(settings, database, record, replaces=overwrite)
                async for done in replay(database, record, sink, chosen, window):
                    yield done


async def purge_letters(settings: Settings, wanted: LetterFilter) -> int:
    """Returns how many were deleted. Raises as `list_letters`."""
    gone = 0
    async with _open_tables(settings) as database:
        while True:
            async with database.transaction() as tx:
                deleted = await dead_letters.purge_letters(tx, wanted, LETTERS_AT_ONCE)
            gone += deleted
            if deleted < LETTERS_AT_ONCE:
                return gone


@asynccontextmanager
async def _open_tables(settings: Settings) -> AsyncIterator[Database]:
    async with open_database(settings) as database:
        async with database.transaction() as tx:
            (await read_schema(tx)).require_current()
        yield database


async def check(settings: Settings) -> list[Finding]:
    """Check everything the worker relies on. A server that cannot be used is a finding; the other checks go on."""
    async with open_connections(settings) as (database, redis):
        findings = await _look(POSTGRES, check_postgres(database, make_target_table(settings)))
        findings += await _look(REDIS, check_redis(redis, make_keys(settings), _redis_names(settings)))
        if settings.shares_usual_channel:
            findings.append(shared_channel(settings.view_channel))
        failed = {finding.name for finding in findings if finding.level is Level.FAILURE}
        if not failed & AGREEMENT_NEEDS:
            if settings.counts_views:
                counters = _build(settings, database, redis, Quarantine(SystemClock(), logs=False))
                findings += await _look("worker", check_worker(counters.adoption.stores))
                findings += await _look("counters", check_counters(counters.backlog, counters.flusher.committer.reader))
                findings += await _look("marker", check_agreement(counters.adoption))
                findings += await _look("history", check_history(database, settings.view_source_name))
            adjustments = make_adjustments(settings, database, redis)
            tables = check_record_tables(database, settings.records, takes_tickets=settings.stores_messages)
            findings += await _look(POSTGRES, tables)
            findings += await _look("streams", check_streams(adjustments[stream] for stream in settings.streams))
    return findings


def _redis_names(settings: Settings) -> RedisNames:
    return RedisNames(
        totals_channel=settings.view_totals_channel,
        message_channel=settings.view_channel if settings.listens or settings.stores_messages else "",
        streams=settings.streams,
        appended=settings.pipeline(METRICS).streams if settings.serves_grpc else (),
    )


async def _look(name: str, check: Awaitable[list[Finding]]) -> list[Finding]:
    try:
        return await check
    except Unavailable as error:
        return [failure(name, error)]
    except DatabaseRefused as error:
        return [failure(TABLES, error)]
