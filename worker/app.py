"""What the program does: run, run once, migrate, check, import. Each connects what it needs, and closes it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from worker import __version__
from worker.checkup import Finding, Level, check_agreement, check_postgres, check_redis, shared_channel
from worker.clock import SystemClock
from worker.counters.flush import Busy
from worker.counters.lease import NEEDS
from worker.counters.listener import CHECK as MESSAGES
from worker.counters.loop import CHECK
from worker.db.schema import read_schema, upgrade
from worker.db.total_import import import_totals as import_pages
from worker.engine.supervisor import Loop, Supervisor
from worker.errors import Unavailable
from worker.monitor import Monitor, postgres_probe, redis_probe
from worker.observability.logs import get_logger
from worker.observability.metrics import Metrics
from worker.observability.status import Status
from worker.web.api import Api
from worker.web.health import Health
from worker.web.server import WebServer
from worker.wiring import connections, database_of, keys_of, target_table, view_counters

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from worker.counters.flush import Flushed
    from worker.counters.recovery import Hold
    from worker.db.schema import SchemaState
    from worker.db.target import Page
    from worker.settings import Settings
    from worker.wiring import ViewCounters

log = get_logger(__name__)

T = TypeVar("T")

AGREEMENT_NEEDS = ("postgres", "redis", "schema")

# Longer than the lease of a worker that crashed.
ONCE_TRIES = 20


def run_async(main: Coroutine[object, object, T]) -> T:
    """Run `main` on uvloop where it is installed, else on asyncio's own loop."""
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        from uvloop import new_event_loop as loop_factory
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)


async def run(settings: Settings) -> bool:
    """Run until stopped by a signal. True when everything was drained within the deadline.

    Raises OSError when the HTTP server's address cannot be had. Missing servers are waited for, not raised.
    """
    clock = SystemClock()
    metrics = Metrics()
    status = Status(clock, (*NEEDS, CHECK, *((MESSAGES,) if settings.listens else ())))
    async with connections(settings) as (database, redis), AsyncExitStack() as resources:
        counters = view_counters(settings, database, redis, status, metrics)
        health = Health(status, clock, __version__, settings.health_grace, counters.quarantine.listed)
        api = Api(counters.display)
        web = WebServer(health, api, metrics.registry, settings.health_check_host, settings.health_check_port)
        # Closed after all loops have ended: it answers while they drain.
        resources.push_async_callback(web.close)
        await web.start()
        log.info(
            "started",
            version=__version__,
            url=web.url,
            pid=os.getpid(),
            pipelines=list(settings.pipelines),
            redis=settings.redacted()["REDIS_URL"],
            postgres=settings.redacted()["DATABASE_URL"],
        )
        supervisor = Supervisor(settings.shutdown_timeout.total_seconds(), on_stop=status.stop)
        postgres = postgres_probe(database, status, counters.flusher.target, migrate=settings.migrate_on_start)
        loops: dict[str, Loop] = {
            "redis": Monitor("redis", redis_probe(redis), status, metrics.redis_up, counters.loop.sweep_soon),
            "postgres": Monitor("postgres", postgres, status, metrics.postgres_up),
            "lease": counters.lease,
            CHECK: counters.loop,
            "retention": counters.retention,
        }
        if settings.listens:
            loops[MESSAGES] = counters.listener
        clean = await supervisor.run(loops)
    log.info("stopped", clean=clean)
    return clean


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
