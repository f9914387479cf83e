"""The composition root: the only place where the parts are made and wired together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import socket
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from worker import __version__
from worker.checkup import Finding, Level, check_agreement, check_postgres, check_redis
from worker.clock import SystemClock
from worker.counters.adopt import Adoption
from worker.counters.batch_size import BatchSize
from worker.counters.flush import Busy, Flusher
from worker.counters.keys import Keys
from worker.counters.lease import Lease
from worker.counters.loop import CHECK, FlushLoop
from worker.counters.pending import Pending, Sweep
from worker.counters.quarantine import Quarantine
from worker.counters.recovery import Recovery
from worker.counters.retention import Retention
from worker.counters.settle import Settler
from worker.db.ledger import Ledger
from worker.db.schema import read_schema, upgrade
from worker.db.session import Database
from worker.db.sources import SourceRow
from worker.engine.supervisor import Supervisor
from worker.errors import Unavailable
from worker.monitor import Monitor, postgres_probe, redis_probe
from worker.observability.logs import get_logger
from worker.observability.metrics import Metrics
from worker.observability.status import Status
from worker.redis.client import RedisClient
from worker.web.health import Health
from worker.web.server import WebServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from worker.counters.flush import Flushed
    from worker.counters.recovery import Hold
    from worker.db.schema import SchemaState
    from worker.settings import Settings

log = get_logger(__name__)

T = TypeVar("T")

AGREEMENT_NEEDS = ("postgres", "redis", "schema")

# Longer than the lease of a worker that crashed.
ONCE_TRIES = 20


@dataclass(frozen=True, slots=True)
class ViewCounters:
    """The view counters of one worker, wired together."""

    loop: FlushLoop
    lease: Lease
    retention: Retention
    flusher: Flusher
    settler: Settler
    adoption: Adoption
    quarantine: Quarantine


def run_async(main: Coroutine[object, object, T]) -> T:
    """Run `main` on uvloop where it is installed, else on asyncio's own loop."""
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        from uvloop import new_event_loop as loop_factory
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)


def connect_database(settings: Settings) -> Database:
    return Database(
        settings.database,
        pool_size=settings.db_max_idle_conns,
        overflow=settings.db_max_connections - settings.db_max_idle_conns,
        recycle=settings.db_conn_max_lifetime.total_seconds(),
    )


def view_counters(
    settings: Settings, database: Database, redis: RedisClient, status: Status, metrics: Metrics
) -> ViewCounters:
    clock = SystemClock()
    me = worker_id()
    keys = Keys(settings.view_key_prefix.encode())
    ledger = Ledger(settings.view_source_name, me)
    source_row = SourceRow(settings.view_source_name)
    lease = Lease(database, source_row, me, status)
    quarantine = Quarantine(clock)
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
        lease=lease,
        redis=redis,
        keys=keys,
        settler=settler,
        recovery=recovery,
        quarantine=quarantine,
        metrics=metrics,
        clock=clock,
    )
    loop = FlushLoop(
        lease=lease,
        flusher=flusher,
        pending=Pending(clock),
        sweep=Sweep(redis, keys, clock),
        quarantine=quarantine,
        keys=keys,
        status=status,
        metrics=metrics,
        clock=clock,
        interval=settings.batch_interval_ms / 1000,
        batch_size=BatchSize(settings.batch_size, settings.batch_size_max),
    )
    retention = Retention(database, ledger, source_row, lease, status, settings.view_ledger_retention)
    adoption = Adoption(
        database=database, source_row=source_row, redis=redis, keys=keys, settler=settler, recovery=recovery
    )
    return ViewCounters(loop, lease, retention, flusher, settler, adoption, quarantine)


