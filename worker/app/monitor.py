"""Watches the two servers, so that their state is known without asking them when somebody wants to know."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from worker.db.errors import database_errors
from worker.db.schema import read_schema, upgrade
from worker.errors import SchemaNotCurrent, TargetUnusable, Unavailable, cause_of
from worker.observability.logs import get_logger
from worker.runtime.backoff import Backoff
from worker.runtime.waiting import wait_first

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from prometheus_client import Gauge

    from worker.db.schema import SchemaState
    from worker.db.session import Database
    from worker.db.target.table import TargetTable
    from worker.observability.status import Status
    from worker.redis.client import RedisClient

log = get_logger(__name__)

PROBE_TIMEOUT_S = 5.0
PERIOD_S = 2.0
REFUSED = "The server answers, but refuses what the worker asks. Check the rights of its user."


class Monitor:
    """Asks one server for a sign of life: every two seconds, or with backoff while there is none."""

    def __init__(
        self,
        name: str,
        probe: Callable[[], Awaitable[None]],
        status: Status,
        up: Gauge,
        on_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._probe = probe
        self._status = status
        self._up = up
        self._on_up = on_up
        self._backoff = Backoff(first=0.2, cap=5.0)

    async def run(self, stop: asyncio.Event) -> None:
        self._status.expect_beat(self._name, within=60.0)
        while not stop.is_set():
            delay = await self._look()
            self._status.expect_beat(self._name, within=delay + 60.0)
            await wait_first(delay, stop)

    async def _look(self) -> float:
        try:
            await self._probe()
        except Unavailable as error:
            return self._down(str(error), error.remedy)
        except Exception as error:
            log.debug("probe failed", check=self._name, exc_info=error)
            return self._down(cause_of(error), REFUSED)
        if not self._status.is_ok(self._name):
            self._on_up()
        self._up.set(1)
        self._status.ok(self._name)
        self._backoff.reset()
        return PERIOD_S

    def _down(self, cause: str, remedy: str) -> float:
        self._up.set(0)
        self._status.failing(self._name, cause, remedy)
        return self._backoff.next()


async def _migrate(database: Database, status: Status, schema: SchemaState) -> bool:
    """True when the schema is up to date afterwards; else the check `schema` says why not."""
    log.info("migrating", found=schema.current, to=schema.head)
    status.expect_beat("postgres", within=math.inf)  # as long as it takes
    try:
        await upgrade(database)
    except Unavailable:
        raise
    except Exception as error:
        status.failing("schema", f"migration failed: {cause_of(error)}", "Run: viewer-worker migrate, as its owner.")
        return False
    return True


def redis_probe(redis: RedisClient) -> Callable[[], Awaitable[None]]:
    async def probe() -> None:
        await redis.ping(PROBE_TIMEOUT_S)

    return probe


def postgres_probe(
    database: Database, status: Status, target: TargetTable | None, *, migrate: bool
) -> Callable[[], Awaitable[None]]:
    """Looks at the schema too (check `schema`), and with `migrate` brings it up to date when it is missing or old.

    The application's own table, if one is to be kept up to date (`target`), is part of what must fit.
    """

    async def probe() -> None:
        unusable: TargetUnusable | None = None
        with database_errors():
            async with asyncio.timeout(PROBE_TIMEOUT_S), database.transaction() as tx:
                schema = await read_schema(tx)
                if target is not None:
                    try:
                        await target.check(tx)
                    except TargetUnusable as error:
                        unusable = error
        if migrate and schema.is_behind and not await _migrate(database, status, schema):
            return
        try:
            if migrate and schema.is_behind:
                schema = replace(schema, current=schema.head)
            schema.require_current()
            if unusable is not None:
                raise unusable
        except (SchemaNotCurrent, TargetUnusable) as error:
            status.failing("schema", str(error), error.remedy)
            return
        status.ok("schema", revision=schema.head)

    return probe
