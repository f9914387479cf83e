"""Runs the worker: loops under a supervisor, and the HTTP server beside them."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from worker import __version__
from worker.app.connections import open_connections
from worker.app.counters import ViewCounters, build_counters
from worker.app.grpc import start_grpc
from worker.app.page import build_page
from worker.app.pipelines import build_pipelines, name_checks
from worker.app.probes import PostgresProbe, RedisProbe
from worker.counters.retention import LOOP as RETENTION
from worker.db.lease import LOOP as LEASE
from worker.db.read_limit import ReadLimit
from worker.db.record_reads import RecordReader
from worker.observability.logs import get_logger
from worker.observability.metrics import Metrics
from worker.observability.status import GRPC, MESSAGES, POSTGRES, REDIS, SERVERS, VIEW_COUNTS, Status
from worker.runtime.clock import SystemClock
from worker.runtime.monitor import Monitor
from worker.runtime.supervisor import Loop, Supervisor
from worker.web.health import Health
from worker.web.history_api import HistoryApi
from worker.web.records_api import RecordsApi
from worker.web.server import WebServer
from worker.web.views_api import ViewsApi

if TYPE_CHECKING:
    from worker.db.session import Database
    from worker.redis.client import RedisClient
    from worker.settings.model import Settings

log = get_logger(__name__)


async def run(settings: Settings) -> bool:
    """Run until stopped by a signal. True when everything was drained within the deadline.

    Raises OSError when the HTTP server cannot listen on its address, and as `start_grpc`. Waits for servers that are
    missing.
    """
    clock = SystemClock()
    metrics = Metrics()
    metrics.build_info.labels(__version__).set(1)
    status = Status(clock.monotonic, _name_checks(settings))
    async with open_connections(settings) as (database, redis), AsyncExitStack() as resources:
        limit = ReadLimit()
        counters = build_counters(settings, database, redis, status, metrics, limit)
        health = Health(status, clock, __version__, settings.health_grace, counters.backlog.quarantine.listed)
        records = RecordReader(database, limit)
        routes = [
            *HistoryApi(counters.display, clock).routes(),
            *ViewsApi(counters.display).routes(),
            *RecordsApi(records, clock).routes(),
        ]
        page = build_page(settings, health, status, metrics, counters.display, records) if settings.web_page else None
        if page is not None:
            routes += page.page.routes()
        web = WebServer(health, routes, metrics.registry, settings.health_check_host, settings.health_check_port)
        # Closed after all loops have ended: it answers while they drain.
        resources.push_async_callback(web.close)
        if page is not None:
            resources.push_async_callback(page.page.close)
        await web.start()
        grpc = await start_grpc(settings, redis, status, metrics) if settings.serves_grpc else None
        log.info(
            "started",
            version=__version__,
            url=web.url,
            grpc="off" if grpc is None else grpc.address,
            pid=os.getpid(),
            pipelines=list(settings.pipelines),
            redis=settings.redacted()["REDIS_URL"],
            postgres=settings.redacted()["DATABASE_URL"],
        )
        if settings.database.ignored:
            log.info("ignored parameters of DATABASE_URL", names=list(settings.database.ignored))
        supervisor = Supervisor(settings.shutdown_timeout.total_seconds(), on_stop=status.stop)
        loops = _make_loops(settings, database, redis, counters, status, metrics)
        loops |= build_pipelines(settings, database, redis, status, metrics).loops()
        if page is not None:
            loops |= page.loops()
        if grpc is not None:
            loops[GRPC] = grpc
        clean = await supervisor.run(loops)
    log.info("stopped", clean=clean)
    return clean


def _name_checks(settings: Settings) -> tuple[str, ...]:
    counters = [VIEW_COUNTS, *([MESSAGES] if settings.listens else [])] if settings.counts_views else []
    grpc = [GRPC] if settings.serves_grpc else []
    return (*SERVERS, *counters, *name_checks(settings), *grpc)


def _make_loops(
    settings: Settings,
    database: Database,
    redis: RedisClient,
    counters: ViewCounters,
    status: Status,
    metrics: Metrics,
) -> dict[str, Loop]:
    """The monitors, and the loops of the counters where views are counted."""
    target = counters.target if settings.counts_views else None
    probe = PostgresProbe(database=database, status=status, target=target, migrate=settings.migrate_on_start)
    loops: dict[str, Loop] = {
        REDIS: Monitor(REDIS, RedisProbe(redis), status, metrics.redis_up, counters.loop.sweep_soon),
        POSTGRES: Monitor(POSTGRES, probe, status, metrics.postgres_up),
    }
    if settings.counts_views:
        metrics.lease_held.labels(VIEW_COUNTS).set_function(lambda: counters.lease.is_usable)
        loops |= {LEASE: counters.lease, VIEW_COUNTS: counters.loop, RETENTION: counters.retention}
        if settings.listens:
            loops[MESSAGES] = counters.listener
    return loops
