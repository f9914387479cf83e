"""The composition root: the only place where the parts are made and wired together."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.contract.keys import Keys
from worker.counters.adopt import Adoption
from worker.counters.display import Display
from worker.counters.flush.batch_size import BatchSize
from worker.counters.flush.flusher import Flusher
from worker.counters.flush.reading import CounterReader
from worker.counters.flush.recovery import Recovery
from worker.counters.flush.settle import Settler
from worker.counters.flush.totals import TotalsChannel
from worker.counters.forget import Forgetting
from worker.counters.intake.announced import Announced
from worker.counters.intake.listener import Listener
from worker.counters.intake.messages import Updates
from worker.counters.intake.pending import Pending, Sweep
from worker.counters.intake.quarantine import Quarantine
from worker.counters.loop import FlushLoop
from worker.counters.retention import Retention
from worker.db.counters.ledger import Ledger
from worker.db.counters.source_row import SourceRow
from worker.db.lease import Lease
from worker.db.session import Database
from worker.db.target.table import TargetTable
from worker.redis.client import RedisClient
from worker.runtime.clock import SystemClock
from worker.runtime.worker_id import new_worker_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from worker.observability.metrics import Metrics
    from worker.observability.status import Status
    from worker.settings.model import Settings


@dataclass(frozen=True, slots=True)
class ViewCounters:
    """The view counters of one worker, wired together."""

    loop: FlushLoop
    listener: Listener
    announced: Announced
    lease: Lease
    retention: Retention
    flusher: Flusher
    settler: Settler
    adoption: Adoption
    forgetting: Forgetting
    quarantine: Quarantine
    display: Display


@asynccontextmanager
async def database_of(settings: Settings) -> AsyncIterator[Database]:
    database = Database(
        settings.database,
        pool_size=settings.db_max_idle_conns,
        overflow=settings.db_max_connections - settings.db_max_idle_conns,
        recycle=settings.db_conn_max_lifetime.total_seconds(),
    )
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def connections(settings: Settings) -> AsyncIterator[tuple[Database, RedisClient]]:
    """To both servers; opened when they are needed, closed at the end."""
    async with database_of(settings) as database:
        redis = RedisClient(settings.redis)
        try:
            yield database, redis
        finally:
            await redis.close()


def view_counters(
    settings: Settings, database: Database, redis: RedisClient, status: Status, metrics: Metrics
) -> ViewCounters:
    clock = SystemClock()
    me = new_worker_id()
    keys = keys_of(settings)
    ledger = Ledger(settings.view_source_name, me, settings.view_count_source)
    source_row = SourceRow(settings.view_source_name)
    lease = Lease(database, source_row, me, status)
    quarantine = Quarantine(clock)
    announced = Announced(metrics)
    reader = CounterReader(redis, keys, quarantine)
    settler = Settler(redis, keys, metrics)
    recovery = Recovery(
        database=database,
        ledger=ledger,
        source_row=source_row,
        redis=redis,
        keys=keys,
        settler=settler,
        metrics=metrics,
        status=status,
        trust_lost_marker=settings.view_on_lost_marker == "fresh",
    )
    flusher = Flusher(
        database=database,
        ledger=ledger,
        source_row=source_row,
        target=target_table(settings),
        lease=lease,
        redis=redis,
        keys=keys,
        announced=announced,
        reader=reader,
        settler=settler,
        recovery=recovery,
        quarantine=quarantine,
        totals=TotalsChannel(redis, settings.view_totals_channel),
        metrics=metrics,
        clock=clock,
    )
    intake_ended = asyncio.Event()
    if not settings.listens:
        intake_ended.set()
    loop = FlushLoop(
        lease=lease,
        flusher=flusher,
        pending=Pending(clock),
        sweep=Sweep(redis, keys, clock),
        announced=announced,
        intake_ended=intake_ended,
        quarantine=quarantine,
        keys=keys,
        status=status,
        metrics=metrics,
        clock=clock,
        interval=settings.batch_interval_ms / 1000,
        batch_size=BatchSize(settings.batch_size, settings.batch_size_max),
    )
    listener = Listener(
        redis=redis,
        channel=settings.view_channel,
        lease=lease,
        announced=announced,
        updates=Updates(metrics, clock),
        status=status,
        metrics=metrics,
        missed=loop.sweep_soon,
        full=loop.flush_soon,
        ended=intake_ended,
    )
    retention = Retention(database, ledger, source_row, lease, status, settings.view_ledger_retention)
    adoption = Adoption(
        database=database, source_row=source_row, redis=redis, keys=keys, settler=settler, recovery=recovery
    )
    forgetting = Forgetting(
        database=database,
        ledger=ledger,
        source_row=source_row,
        redis=redis,
        keys=keys,
        reader=reader,
        settler=settler,
        recovery=recovery,
    )
    return ViewCounters(
        loop=loop,
        listener=listener,
        announced=announced,
        lease=lease,
        retention=retention,
        flusher=flusher,
        settler=settler,
        adoption=adoption,
        forgetting=forgetting,
        quarantine=quarantine,
        display=Display(database, redis, keys, settings.view_source_name, settings.view_count_source),
    )


def keys_of(settings: Settings) -> Keys:
    return Keys(settings.view_key_prefix.encode(), settings.redis.database)


def target_table(settings: Settings) -> TargetTable | None:
    return None if settings.view_target is None else TargetTable(settings.view_target, SystemClock())