def worker_id() -> str:
    """Names this process in the ledger: host, process, and a part that no restart repeats."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


async def run(settings: Settings) -> bool:
    """Run until stopped by a signal. True when everything was drained within the deadline.

    Raises OSError when the HTTP server's address cannot be had. Missing servers are waited for, not raised.
    """
    clock = SystemClock()
    metrics = Metrics()
    status = Status(clock, ("redis", "postgres", "schema", CHECK))
    _warn_of_idle_settings(settings)
    # Closed in reverse, after all loops have ended: the HTTP server answers while they drain.
    async with AsyncExitStack() as resources:
        database = connect_database(settings)
        resources.push_async_callback(database.close)
        redis = RedisClient(settings.redis)
        resources.push_async_callback(redis.close)
        counters = view_counters(settings, database, redis, status, metrics)
        health = Health(status, clock, __version__, settings.health_grace, counters.quarantine.listed)
        web = WebServer(health, metrics.registry, settings.health_check_host, settings.health_check_port)
        resources.push_async_callback(web.close)
        await web.start()
        log.info("started", version=__version__, url=web.url, pipelines=list(settings.pipelines))
        supervisor = Supervisor(settings.shutdown_timeout.total_seconds(), on_stop=status.stop)
        clean = await supervisor.run(
            {
                "redis": Monitor("redis", redis_probe(redis), status, metrics.redis_up, counters.loop.reconnected),
                "postgres": Monitor(
                    "postgres",
                    postgres_probe(database, status, migrate=settings.migrate_on_start),
                    status,
                    metrics.postgres_up,
                ),
                "lease": counters.lease,
                CHECK: counters.loop,
                "retention": counters.retention,
            }
        )
    log.info("stopped", clean=clean)
    return clean


@asynccontextmanager
async def counters_for_a_command(settings: Settings, *, migrate: bool = False) -> AsyncIterator[ViewCounters]:
    """The view counters, connected, on tables of this version.

    Raises Unavailable when a server cannot be used, SchemaNotCurrent when the tables are not those of this version.
    """
    async with AsyncExitStack() as resources:
        database = connect_database(settings)
        resources.push_async_callback(database.close)
        redis = RedisClient(settings.redis)
        resources.push_async_callback(redis.close)
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
        for _ in range(ONCE_TRIES):
            if await counters.lease.take():
                outcome = await counters.loop.cycle()
            if not isinstance(outcome, Busy):
                break
            await asyncio.sleep(random.uniform(0.5, 1.0))
        await counters.lease.release()
    return outcome


def _warn_of_idle_settings(settings: Settings) -> None:
    for name in settings.without_effect():
        log.warning("setting has no effect in this version", setting=name)


async def migrate(settings: Settings, *, only_status: bool) -> tuple[SchemaState, SchemaState]:
    """Bring the schema up to date unless `only_status`. Returns its state before and after. Raises Unavailable."""
    database = connect_database(settings)
    try:
        async with database.transaction() as tx:
            before = await read_schema(tx)
        if only_status:
            return before, before
        if not before.is_behind:
            before.require_current()
        await upgrade(database)
        async with database.transaction() as tx:
            return before, await read_schema(tx)
    finally:
        await database.close()


async def check(settings: Settings) -> list[Finding]:
    """Everything the worker relies on. A server that cannot be used is a finding too, and the rest goes on."""
    async with AsyncExitStack() as resources:
        database = connect_database(settings)
        resources.push_async_callback(database.close)
        redis = RedisClient(settings.redis)
        resources.push_async_callback(redis.close)
        keys = Keys(settings.view_key_prefix.encode())
        findings = await _look("postgres", check_postgres(database)) + await _look("redis", check_redis(redis, keys))
        if not any(finding.level is Level.FAILURE and finding.name in AGREEMENT_NEEDS for finding in findings):
            counters = view_counters(settings, database, redis, Status(SystemClock(), (CHECK,)), Metrics())
            findings += await _look("marker", check_agreement(counters.adoption))
    return findings


async def _look(name: str, at: Awaitable[list[Finding]]) -> list[Finding]:
    try:
        return await at
    except Unavailable as error:
        return [Finding(name, Level.FAILURE, str(error), error.remedy)]
