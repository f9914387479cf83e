"""The worker as it runs: loops under a supervisor, and the HTTP server beside them."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from worker import __version__
from worker.app.monitor import Monitor, postgres_probe, redis_probe
from worker.app.wiring import connections, view_counters
from worker.counters.intake.listener import CHECK as MESSAGES
from worker.counters.loop import CHECK
from worker.db.lease import NEEDS
from worker.observability.logs import get_logger
from worker.observability.metrics import Metrics
from worker.observability.status import Status
from worker.runtime.clock import SystemClock
from worker.runtime.supervisor import Loop, Supervisor
from worker.web.api import Api
from worker.web.health import Health
from worker.web.server import WebServer

if TYPE_CHECKING:
    from worker.settings.model import Settings

log = get_logger(__name__)


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
